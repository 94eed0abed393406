"""Tasks: problems by number, held-out ones apart, answers parsed strictly."""

import json

import pytest
from chat_templates import CHATML

from heddle.data.corpora import part_of
from heddle.data.examples import TakeExample
from heddle.data.tasks import (
    IN_TAGS,
    Largest,
    ReasoningGym,
    Stream,
    answered,
    asking,
    open_task,
    parse_answer,
    parse_settings,
    prompt_encoder,
    score,
)
from heddle.data.tokenizers import Tokenizer
from heddle.options import makes_problems

FIELDS = {"answer_form": "whole", "threshold": 1.0}


def prompts(stream, level, count):
    return [stream.take(level) for _ in range(count)]


def test_largest_asks_for_the_largest_digit():
    task = open_task("largest", {"digits": 4}, seed=3)
    assert task.levels == 4
    for index in range(30):
        for level in (1, 4):
            prompt, fields = task.problem(index, level)
            digits, end = prompt[:-1], prompt[-1]
            assert (len(digits), end) == (level, ">")
            assert fields["answer"] == max(digits)
            assert task.problem(index, level) == (prompt, fields)
            assert score(fields["answer"] + "\n", **fields, **FIELDS) == 1
            assert score(fields["answer"] + "1", **fields, **FIELDS) == 0
    assert open_task("largest", seed=4).problem(0, 3) != open_task("largest", seed=5).problem(0, 3)


def test_training_never_sees_what_is_held_out():
    streams = [Stream(Largest(2), part, 0.3, FIELDS) for part in ("train", "held_out")]
    train, held_out = ({problem.prompt for problem in prompts(stream, 2, 500)} for stream in streams)
    assert not train & held_out
    assert len(train | held_out) > 95
    assert 10 < len(held_out) < 50
    # It goes on from a number.
    stream = Stream(Largest(2), "train", 0.3, FIELDS)
    first = prompts(stream, 2, 5)
    at = stream.next
    after = prompts(stream, 2, 5)
    stream.next = at
    assert prompts(stream, 2, 5) == after != first
    with pytest.raises(ValueError, match=r"data.held_out=1e-12 leaves none of 1000 problems of level 1 to evaluate on"):
        Stream(Largest(1), "held_out", 1e-12, FIELDS).take(1)


def test_records_are_shuffled_anew_each_time_through(tmp_path):
    path = tmp_path / "prompts.jsonl"
    records = [{"prompt": f"{i} is", "answer": i, "level": 1 + i // 3, "colour": "red"} for i in range(6)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    task = open_task(str(path), seed=1)
    assert task.levels == 2
    first, second = ([task.problem(i, 2).fields["answer"] for i in range(at, at + 6)] for at in (0, 6))
    assert sorted(first) == sorted(second) == list(range(6))
    assert first != second
    assert {task.problem(i, 1).fields["answer"] for i in range(3)} == {0, 1, 2}
    assert task.problem(0, 2).fields["colour"] == "red"
    assert score("4 ", task="records", answer=4, **FIELDS) == 1
    for line, message in (
        ('{"question": 1}', "no 'prompt'; it has question"),
        ('{"prompt": 3}', "'prompt' must be text or messages, got 3"),
        ('{"prompt": "a", "level": 0}', "'level' must be an integer of at least 1, got 0"),
    ):
        path.write_text(line + "\n")
        with pytest.raises(ValueError, match=message):
            open_task(str(path))


def test_reasoning_gym_strictly():
    task = open_task("reasoning-gym:chain_sum", {"max_terms": 2, "max_digits": 1, "min_digits": 1}, seed=5)
    prompt, fields = task.problem(7, task.levels)
    terms = prompt.partition(": ")[2].removesuffix(" =")
    assert str(eval(terms)) == fields["answer"]
    right, tags = fields["answer"], {"answer_form": "tags"}
    assert score(f"It is <answer> {right} </answer>\n", **fields, **tags) == 1
    # The package's own scorer pays for text that merely holds the answer.
    assert score(f"<answer>It is {right}</answer>", **fields, **tags) == 0
    assert score(f"<answer>It is {right}</answer>", **fields, **tags, threshold=0.01) == 1
    assert score(right, **fields, **tags) == 0
    assert task.problem(7, task.levels) == (prompt, fields)
    assert task.problem(8, task.levels) != (prompt, fields)
    easy, hard = (len(open_task("reasoning-gym:chain_sum").problem(0, level).prompt) for level in (1, 4))
    assert easy < hard
    with pytest.raises(ValueError, match=r"reasoning-gym has no task 'nothing'; it has .*chain_sum"):
        ReasoningGym("nothing", {})
    with pytest.raises(ValueError, match=r"chain_sum can't be set to {'terms': 2}: .*unexpected keyword argument"):
        open_task("reasoning-gym:chain_sum", {"terms": 2})


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


def reader_tokens(reader, count):
    return (example.tokens.tolist() for _, (_, example, _) in zip(range(count), reader(0, None), strict=False))


def test_what_is_no_task_is_refused():
    assert makes_problems("largest")
    assert makes_problems("reasoning-gym:gcd")
    assert not makes_problems("largest.jsonl")
    assert parse_settings(["digits=2", "name=a b", "flag=true"]) == {"digits": 2, "name": "a b", "flag": True}
    with pytest.raises(ValueError, match=r"settings of largest must be digits, at least 1; got {'digits': 0}"):
        open_task("largest", {"digits": 0})
    with pytest.raises(ValueError, match="settings are for largest, reasoning-gym:NAME alone"):
        open_task("somewhere.jsonl", {"digits": 2})
    with pytest.raises(ValueError, match="corpus must be largest, reasoning-gym:NAME"):
        open_task("no-such-task")
