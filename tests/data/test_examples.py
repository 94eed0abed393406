"""Examples: which records are read, which tokens are learned, what is refused and where it stands."""

import ast
import json
import logging
import sys
from copy import copy
from itertools import groupby
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_templates import CHATML, MARKED, TALK

from heddle.data.examples import TakeExample, docstring_pairs, documents, open_examples, stdlib_docstrings
from heddle.data.packing import NO_TARGET, Packer
from heddle.data.tokenizers import Tokenizer

PLAIN = Tokenizer.bytes()


def chat(template=CHATML):
    tokenizer = Tokenizer.bytes()
    tokenizer.chat_template = template
    return tokenizer


def jsonl(path, records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def learned(take, record):
    """The text of a record, and the stretches of it that are learned."""
    _, (tokens, mask) = take(record)

    def text(ids):
        return take.tokenizer.decode([int(t) for t in ids], skip_special=False)

    runs = [(is_learned, list(run)) for is_learned, run in groupby(zip(tokens, mask), key=lambda pair: pair[1])]
    return text(tokens), [text(t for t, _ in run) for is_learned, run in runs if is_learned]


def test_prompt_and_completion_as_text_and_as_a_chat():
    record = {"prompt": "2+2=", "completion": "4", "id": 7}
    assert learned(TakeExample(PLAIN, 99), record) == ("2+2=4<|endoftext|>", ["4<|endoftext|>"])
    assert learned(TakeExample(PLAIN, 99, "all"), record)[1] == ["2+2=4<|endoftext|>"]
    text = "<|im_start|>user\n2+2=<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    for loss_on, expected in (("completion", "4<|im_end|>\n"), ("assistant", "4<|im_end|>\n"), ("all", text)):
        assert learned(TakeExample(chat(), 99, loss_on), record) == (text, [expected])
    assert learned(TakeExample(chat(), 99, form="text"), record)[0] == "2+2=4<|endoftext|>"
    with pytest.raises(ValueError, match="form=chat needs a tokenizer with a chat template"):
        TakeExample(PLAIN, 99, form="chat")
    with pytest.raises(ValueError, match="loss_on must be one of completion, assistant, all; got 'prompt'"):
        TakeExample(PLAIN, 99, "prompt")


def test_messages_and_a_conversation_in_two_parts():
    answers = [m["content"] + "<|im_end|>" for m in TALK if m["role"] == "assistant"]
    parts = {"prompt": TALK[:2], "completion": TALK[2:]}
    for record, template, loss_on, expected in (
        ({"messages": TALK}, CHATML, "completion", [answers[1] + "\n"]),
        ({"messages": TALK}, CHATML, "assistant", [answer + "\n" for answer in answers]),
        ({"messages": TALK, "prompt": None}, MARKED, "assistant", answers),
        (parts, CHATML, "completion", ["".join(text for text in [
            answers[0], "\n<|im_start|>user\nand again<|im_end|>\n<|im_start|>assistant\n", answers[1], "\n"
        ])]),
        (parts, MARKED, "assistant", answers),
    ):  # fmt: skip
        assert learned(TakeExample(chat(template), 999, loss_on), record)[1] == expected
    with pytest.raises(ValueError, match="messages need a tokenizer with a chat template"):
        TakeExample(PLAIN, 99)({"messages": TALK})


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "number"}}}}}
TOOLS = "{%- if tools %}{{- 'Tools: ' + tools | map('tojson') | join(';') + '\n' }}{%- endif %}"


def test_tools_are_written_by_the_template(tmp_path):
    take = TakeExample(chat(TOOLS + CHATML), 999)
    written = f"Tools: {json.dumps(TOOL)};{json.dumps(TOOL)}\n"
    for record in (
        {"prompt": "1+1", "completion": "2"},
        {"messages": TALK},
        {"prompt": TALK[:2], "completion": TALK[2:]},
    ):
        without, answers = learned(take, record)
        for tools in ([TOOL, TOOL], json.dumps([TOOL, TOOL])):
            assert learned(take, {**record, "tools": tools}) == (written + without, answers)
        for none in (None, [], "[]"):
            assert learned(take, {**record, "tools": none})[0] == without
    # Parquet gives each object all fields that any of them has.
    other = {"type": "function", "function": {"name": "now"}}
    pq.write_table(pa.Table.from_pylist([{"messages": TALK, "tools": [TOOL, other]}]), tmp_path / "some.parquet")
    [(_, example, _)] = open_examples(str(tmp_path / "some.parquet"), take)(0, None)
    text = PLAIN.decode(example.tokens.tolist())
    assert text.startswith(f"Tools: {json.dumps(TOOL)};{json.dumps(other)}\n")
    with pytest.raises(ValueError, match="'tools' are for conversations by a chat template"):
        TakeExample(PLAIN, 99)({"prompt": "a", "completion": "b", "tools": [TOOL]})
    for wrong, message in (("[", "'tools' is no JSON: Expecting value"), ({"a": 1}, "'tools' is dict, not a list")):
        with pytest.raises(ValueError, match=message):
            take({"prompt": "a", "completion": "b", "tools": wrong})


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """The embedded model's tokenizer, and transformers' of the same files."""
    from transformers import PreTrainedTokenizerFast

    folder, ours = tmp_path_factory.mktemp("tokenizer"), Tokenizer.from_pretrained(None)
    ours.save_pretrained(folder)
    return ours, PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("case", ["completion", "completion of several turns", "assistant", "all", "tools", "text"])
