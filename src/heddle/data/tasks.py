"""Tasks whose answers can be verified, for reinforcement learning: prompts without end, and a score of their answers.

A task is ``largest``, the largest of some digits, which a model of bytes learns in minutes; ``reasoning-gym:NAME``, one
of that package's; or a file of prompts (JSONL, Parquet, ``hub:NAME``), records with ``prompt``, text or messages, and
whatever else rewards are told, such as ``answer`` (of Parquet that alone) and, for a curriculum, ``level``.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from heddle.options import ANSWER_FORMS, GYM, LARGEST, SFT_FORMS

from .chat import ASSISTANT, Message
from .corpora import Reader, Take, is_held_out, open_records
from .tokenizers import Tokenizer

BUILTIN = f"{LARGEST}, {GYM}NAME"
OPEN, CLOSE = "<answer>", "</answer>"
IN_TAGS = f"Put the final answer, and nothing else, between {OPEN} and {CLOSE}, at the very end."

_ENDLESS = 2**30  #: problems of a task that makes them up
_EPOCH = 10_000  #: of those, what one time through is to who reads them as examples
_TRIES = 1000  #: problems looked at for one that is held out, or isn't


class Problem(NamedTuple):
    """What is asked, and what rewards are told of it beside the completion."""

    prompt: str | Sequence[Message]
    fields: dict[str, Any]


@runtime_checkable
class Task(Protocol):
    """Problems by number, always the same ones."""

    @property
    def levels(self) -> int:
        """Of difficulty, from 1 on."""
        ...

    @property
    def answer_form(self) -> str:
        """How answers are written: ``"tags"``, between ``<answer>`` and ``</answer>``; ``"whole"``."""
        ...

    def problem(self, index: int, level: int) -> Problem:
        """The problem of this number, of a level of difficulty."""
        ...


class Stream:
    """The problems of one part of a task, one after another: training never sees what is held out.

    Args:
        task: see :func:`open_task`.
        part: ``"train"`` or ``"held_out"``.
        held_out: the share of all prompts that is held out, by their hash.
        fields: what rewards are told of every problem.
    """

    def __init__(self, task: Task, part: str, held_out: float, fields: Mapping[str, Any]):
        self.task, self.next = task, 0  #: the number of the next problem that is looked at
        self._part, self._share, self._fields = part, held_out, fields

    def take(self, level: int) -> Problem:
        """The next problem.

        Raises:
            ValueError: so many problems in a row belong to the other part that this one must be empty.
        """
        for _ in range(_TRIES):
            problem = self.task.problem(self.next, level)
            self.next += 1
            if is_held_out(_key(problem), self._share) == (self._part == "held_out"):
                return Problem(problem.prompt, {**problem.fields, **self._fields})
        raise ValueError(
            f"data.held_out={self._share} leaves none of {_TRIES} problems of level {level} "
            + ("to evaluate on: raise it" if self._part == "held_out" else "to train on: lower it")
        )


def _key(problem: Problem) -> str:
    return json.dumps(problem.prompt, sort_keys=True, default=str)


def open_task(
    name: str, settings: Mapping[str, Any] | None = None, *, seed: int = 0, subset: str | None = None,
    split: str = "train", on_error: str = "fail",
) -> Task:  # fmt: skip
    """The task of this name.

    Args:
        name: ``"largest"``, ``"reasoning-gym:NAME"``, or a file, folder, pattern or ``"hub:NAME"`` of records.
        settings: of the task: ``digits`` of ``largest``; whatever the class of configuration of a reasoning-gym task
            has.
        seed: of the problems, and of the order of records.
        subset: of a dataset of the hub.
        split: of a dataset of the hub.
        on_error: what a broken record does: ``"fail"`` or ``"skip"``.

    Raises:
        ValueError: a name that stands for no task, settings that the task hasn't, records without prompts.
        ImportError: reasoning-gym isn't installed.
    """
    settings = dict(settings or {})
    if name == LARGEST:
        digits = settings.pop("digits", 3)
        if settings or not isinstance(digits, int) or digits < 1:
            raise ValueError(f"settings of {LARGEST} must be digits, at least 1; got {settings or {'digits': digits}}")
        return Largest(digits, seed)
    if name.startswith(GYM):
        return ReasoningGym(name.removeprefix(GYM), settings, seed)
    if settings:
        raise ValueError(f"settings are for {BUILTIN} alone, got {settings} for {name}")
    reader = open_records(
        name, _TakeRecord(), seed=None, on_error=on_error, subset=subset, split=split, builtin=BUILTIN
    )
    records = [] if reader is None else [record for _, record, _ in reader(0, None)]
    if not records:
        raise ValueError(f"{name} must hold records with a prompt, in JSONL, Parquet or on the hub; got none")
    return Records(records, seed)


@dataclass(frozen=True)
class Largest:
    """``"372>"`` is answered by ``"7"``. Level n has n digits."""

    levels: int
    seed: int = 0
    answer_form: str = "whole"

    def problem(self, index: int, level: int) -> Problem:
        """See :meth:`Task.problem`."""
        digits = np.random.default_rng([self.seed, index]).integers(0, 10, level)
        return Problem("".join(map(str, digits)) + ">", {"task": LARGEST, "answer": str(digits.max())})


class ReasoningGym:
    """A task of the package reasoning-gym (arXiv 2505.24760).

    Its levels are those of its curriculum, where it has one; the highest one, which is what is asked without a
    curriculum, is then the task as ``settings`` have it.

    Raises:
        ValueError: no such task, or settings that it hasn't.
        ImportError: the package isn't installed.
    """

    answer_form = "tags"

    def __init__(self, name: str, settings: Mapping[str, Any], seed: int = 0):
        self.name, self.settings, self._seed = name, dict(settings), seed
        factory = _gym()
        if name not in factory.DATASETS:
            raise ValueError(f"reasoning-gym has no task {name!r}; it has {', '.join(sorted(factory.DATASETS))}")
        self._levels: list[dict[str, Any]] = []
        if factory.has_curriculum(name):
            curriculum = factory.create_curriculum(name)
            steps = max((len(a.levels) for a in curriculum.attributes.values()), default=0)
            for step in range(steps):
                curriculum.set_global_level(step)
                config = vars(curriculum.generate_configuration()).items()
                self._levels.append({key: value for key, value in config if key not in ("seed", "size")})
        self._levels = [*({**level, **settings} for level in self._levels), self.settings]
        self.levels = len(self._levels)
        self._datasets: dict[int, Any] = {}
        self.problem(0, self.levels)

    def problem(self, index: int, level: int) -> Problem:
        """See :meth:`Task.problem`."""
        if level not in self._datasets:
            try:
                dataset = _gym().create_dataset(
                    self.name, seed=self._seed % 2**31, size=_ENDLESS, **self._levels[level - 1]
                )
            except (TypeError, AssertionError, ValueError) as error:
                raise ValueError(f"reasoning-gym's {self.name} can't be set to {self.settings}: {error}") from None
            self._datasets[level] = dataset
        entry = self._datasets[level][index]
        return Problem(entry["question"], {"task": GYM + self.name, "answer": entry["answer"], "entry": entry})


@dataclass(frozen=True)
class Records:
    """Prompts that stand in a file, shuffled anew for each time through."""

    records: Sequence[dict[str, Any]]
    seed: int = 0
    answer_form: str = "whole"

    @property
    def levels(self) -> int:
        return max(record["level"] for record in self.records)

    def problem(self, index: int, level: int) -> Problem:
        """See :meth:`Task.problem`: of this level or a lower one."""
        records = [record for record in self.records if record["level"] <= level] or self.records
        epoch, at = divmod(index, len(records))
        record = records[np.random.default_rng([self.seed, epoch]).permutation(len(records))[at]]
        return Problem(record["prompt"], {"task": "records", **record})


@dataclass
class _TakeRecord:
    fields: tuple[str, ...] = field(default=("prompt", "answer", "level"), init=False)

    def __call__(self, record: Any) -> tuple[str, dict[str, Any]]:
        if not isinstance(record, dict) or "prompt" not in record:
            has = ", ".join(map(str, record)) if isinstance(record, dict) else "none"
            raise ValueError(f"no 'prompt'; it has {has}")
        prompt = record["prompt"]
        messages = isinstance(prompt, list) and all(isinstance(m, dict) and "role" in m for m in prompt)
        if not prompt or not (isinstance(prompt, str) or messages):
            raise ValueError(f"'prompt' must be text or messages, got {prompt!r}")
        level = record.get("level", 1)
        if isinstance(level, bool) or not isinstance(level, int) or level < 1:
            raise ValueError(f"'level' must be an integer of at least 1, got {level!r}")
        return json.dumps(prompt, default=str), {**record, "level": level}


def parse_settings(settings: Sequence[str] | None) -> dict[str, Any]:
    """``["min_terms=2", ...]`` as a mapping; values are Python's literals, or else text."""

    def value(text: str) -> Any:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return {"true": True, "false": False}.get(text, text)

    return {name: value(text) for name, _, text in (setting.partition("=") for setting in settings or ())}


