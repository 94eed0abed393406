"""Tasks: problems by number, held-out ones apart, answers parsed strictly."""

import json
import re

import numpy as np
import pytest

from heddle.data.asking import score
from heddle.data.tasks import Largest, ReasoningGym, Records, Stream, open_task, parse_settings
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
