"""The processes that one ``srun`` starts, one run in either wing: how many, which this is, and where they meet."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

#: Ports above those that Linux hands out itself.
_FIRST_PORT, _PORTS = 61440, 4096


@dataclass(frozen=True)
class Step:
    """A step of a Slurm job with several tasks, as one of them sees it.

    Args:
        processes: how many tasks it has.
        process: which of them this is.
        here: how many of them run on this host.
        local: which of those this is.
        address: ``host:port`` of the first, the same in all of them; the port follows from the numbers of job and step.
    """

    processes: int
    process: int
    here: int
    local: int
    address: str


def step() -> Step | None:
    """The step that this process is a task of, by Slurm's environment; None: there is none, or no other task in it."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return None
    number = {name: int(os.environ[f"SLURM_{name}"]) for name in ("JOB_ID", "STEP_ID", "PROCID", "LOCALID", "NODEID")}
    port = _FIRST_PORT + (8 * number["JOB_ID"] + number["STEP_ID"]) % _PORTS
    return Step(
        processes=int(os.environ["SLURM_STEP_NUM_TASKS"]),
        process=number["PROCID"],
        here=_tasks(os.environ["SLURM_STEP_TASKS_PER_NODE"])[number["NODEID"]],
        local=number["LOCALID"],
        address=f"{_first_host(os.environ['SLURM_STEP_NODELIST'])}:{port}",
    )


def _tasks(text: str) -> list[int]:
    """Of each host, out of ``2(x3),1``."""
    return [int(n) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(times or 1))]


def _first_host(text: str) -> str:
    """Out of ``rack1node[007,9-12],other``; Slurm numbers tasks in this order."""
    first = re.match(r"(?:\[[^]]*\]|[^\[,])+", text)
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", first.group() if first else text)