# ---------------------------------------------------------------------- prompts as token ids


def asking(
    tokenizer: Tokenizer, answer_form: str, *, form: str = "auto", system: str | None = None
) -> Callable[[str | Sequence[Message]], str | list[Message]]:
    """What makes a prompt into the text or the conversation that a model reads.

    Args:
        tokenizer: which may have a chat template.
        answer_form: of the task, which says how answers are to be written.
        form: ``"chat"``, a prompt that is text becomes a user's message; ``"text"``; ``"auto"``, as a chat where there
            is a template.
        system: what is said before; None: how the answer is to be written, if in tags.

    Raises:
        ValueError: another form; ``"chat"`` without a template. What is returned raises it for messages without one.
    """
    if form not in SFT_FORMS:
        raise ValueError(f"form must be one of {', '.join(SFT_FORMS)}; got {form!r}")
    if form == "chat" and not tokenizer.chat_template:
        raise ValueError("prompt_form=chat needs a tokenizer with a chat template, this one has none")
    before = (IN_TAGS if answer_form == "tags" else "") if system is None else system

    def ask(prompt: str | Sequence[Message]) -> str | list[Message]:
        if isinstance(prompt, str) and (form == "text" or not tokenizer.chat_template):
            return f"{before}\n\n{prompt}\n" if before else prompt
        messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if before and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": before}, *messages]
        return messages

    return ask


