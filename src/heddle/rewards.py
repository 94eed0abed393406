"""Rewards: plain Python functions, run in processes that may fail, hang or die without harm to the training."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

log = logging.getLogger(__name__)

#: ``reward(prompt=..., completion=..., **fields)``, all as keywords, where the fields are what the task says of its
#: problem, such as ``answer``. Returns a number, or None where it doesn't apply.
Reward = Callable[..., "float | None"]

TASK = "task"  #: names the task's own score
_TASK_SCORE = "heddle.data.asking:score"
GROUP = "heddle.rewards"  #: of the entry points by which packages offer rewards
_STARTING = 60.0  #: seconds that a process may take to start


class RewardPool:
    """Functions that reward completions, computed by processes.

    What a function doesn't answer with a finite number doesn't apply to that completion, which is NaN. That is so too
    where it raises, takes longer than ``timeout`` (its process is killed) or takes its process down; such a case is
    logged, with its prompt and completion. A context manager; :meth:`close` ends the processes.

    Args:
        rewards: functions that pickle by their name, or names as of :func:`find_reward`.
        weights: of each in the sum; None: 1.
        workers: processes.
        timeout: seconds for one reward of one completion.

    Raises:
        ValueError: no rewards, a name that stands for no function, weights that aren't one each.
    """

    def __init__(
        self,
        rewards: Sequence[Reward | str],
        weights: Sequence[float] | None = None,
        *,
        workers: int = 2,
        timeout: float = 10.0,
    ):
        if not rewards:
            raise ValueError("rewards must name at least one function, got none")
        if weights is not None and len(weights) != len(rewards):
            raise ValueError(f"weights must be one for each of {len(rewards)} rewards, got {len(weights)}")
        for name, value in (("workers", workers), ("timeout", timeout)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        self.functions = [find_reward(reward) if isinstance(reward, str) else reward for reward in rewards]
        self.names = [_name(reward) for reward in rewards]  #: what each is called in metrics
        self.weights = np.ones(len(rewards)) if weights is None else np.asarray(weights, np.float64)
        self.failures = 0  #: rewards that were raised, cut off or died over
        self._timeout, self._size = timeout, workers
        self._workers: list[_Worker] = []

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], fields: Sequence[Mapping[str, Any]]
    ) -> Float[np.ndarray, "samples rewards"]:
        """Every reward of every completion, NaN where it doesn't apply.

        Args:
            prompts: of each completion.
            completions: their texts.
            fields: what else each reward of a completion is told.
        """
        out = np.full((len(completions), len(self.functions)), np.nan)
        left = deque((sample, which) for sample in range(len(completions)) for which in range(len(self.functions)))
        samples = [
            {**each, "prompt": prompt, "completion": completion}
            for prompt, completion, each in zip(prompts, completions, fields, strict=True)
        ]

        def failed(job: tuple[int, int], why: str) -> None:
            sample, which = job
            self.failures += 1
            log.warning(
                "reward %s doesn't apply to sample %d: it %s (prompt %r, completion %r)",
                self.names[which], sample, why, prompts[sample], completions[sample],
            )  # fmt: skip

        while left or any(worker.job is not None for worker in self._workers):
            self._workers = [worker for worker in self._workers if worker.alive]
            while len(self._workers) < min(self._size, len(left) + len(self._workers)):
                self._workers.append(_Worker(self.functions))
            for worker in self._workers:
                if worker.ready and worker.job is None and left:
                    worker.begin(left.popleft(), samples, self._timeout)
            deadlines = [worker.deadline for worker in self._workers if not worker.idle]
            wait = max(0.0, min(deadlines, default=time.monotonic()) - time.monotonic())
            told = multiprocessing.connection.wait([worker.pipe for worker in self._workers], wait)
            for worker in self._workers:
                if worker.pipe in told:
                    job, (value, error) = worker.receive()
                    if job is not None and error is None:
                        out[job] = value
                    elif job is not None and error is not None:
                        failed(job, error)
                elif not worker.idle and time.monotonic() >= worker.deadline:
                    job, starting = worker.kill(), not worker.ready
                    if starting or job is None:
                        raise RuntimeError(f"a process for rewards didn't start within {_STARTING:g} s")
                    failed(job, f"took longer than {self._timeout:g} s")
        return out

    def total(self, rewards: Float[np.ndarray, "samples rewards"]) -> Float[np.ndarray, " samples"]:
        """The weighted sum of the rewards that apply to each completion; NaN where none does."""
        applies = ~np.isnan(rewards)
        return np.where(applies.any(axis=1), np.where(applies, rewards * self.weights, 0.0).sum(axis=1), np.nan)

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def find_reward(name: str) -> Reward:
    """The function of a name: ``"module:function"``, of a module that is installed or stands in the working directory;
    the name of an entry point of the group ``heddle.rewards``, of a package that is installed; or ``"task"``, the score
    of the task itself, :func:`heddle.data.asking.score`.

    Raises:
        ValueError: there is none.
    """
    value = _TASK_SCORE if name == TASK else name
    for entry_point in importlib.metadata.entry_points(group=GROUP, name=value):
        value = f"{entry_point.module}:{entry_point.attr}"
    module, colon, function = value.partition(":")
    if not (module and colon and function):
        raise ValueError(f"a reward must be {TASK}, module:function or an entry point of {GROUP}, got {name!r}")
    # A console script hasn't it there. At the end, so that no file here hides a library; processes inherit the path.
    if not {"", os.getcwd()} & {*sys.path}:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {name} can't be found: {error}") from None
    if not callable(found):
        raise ValueError(f"reward {name} must be a function, got {type(found).__name__}")
    reward: Any = found
    return reward


def _name(reward: Reward | str) -> str:
    return reward.rpartition(":")[2] if isinstance(reward, str) else getattr(reward, "__name__", repr(reward))


@dataclass(eq=False)
class _Worker:
    """A process that computes one reward at a time."""

    functions: Sequence[Reward]
    job: tuple[int, int] | None = None
    ready: bool = False
    alive: bool = True

    def __post_init__(self):
        # A new interpreter: a fork of a process with XLA's threads may hang.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, list(self.functions)), daemon=True)
        self.process.start()
        theirs.close()
        self.deadline = time.monotonic() + _STARTING

    @property
    def idle(self) -> bool:
        """Whether nothing is awaited of it."""
        return self.ready and self.job is None

    def begin(self, job: tuple[int, int], samples: Sequence[Mapping[str, Any]], timeout: float) -> None:
        self.job, self.deadline = job, time.monotonic() + timeout
        with contextlib.suppress(OSError):  # it is gone, which receiving tells
            self.pipe.send((job[1], samples[job[0]]))

    def receive(self) -> tuple[tuple[int, int] | None, tuple[float, str | None]]:
        """The job that it has done, with the reward or what went wrong; no job: it has started."""
        try:
            told = self.pipe.recv()
        except (EOFError, OSError):
            if not self.ready:
                raise RuntimeError(f"a process for rewards ended as it started, with {self._code()}") from None
            job = self.kill()
            return job, (math.nan, f"ended its process, with {self._code()}")
        job, self.job, self.ready = self.job, None, True
        return job, told

    def kill(self) -> tuple[int, int] | None:
        """End the process; returns what it was at."""
        job, self.job, self.alive = self.job, None, False
        self.process.kill()
        self.process.join()
        self.pipe.close()
        return job

    def _code(self) -> str:
        self.process.join()
        return f"exit code {self.process.exitcode}"


def _work(pipe: Any, functions: list[Reward]) -> None:
    """What a process does: answers, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's, which saves first
    pipe.send((math.nan, None))
    while True:
        try:
            which, sample = pipe.recv()
        except EOFError:
            return
        pipe.send(_answer(functions[which], sample))


def _answer(function: Reward, sample: Mapping[str, Any]) -> tuple[float, str | None]:
    try:
        value = function(**sample)
        if value is None:
            return math.nan, None
        value = float(value)
    except Exception as error:  # whatever a reward does wrong is its sample's loss alone
        return math.nan, f"raised {type(error).__name__}: {error}"
    return (value, None) if math.isfinite(value) else (math.nan, f"returned {value}")
