"""Tasks whose answers can be verified, for reinforcement learning: prompts without end, and a score of their answers.

A task is ``largest``, the largest of some digits, which a model of bytes learns in minutes; ``reasoning-gym:NAME``, one
of that package's; or a file of prompts (JSONL, Parquet, ``hub:NAME``), records with ``prompt``, text or messages, and
whatever else rewards are told, such as ``answer`` (of Parquet that alone) and, for a curriculum, ``level``.
"""

from __future__ import annotations

import ast
import bisect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from heddle.options import GYM, LARGEST

from .chat import Message
from .corpora import is_held_out, open_records, report_broken

BUILTIN = f"{LARGEST}, {GYM}NAME"

_ENDLESS = 2**22  #: problems of a task of reasoning-gym, before they come again; some tasks list them all
EPOCH = 10_000  #: of those, what one time through is to who reads them as examples; of tasks that can't have more, all
_AT_ONCE = {"acre"}  #: tasks that make all their problems, slowly, before the first
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
        check: refuses a problem that can't be used, by a ValueError that says why in one clause.
        name: of the task, for what is said of a problem that is refused.
        on_error: what such a problem does: ``"fail"`` or ``"skip"``.
    """

    def __init__(
        self, task: Task, part: str, held_out: float, fields: Mapping[str, Any], *,
        check: Callable[[Problem], object] = lambda problem: None, name: str = "task", on_error: str = "fail",
    ):  # fmt: skip
        self.task, self.next = task, 0  #: the number of the next problem that is looked at
        self.skipped = 0  #: problems that were refused and passed over
        self._part, self._share, self._fields = part, held_out, fields
        self._check, self._name, self._on_error = check, name, on_error

    def take(self, level: int) -> Problem:
        """The next problem.

        Raises:
            ValueError: a problem that is refused, unless such are skipped; so many problems in a row are refused or
                belong to the other part that this one must be empty.
        """
        refused = ""
        for _ in range(_TRIES):
            number, problem = self.next, self.task.problem(self.next, level)
            self.next += 1
            if is_held_out(key_of(problem), self._share) != (self._part == "held_out"):
                continue
            try:
                self._check(problem)
            except ValueError as error:
                refused = str(error)
                report_broken(f"{self._name}:{number}", refused, self._on_error)
                self.skipped += 1
                continue
            return Problem(problem.prompt, {**problem.fields, **self._fields})
        if refused:
            raise ValueError(f"none of {_TRIES} problems of {self._name} of level {level} can be used: {refused}")
        raise ValueError(
            f"data.held_out={self._share} leaves none of {_TRIES} problems of level {level} "
            + ("to evaluate on: raise it" if self._part == "held_out" else "to train on: lower it")
        )


def key_of(problem: Problem) -> str:
    """By which problems are dealt to training and evaluation."""
    return json.dumps(problem.prompt, sort_keys=True, default=str)


def open_task(
    name: str, settings: Mapping[str, Any] | None = None, *, seed: int = 0, on_error: str = "fail",
    check: Callable[[Problem], object] = lambda problem: None,
) -> Task:  # fmt: skip
    """The task of this name.

    Args:
        name: ``"largest"``, ``"reasoning-gym:NAME"``, or a file, folder, pattern or ``"hub:NAME"`` of records, see
            :func:`heddle.data.corpora.open_corpus`.
        settings: of the task: ``digits`` of ``largest``; whatever the class of configuration of a reasoning-gym task
            has.
        seed: of the problems, and of the order of records.
        on_error: what a broken record does: ``"fail"`` or ``"skip"``.
        check: what makes a record a broken one too, see :class:`Stream`.

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
    reader = open_records(name, _TakeRecord(check), seed=None, on_error=on_error, builtin=BUILTIN)
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

    Its highest level, which is what is asked without a curriculum, is the task as ``settings`` have it. Below it are
    the steps of the package's own curriculum for the task, where it has one, that are no harder in any respect.

    Raises:
        ValueError: no such task, or settings that it hasn't.
        ImportError: the package isn't installed.
    """

    answer_form = "tags"

    def __init__(self, name: str, settings: Mapping[str, Any], seed: int = 0):
        self.name, self.settings = name, dict(settings)
        factory = gym()
        if name not in factory.DATASETS:
            raise ValueError(f"reasoning-gym has no task {name!r}; it has {', '.join(sorted(factory.DATASETS))}")
        # The package seeds a problem by the sum of seed and number: seeds side by side would share their problems.
        self._seed = int(np.random.SeedSequence([seed]).generate_state(1)[0]) % 2**31
        target = self._dataset(self.settings)
        self._levels = [*self._easier(vars(target.config)), self.settings]
        self.levels = len(self._levels)
        self._datasets: dict[int, Any] = {self.levels: target}

    def problem(self, index: int, level: int) -> Problem:
        """See :meth:`Task.problem`."""
        if level not in self._datasets:
            self._datasets[level] = self._dataset(self._levels[level - 1])
        entry = self._datasets[level][index % self._datasets[level].size]
        return Problem(entry["question"], {"task": GYM + self.name, "answer": entry["answer"], "entry": entry})

    def _dataset(self, settings: Mapping[str, Any]) -> Any:
        refused = None
        for size in (EPOCH,) if self.name in _AT_ONCE else (_ENDLESS, EPOCH):
            try:
                dataset = gym().create_dataset(self.name, seed=self._seed, size=size, **settings)
                dataset[0]
                return dataset
            except (TypeError, AssertionError, ValueError) as error:
                refused = error
        raise ValueError(f"reasoning-gym's {self.name} can't be set to {self.settings}: {refused}") from None

    def _easier(self, target: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The steps of the curriculum that come before the task of these settings, the easiest first."""
        if not gym().has_curriculum(self.name):
            return
        curriculum = gym().create_curriculum(self.name)
        harder = {}  # of each setting that makes the task harder, which way
        governed = set()  # what the curriculum sets; the rest is as the task has it
        for attribute in curriculum.attributes.values():
            fields = [getattr(attribute, f"{which}field_name", None) for which in ("", "lower_", "upper_")]
            governed.update(fields)
            if all(isinstance(value, (int, float)) for value in attribute.levels):
                harder[fields[0] or fields[2]] = np.sign(attribute.levels[-1] - attribute.levels[0])
        for step in range(max((len(a.levels) for a in curriculum.attributes.values()), default=0)):
            curriculum.set_global_level(step)
            there = vars(curriculum.generate_configuration())
            level = {**self.settings, **{name: value for name, value in there.items() if name in governed}}
            beyond = any(
                target[name] is not None and sign * there[name] > sign * target[name] for name, sign in harder.items()
            )
            if not beyond and any(value != target[name] for name, value in level.items()):
                yield level