def prompt_encoder(
    tokenizer: Tokenizer, answer_form: str, *, form: str = "auto", system: str | None = None
) -> Callable[[str | Sequence[Message]], list[int]]:
    """What makes a prompt into token ids; arguments and errors as of :func:`asking`."""
    ask = asking(tokenizer, answer_form, form=form, system=system)

    def encode(prompt: str | Sequence[Message]) -> list[int]:
        asked = ask(prompt)
        if isinstance(asked, str):
            return tokenizer.encode(asked)
        return tokenizer.encode(tokenizer.chat(asked), add_special=False)

    return encode


def answered(task: Task, take: Take, ask: Callable[[Any], str | list[Message]], answer_form: str) -> Reader:
    """A task's problems of its highest level with their right answers, as examples to learn from.

    Each has the key by which :class:`Stream` deals problems, so that what is held out from one is from the other.
    10,000 problems are an epoch; the next one's are others.

    Args:
        task: one that makes its problems up, see :func:`heddle.options.makes_problems`.
        take: what makes a record of ``prompt`` and ``completion`` into an example.
        ask: see :func:`asking`.
        answer_form: how answers are written.
    """

    def read(epoch: int, cursor: Any) -> Iterator[tuple[str, Any, Any]]:
        for number in range(cursor or 0, _EPOCH):
            problem = task.problem(epoch * _EPOCH + number, task.levels)
            prompt, answer = ask(problem.prompt), str(problem.fields["answer"])
            said = f"{OPEN}{answer}{CLOSE}" if answer_form == "tags" else answer
            completion = said if isinstance(prompt, str) else [{"role": ASSISTANT, "content": said}]
            yield _key(problem), take({"prompt": prompt, "completion": completion})[1], number + 1

    return read


# ---------------------------------------------------------------------- answers


def parse_answer(completion: str, form: str) -> str | None:
    """The answer that a completion gives, strictly: None if it isn't written as asked.

    ``"tags"``: there is one ``<answer>`` and one ``</answer>``, and nothing after it. ``"whole"``: all of it, without
    the white space around it.

    Raises:
        ValueError: another form.
    """
    if form not in ANSWER_FORMS[1:]:
        raise ValueError(f"form must be {' or '.join(ANSWER_FORMS[1:])}, got {form!r}")
    text = completion.strip()
    if form == "whole":
        return text
    if text.count(OPEN) != 1 or text.count(CLOSE) != 1 or not text.endswith(CLOSE):
        return None
    return text.partition(OPEN)[2].removesuffix(CLOSE).strip()


def score(
    completion: str, *, task: str, answer: Any, answer_form: str, threshold: float = 1.0, entry: Any = None,
    **_: Any,
) -> float:  # fmt: skip
    """The reward of a task: 1 for a right answer, written as asked, and 0 for any other.

    The answer is parsed before it is scored, and right from ``threshold`` on: several of reasoning-gym's scorers pay
    something for any text in which the answer occurs.
    """
    found = parse_answer(completion, answer_form)
    if found is None:
        return 0.0
    if task.startswith(GYM):
        return float(_scorer(task.removeprefix(GYM))(found, entry) >= threshold)
    return float(found == str(answer).strip())


@lru_cache
def _scorer(name: str) -> Callable[[str, Any], float]:
    return _gym().get_score_answer_fn(name)


def _gym() -> Any:
    try:
        from reasoning_gym import factory
    except ImportError:
        raise ImportError(f"a task {GYM}NAME needs the reasoning-gym package: pip install reasoning-gym") from None
    return factory