def test_tokens_and_what_is_learned_are_trls(embedded, tmp_path, case):
    """By their trainer's own preparation of a dataset, on a trainer that is no more than what that asks of it."""
    import datasets
    import trl

    ours, theirs = embedded
    template = {"assistant": MARKED, "tools": TOOLS + CHATML}.get(case, ours.chat_template)
    parts = {"prompt": TALK[:4], "completion": TALK[4:]}
    record = {
        "completion of several turns": {"prompt": TALK[:2], "completion": TALK[2:]}, "assistant": {"messages": TALK},
        "all": {"messages": TALK}, "tools": {**parts, "tools": json.dumps([TOOL])},
        "text": {"prompt": "What is it?\n", "completion": "It is a loom."},
    }.get(case, parts)  # fmt: skip
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_length=None, packing=False,
        assistant_only_loss=case == "assistant",
    )  # fmt: skip
    trainer = SimpleNamespace(_tokenizer=theirs, chat_template=template, completion_only_loss="prompt" in record)
    [expected] = trl.SFTTrainer._prepare_dataset(
        trainer, datasets.Dataset.from_list([record]), theirs, arguments, False, None, "train"
    )
    tokenizer = copy(ours)
    tokenizer.chat_template = template
    loss_on = case if case in ("assistant", "all") else "completion"
    _, (tokens, mask) = TakeExample(tokenizer, 999, loss_on, "text" if case == "text" else "auto")(record)
    assert tokens.tolist() == expected["input_ids"]
    assert mask.tolist() == [label != -100 for label in expected["labels"]]
    assert mask.any()
    assert mask.all() == (case == "all")


@pytest.mark.slow
def test_rows_of_the_librarys_docstrings_are_all_but_full(embedded):
    """98.9 % at 1,024 tokens a row, in Python 3.11."""
    reader = stdlib_docstrings(TakeExample(embedded[0], 1024), on_error="skip")
    batches = list(Packer(documents(reader), 1024, 8, seed=0, epochs=1))
    rows = np.concatenate([batch.segment_ids for batch in batches])
    rows = rows[(rows >= 0).any(axis=1)]  # the last batch is filled up
    assert len(rows) > 1000
    assert (rows >= 0).mean() >= 0.98


BROKEN = {
    '{"messages": [': "not JSON",
    "[1]": "list, not an object",
    '{"text": "a"}': "neither 'messages' nor 'prompt' and 'completion'; it has text",
    '{"prompt": "a", "completion": 3}': "'completion' is int, not text",
    '{"prompt": "a", "completion": ""}': "'completion' is empty",
    '{"messages": []}': "'messages' is empty",
    '{"messages": "hi"}': "'messages' is str, not a list of messages",
    '{"messages": ["hi"]}': "message 0 of 'messages' is str, not an object",
    '{"messages": [{"role": "user"}]}': "message 0 of 'messages': no field 'content'; it has role",
    '{"messages": [{"role": "user", "content": "a"}]}': "'messages' must end with the assistant's, but the last is "
    "the user's",
}


@pytest.mark.parametrize("line", BROKEN)
def test_a_broken_line_is_named_and_ends_the_reading_or_is_skipped(tmp_path, caplog, line):
    good = {"prompt": "a", "completion": "b"}
    path = jsonl(tmp_path / "some.jsonl", [good, line, good])
    take = TakeExample(chat(), 99)
    with pytest.raises(ValueError) as error:
        list(open_examples(str(path), take)(0, None))
    assert str(error.value).startswith(f"{path}:2: {BROKEN[line]}")
    with caplog.at_level(logging.WARNING):
        assert len(list(open_examples(str(path), take, on_error="skip")(0, None))) == 2
    assert f"{path}:2: {BROKEN[line]}" in caplog.text


def test_what_is_longer_than_a_row_is_cut_or_refused(caplog):
    record, long_prompt = {"prompt": "12345", "completion": "678901"}, {"prompt": "1234567890", "completion": "1"}
    take = TakeExample(PLAIN, 8)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert learned(take, record) == ("12345678", ["678"])
    assert caplog.messages == ["an example of 12 tokens was cut to the 8 of a row; others won't be reported"]
    with pytest.raises(ValueError, match="nothing to learn: the prompt fills all 8 tokens of a row"):
        take(long_prompt)
    with pytest.raises(ValueError, match="12 tokens, more than the 8 of a row"):
        TakeExample(PLAIN, 8, overlong="refuse")(record)