class Records:
    """Prompts that stand in a file, shuffled anew for each time through. Their levels are numbered in their order."""

    answer_form = "whole"

    def __init__(self, records: Sequence[dict[str, Any]], seed: int = 0):
        self._seed, self._records = seed, sorted(records, key=lambda record: record["level"])
        own = [record["level"] for record in self._records]
        self._counts = [bisect.bisect(own, level) for level in sorted({*own})]  # of this level and those below
        self.levels = len(self._counts)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # of each level the last epoch's

    def problem(self, index: int, level: int) -> Problem:
        """See :meth:`Task.problem`: of this level or a lower one."""
        count = self._counts[level - 1]
        epoch, at = divmod(index, count)
        if level not in self._orders or self._orders[level][0] != epoch:
            self._orders[level] = epoch, np.random.default_rng([self._seed, epoch]).permutation(count)
        return _of_record(self._records[self._orders[level][1][at]])


def _of_record(record: dict[str, Any]) -> Problem:
    return Problem(record["prompt"], {"task": "records", **record})


@dataclass
class _TakeRecord:
    check: Callable[[Problem], object]
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
        record = {**record, "level": level}
        self.check(_of_record(record))
        return json.dumps(prompt, default=str), record


def answer_form_of(name: str) -> str:
    """:attr:`Task.answer_form` of the task of this name, before it is opened."""
    return ReasoningGym.answer_form if name.startswith(GYM) else Records.answer_form


def parse_settings(settings: Sequence[str] | None) -> dict[str, Any]:
    """``["min_terms=2", ...]`` as a mapping; values are Python's literals, or else text."""

    def value(text: str) -> Any:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return {"true": True, "false": False}.get(text, text)

    return {name: value(text) for name, _, text in (setting.partition("=") for setting in settings or ())}


def gym() -> Any:
    """The package's factory of tasks.

    Raises:
        ImportError: it isn't installed.
    """
    try:
        from reasoning_gym import factory
    except ImportError:
        raise ImportError(f"a task {GYM}NAME needs the reasoning-gym package: pip install reasoning-gym") from None
    return factory
