"""How problems are asked, and what counts as a right answer."""

import datetime

import pytest
from chat_templates import CHATML

from heddle.data.asking import IN_TAGS, answered, asking, parse_answer, prompt_encoder, score, usable
from heddle.data.corpora import part_of
from heddle.data.examples import TakeExample
from heddle.data.tasks import Problem, Records, Stream, open_task
from heddle.data.tokenizers import Tokenizer


def test_what_cannot_be_asked_or_scored_is_refused():
    tokenizer = Tokenizer.bytes()
    check = usable(tokenizer.encode, 8, 5, answers=True)
    check(Problem("12>", {"answer": 2}))
    check(Problem("12>", {"answer": None, "entry": {"answer": None}}))  # reasoning-gym's, scored by the entry
    with pytest.raises(ValueError, match=r"room for a prompt of 4 tokens and grpo.max_completion more, 9; got 8"):
        check(Problem("123>", {"answer": 3}))
    for fields in ({}, {"answer": None}):
        with pytest.raises(ValueError, match="no 'answer', which the reward 'task' compares with"):
            check(Problem("12>", fields))
        usable(tokenizer.encode, 8, 5, answers=False)(Problem("12>", fields))


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<answer>4</answer>", "4"),
        ("so it is\n<answer> 4\n</answer>  ", "4"),
        ("<answer>4</answer> I think", None),
        ("<answer>3</answer><answer>4</answer>", None),
        ("<answer>4", None),
        ("</answer>4<answer>", None),
        ("4", None),
    ],
)
def test_an_answer_must_be_written_as_asked(completion, expected):
    assert parse_answer(completion, "tags") == expected
    assert parse_answer(completion, "whole") == completion.strip()


def test_prompts_as_text_and_as_chat():
    tokenizer = Tokenizer.bytes()

    def written(prompt, answer_form="whole", **options):
        return tokenizer.decode(prompt_encoder(tokenizer, answer_form, **options)(prompt))

    assert written("12>") == "12>"
    assert written("12>", "tags") == f"{IN_TAGS}\n\n12>\n"
    with pytest.raises(ValueError, match="prompt_form=chat needs a tokenizer with a chat template"):
        written("12>", form="chat")
    tokenizer.chat_template = CHATML
    assert written("12>", form="text") == "12>"
    chat = written("12>", "tags")
    assert IN_TAGS in chat
    assert chat.endswith("assistant\n")
    own = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "12>"}]
    assert IN_TAGS not in written(own, "tags")
    assert "Be long." in written("12>", system="Be long.")


def test_a_template_that_writes_todays_date_writes_the_same_in_training_on_each_day(monkeypatch):
    """Llama 3's does; a run that went on after midnight would train on other tokens."""
    tokenizer = Tokenizer.bytes()
    tokenizer.chat_template = "{{- 'Today is ' + strftime_now('%d %b %Y') + '.' }}" + CHATML
    record = {"prompt": "12>", "completion": "2"}

    def texts():
        trained = [TakeExample(tokenizer, 999)(record)[1].tokens.tolist(), prompt_encoder(tokenizer, "whole")("12>")]
        return [*map(tokenizer.decode, trained), tokenizer.chat([{"role": "user", "content": "12>"}])]

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 2, 3)

    assert all(text.startswith("Today is 26 Jul 2024.") for text in texts()[:2])
    monkeypatch.setattr("heddle.data.chat.datetime.datetime", Tomorrow)
    *trained, served = texts()
    assert all(text.startswith("Today is 26 Jul 2024.") for text in trained)
    assert served.startswith("Today is 03 Feb 2031.")


@pytest.mark.parametrize("form", ["text", "chat"])
def test_right_answers_are_examples_of_what_rewards_are_for(form):
    tokenizer = Tokenizer.bytes()
    tokenizer.chat_template = CHATML
    task = open_task("reasoning-gym:chain_sum", {"max_terms": 2, "max_digits": 1, "min_digits": 1}, seed=5)
    ask, encode = (make(tokenizer, "tags", form=form) for make in (asking, prompt_encoder))
    reader = part_of(answered(task, TakeExample(tokenizer, 512, form="text"), ask, "tags"), "train", 0.3)
    stream = Stream(task, "train", 0.3, {"answer_form": "tags", "threshold": 1.0})
    cursors = []
    for _, (_, example, cursor) in zip(range(20), reader(0, None), strict=False):
        prompt, fields = stream.take(task.levels)
        cursors.append(cursor)
        read = encode(prompt)
        assert example.tokens[: len(read)].tolist() == read
        assert not example.learned[: len(read)].any()
        answer = tokenizer.decode(example.tokens[example.learned].tolist()).removesuffix("<|im_end|>\n")
        assert score(answer, **fields) == 1
    # It goes on behind a cursor; another epoch has other problems.
    later, other = next(reader(0, cursors[4]))[1], next(reader(1, None))[1]
    assert later.tokens.tolist() == list(reader_tokens(reader, 6))[5]
    assert other.tokens.tolist() != next(reader_tokens(reader, 1))


def test_an_example_that_fills_its_row_is_a_broken_line(caplog):
    tokenizer = Tokenizer.bytes()
    long = [f"{n % 10}" * (n % 7 + 1) for n in range(50)]
    task = Records([{"prompt": text, "answer": text[0]} | {"level": 1} for text in long])
    first = next(i for i in range(50) if len(task.problem(i, 1).prompt) > 3)

    def reader(**more):
        take = TakeExample(tokenizer, 5, overlong="refuse")
        return answered(task, take, asking(tokenizer, "whole"), "whole", name="some", **more)(0, None)

    with pytest.raises(ValueError, match=rf"^some:{first}: .*more than the 5 of a row"):
        list(reader())
    for _, (_, example, _) in zip(range(30), reader(on_error="skip")):
        assert len(example.tokens) <= 5
    assert caplog.messages[0].startswith(f"some:{first}: ")
    # Some of reasoning-gym's have no one answer.
    none = answered(Records([{"prompt": "?", "answer": None, "level": 1}]), TakeExample(tokenizer, 5), str, "whole")
    with pytest.raises(ValueError, match=r"^task:0: no 'answer' to learn$"):
        next(none(0, None))


def reader_tokens(reader, count):
    return (example.tokens.tolist() for _, (_, example, _) in zip(range(count), reader(0, None), strict=False))