def test_parquet_and_jsonl_hold_the_same_examples(tmp_path):
    records = [{"messages": TALK[:3]}, {"messages": TALK}]
    table = pa.Table.from_pylist([{**r, "other": i} for i, r in enumerate(records)])
    pq.write_table(table, tmp_path / "some.parquet")
    jsonl(tmp_path / "some.jsonl", records)
    take = TakeExample(chat(), 999)
    ours, theirs = (list(open_examples(str(tmp_path / f"some.{kind}"), take)(0, None)) for kind in ("parquet", "jsonl"))
    assert [key for key, *_ in ours] == [key for key, *_ in theirs]
    for (_, a, _), (_, b, _) in zip(ours, theirs):
        assert (a.tokens.tolist(), a.learned.tolist()) == (b.tokens.tolist(), b.learned.tolist())
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(
        ValueError, match="has no column 'messages' or 'prompt' or 'completion' or 'tools'; it has text"
    ):
        list(open_examples(str(tmp_path / "other.parquet"), take)(0, None))
    (tmp_path / "some.txt").write_text("text")
    with pytest.raises(ValueError, match=r"examples must be JSONL, Parquet or of the hub, '.*some.txt' holds plain"):
        open_examples(str(tmp_path / "some.txt"), take)
    with pytest.raises(ValueError, match="corpus must be stdlib-docstrings, hub:NAME, or a file"):
        open_examples("stdlib", take)


def test_a_hub_dataset_is_streamed(tmp_path):
    jsonl(tmp_path / "train.jsonl", [{"prompt": str(i), "completion": str(-i)} for i in range(5)])
    items = list(open_examples(f"hub:{tmp_path}", TakeExample(PLAIN, 99))(0, None))
    assert [json.loads(key)["prompt"] for key, *_ in items] == list("01234")
    resumed = list(open_examples(f"hub:{tmp_path}", TakeExample(PLAIN, 99))(0, json.loads(json.dumps(items[1][2]))))
    assert [key for key, *_ in resumed] == [key for key, *_ in items[2:]]


def test_packed_examples_learn_what_is_marked_and_go_on_after_a_stop(tmp_path):
    records = [{"prompt": f"{i}?" * (i % 5 + 1), "completion": f"={i}" * (i % 3 + 1)} for i in range(40)]
    path = jsonl(tmp_path / "some.jsonl", records)

    def packer():
        reader = open_examples(str(path), TakeExample(PLAIN, 32), seed=0)
        return Packer(documents(reader), 32, 2, window=200, epochs=2)

    batches = list(packer())
    targets = sum(int((b.targets != NO_TARGET).sum()) for b in batches)
    assert targets == 2 * sum(len(r["completion"]) + 1 for r in records)  # the end of text is learned too
    resumed = packer()
    first = [next(resumed) for _ in range(3)]
    state = json.loads(json.dumps(resumed.state()))
    other = packer()
    other.restore(state)
    for a, b in zip([*first, *other], batches, strict=True):
        assert all((x == y).all() for x, y in zip(a, b))


# ---------------------------------------------------------------------- docstrings


def test_a_pair_is_a_docstring_and_its_function():
    source = '''
class A:
    @property
    def long(self, x="ä"):
        """Say it once more.

        In two parts.
        """
        # why
        return """
out
"""

    def none(self):
        return 1

    def alone(self):
        """Nothing to do, nothing at all."""

    def short(self):
        """Short."""
        return 2

async def outer():
    "Outer, and a little more."; x = 1
    def inner(): "Inside of what is outer."; return x
'''
    pairs = dict(docstring_pairs(source))
    assert list(pairs) == ["A.long", "outer", "outer.inner"]
    assert pairs["A.long"]["prompt"] == '"""Say it once more.\n\nIn two parts."""\n'
    assert pairs["A.long"]["completion"] == ('@property\ndef long(self, x="ä"):\n    # why\n    return """\nout\n"""\n')
    for pair in pairs.values():
        ast.parse(pair["completion"])
        assert "Outer" not in pair["completion"]


@pytest.mark.slow
def test_the_librarys_docstrings_are_all_there_and_can_be_gone_on_with():
    take = TakeExample(PLAIN, 10**6)
    items = list(stdlib_docstrings(take, on_error="fail")(0, None))
    assert len(items) > 3000
    if sys.version_info[:2] == (3, 11):
        assert len(items) == 6366
    rest = stdlib_docstrings(take)(0, json.loads(json.dumps(items[2000][2])))
    for (key, document, _), (other, again, _) in zip(items[2001:2100], rest):
        assert key == other
        assert document.tokens.tolist() == again.tokens.tolist()
    for key, document, _ in items[::50]:
        text = PLAIN.decode(document.tokens.tolist())
        ast.parse(text[text.rindex('"""\n', 0, text.index("def ")) + 4 :].removesuffix("<|endoftext|>"), key)
