"""A training run that can be made to stop for ever at a chosen place, so that it is killed there.

Not collected by name: test_processes.py runs it, once a process, with the options of ``heddle train``. ``HOLD`` names
the place, which of the processes stops there, and the file that this one makes when it does.
"""

import os
import sys
import time
from pathlib import Path

PLACE, STEP, PROCESS, FILE = (os.environ.get("HOLD") or "nowhere,0,0,").split(",")


def hold_at(place: str, step: int) -> None:
    import jax

    if (place, step, jax.process_index()) == (PLACE, int(STEP), int(PROCESS)):
        Path(FILE).touch()
        time.sleep(3600)


def main(*options: str) -> None:
    from orbax.checkpoint import type_handlers

    from heddle.config import load_config
    from heddle.jax.grpo_rollouts import Rollouts
    from heddle.jax.run import run
    from heddle.jax.train import Trainer

    save, placed, reward, serialize = (
        Trainer._save, Trainer._placed, Rollouts._reward, type_handlers.ArrayHandler.serialize
    )  # fmt: skip
    at = {"saved": 0, "batches": 0}

    def saved(self, *arguments):
        at["saved"] = int(self.state.step)
        save(self, *arguments)

    def written(self, *arguments):
        hold_at("write", at["saved"])
        return serialize(self, *arguments)

    def evaluated(self, batch, *axes):
        if axes[0] == "batch":  # of an evaluation, whose second batch this may be
            at["batches"] += 1
            if at["batches"] % 2 == 0:
                hold_at("evaluation", int(self.state.step))
        return placed(self, batch, *axes)

    def rewarded(self, *arguments):
        hold_at("rollout", self._count)
        return reward(self, *arguments)

    Trainer._save, Trainer._placed, Rollouts._reward = saved, evaluated, rewarded
    type_handlers.ArrayHandler.serialize = written

    def report(record):
        if "loss" in record:
            hold_at("step", record["step"])

    run(load_config(None, list(options)), report)


if __name__ == "__main__":
    main(*sys.argv[1:])
