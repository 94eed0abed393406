"""Tasks: problems by number, held-out ones apart, answers parsed strictly."""

import datetime
import json
import re

import numpy as np
import pytest
from chat_templates import CHATML

from heddle.data.corpora import part_of
from heddle.data.examples import TakeExample
from heddle.data.tasks import (
    IN_TAGS,
    Largest,
    Problem,
    ReasoningGym,
    Records,
    Stream,
    answered,
    asking,
    open_task,
    parse_answer,
    parse_settings,
    prompt_encoder,
    score,
    usable,
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


def test_what_is_held_out_is_the_same_whatever_the_seed():
    every = {f"{a}{b}>" for a in range(10) for b in range(10)} - {p.prompt for p in prompts(train(Largest(2)), 2, 2000)}
    for seed in range(3):
        held_out = Stream(Largest(2, seed), "held_out", 0.3, FIELDS)
        assert {held_out.take(2).prompt for _ in range(500)} == every


def train(task, **more):
    return Stream(task, "train", 0.3, FIELDS, **more)


def test_a_problem_that_cannot_be_used_ends_the_run_or_is_skipped_and_counted(caplog):
    def check(problem):
        if problem.prompt.startswith("7"):
            raise ValueError("it begins with 7")

    bad = next(n for n in range(1000) if Largest(2).problem(n, 2).prompt.startswith("7"))
    with pytest.raises(ValueError, match=rf"^largest:{bad}: it begins with 7$"):
        prompts(train(Largest(2), check=check, name="largest"), 2, 1000)
    stream = train(Largest(2), check=check, name="largest", on_error="skip")
    assert not any(problem.prompt.startswith("7") for problem in prompts(stream, 2, 200))
    assert stream.skipped == len(caplog.messages) > 0
    assert caplog.messages[0] == f"largest:{bad}: it begins with 7; skipped"

    def none(problem):
        raise ValueError("never")

    with pytest.raises(ValueError, match="none of 1000 problems of largest of level 1 can be used: never"):
        train(Largest(1), check=none, name="largest", on_error="skip").take(1)


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
    # What refuses a problem refuses a record, by its line.
    with pytest.raises(ValueError, match=r"prompts.jsonl:5: not this"):
        open_task(str(path), check=refuse_the_fourth)
    skipping = open_task(str(path), check=refuse_the_fourth, on_error="skip")
    assert {skipping.problem(i, 2).fields["answer"] for i in range(50)} == {0, 1, 2, 3, 5}
    for line, message in (
        ('{"question": 1}', "no 'prompt'; it has question"),
        ('{"prompt": 3}', "'prompt' must be text or messages, got 3"),
        ('{"prompt": "a", "level": 0}', "'level' must be an integer of at least 1, got 0"),
    ):
        path.write_text(line + "\n")
        with pytest.raises(ValueError, match=message):
            open_task(str(path))


def refuse_the_fourth(problem):
    if problem.fields["answer"] == 4:
        raise ValueError("not this")


def test_levels_of_records_count_in_their_order_and_orders_are_made_once_an_epoch(monkeypatch):
    records = [{"prompt": str(i), "level": (7, 2, 30)[i % 3]} for i in range(30)]
    task = Records(records, seed=1)
    assert task.levels == 3
    for level, expected in ((1, {2}), (2, {2, 7}), (3, {2, 7, 30})):
        count = 10 * level
        epochs = [[task.problem(i, level).prompt for i in range(at, at + count)] for at in (0, count)]
        assert {task.problem(i, level).fields["level"] for i in range(count)} == expected
        assert epochs[0] != epochs[1]
        assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(r["prompt"] for r in records if r["level"] in expected)
    task, made, make = Records(records, seed=1), [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: made.append(seed) or make(seed))
    for i in range(60):
        task.problem(i, 3), task.problem(i // 3, 1)
    assert made == [[1, 0], [1, 0], [1, 1], [1, 1]]  # of two levels two epochs


def test_reasoning_gyms_seeds_share_no_problems():
    """The package seeds problem n of seed s by s + n."""
    tasks = [open_task("reasoning-gym:chain_sum", {"min_digits": 9, "max_digits": 9}, seed=seed) for seed in range(4)]
    asked = [task.problem(i, task.levels).prompt for task in tasks for i in range(20)]
    assert len({*asked}) == len(asked)


def test_reasoning_gyms_levels_lead_up_to_the_task_as_it_is_set():
    def terms(level, settings=None):
        task = open_task("reasoning-gym:chain_sum", settings)
        asked = [task.problem(i, level).prompt.partition(": ")[2].removesuffix(" =") for i in range(200)]
        numbers = [re.split(r" [-+] ", text) for text in asked]
        return max(map(len, numbers)), max(len(number) for each in numbers for number in each)

    # By default up to six terms of four digits; the package goes on to twelve of ten.
    assert open_task("reasoning-gym:chain_sum").levels == 5
    assert [terms(level) for level in range(1, 6)] == [(2, 1), (3, 2), (4, 3), (5, 4), (6, 4)]
    few = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}
    assert open_task("reasoning-gym:chain_sum", few).levels == 2
    assert [terms(level, few) for level in (1, 2)] == [(2, 1), (3, 1)]
    # What the curriculum says nothing of is as it is set, at each level.
    signed = open_task("reasoning-gym:chain_sum", {"allow_negation": True})
    assert any(": -" in signed.problem(i, 1).prompt for i in range(30))
    easiest = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    assert open_task("reasoning-gym:chain_sum", easiest).levels == 1
    # Less is harder: of zeros in a matrix. The easiest step has half.
    assert open_task("reasoning-gym:binary_matrix", {"p_zero": 0.6}).levels == 1
    assert open_task("reasoning-gym:binary_matrix", {"p_zero": 0.2}).levels == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files that the package leaves open
def test_all_of_reasoning_gyms_tasks_have_problems_without_end():
    """Some can't make as many as the others, or make all of them first; composite must be told of what."""
    from reasoning_gym.factory import DATASETS

    assert len(DATASETS) > 100
    for name in DATASETS:
        if name != "composite":
            task = open_task(f"reasoning-gym:{name}")
            assert task.problem(12_345, task.levels).prompt


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
