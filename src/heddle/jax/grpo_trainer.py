"""Training by GRPO: the trainer's loop over rollouts that the current weights sample."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from heddle.attention.arrays import Array
from heddle.data.tasks import Problem
from heddle.metrics import Record
from heddle.options import GRPOOptions, TrainingOptions

from .grpo import RolloutBatch, completion_log_probabilities, grpo
from .grpo_rollouts import Rollouts
from .parallel import to_host
from .train import Trainer, TrainState


class GRPOTrainer(Trainer):
    """A :class:`Trainer` whose batches are rollouts of its own model, with a frozen or moving reference.

    A rollout serves ``grpo_options.num_iterations`` steps. In the middle of one a checkpoint holds it too, so that a
    run goes on exactly from anywhere. The reference is kept of what is trained alone: of adapters it is the base model.

    Args:
        model: as of :class:`Trainer`. On a mesh completions are sampled by whole copies of the model, each on the
            devices along ``tensor``, and of several processes by each its share.
        rollouts: where batches come from.
        options: how to train.
        output: the run's folder.
        grpo_options: of the objective.
        evaluation: held-out problems, whose mean reward is ``eval_reward``.
        trainable: as of :class:`Trainer`.
    """

    prepares_ahead = False  # the next batch is sampled by the weights of the step before it

    def __init__(
        self,
        model: Any,
        rollouts: Rollouts,
        options: TrainingOptions,
        output: str | Path,
        grpo_options: GRPOOptions,
        evaluation: Sequence[Problem] = (),
        trainable: Any = nnx.Param,
    ):
        super().__init__(
            model, grpo(grpo_options), rollouts, options, output, evaluation, trainable=trainable
        )  # fmt: skip
        self._grpo, self._rollouts = grpo_options, rollouts
        if grpo_options.beta:
            reference = jax.tree.map(jnp.copy, nnx.filter_state(self.state.model, trainable))
            self.state = replace(self.state, reference=reference)
        self._measured_on_host: Record = {}
        self._log_probabilities = jax.jit(self._of_batch)

    def fit(self, report: Callable[[Record], None] = lambda record: None) -> TrainState:
        """As :meth:`Trainer.fit`; ends the processes that compute rewards."""
        try:
            return super().fit(report)
        finally:
            self._rollouts.rewards.close()

    def evaluate(self) -> Record:
        """The mean reward of the held-out problems; where an average of the weights is kept, its own too."""
        problems, record = self._evaluation, self._rollouts.evaluate(self._policy(self.state.model), self._evaluation)
        if self.state.average is not None:
            of_average = self._rollouts.evaluate(self._policy(self._averaged()), problems)
            record["eval_average_reward"] = of_average["eval_reward"]
        return record

    def _policy(self, variables: Any) -> Any:
        return nnx.merge(self._graph, jax.tree.map(lambda x: x, variables))  # its own variables

    def _batches(self) -> Generator[tuple[RolloutBatch, Any, bool]]:
        batch, used = self._resumed_rollout()
        while True:
            self._measured_on_host = {}
            if batch is None:
                rollout = self._rollouts.roll(self._policy(self.state.model))
                batch, self._measured_on_host = rollout
                batch, used = self._with_log_probabilities(batch), 0
            used += 1
            now, after = batch, self._rollouts.state()
            if used == self._grpo.num_iterations:
                batch = None
            else:
                after |= {"used": used, "rollout": _packed(batch)}
            self._began = time.perf_counter()  # MFU is that of the update alone
            yield now, after, False

    def _resumed_rollout(self) -> tuple[RolloutBatch | None, int]:
        state = self.state.data
        return (_unpacked(state["rollout"]), state["used"]) if "rollout" in state else (None, 0)

    def _with_log_probabilities(self, batch: RolloutBatch) -> RolloutBatch:
        """The batch with what stays as it is over all steps on it."""
        others = nnx.split_state(self.state.model, self._trainable, ...)[1]
        if self._grpo.num_iterations > 1:
            batch = batch._replace(old=self._by_parts(self.state.model, batch))
        if self.state.reference is not None:
            batch = batch._replace(reference=self._by_parts(nnx.merge_state(self.state.reference, others), batch))
        return batch

    def _by_parts(self, variables: Any, batch: RolloutBatch) -> np.ndarray:
        rows = self.options.batch_size // self.options.accumulation
        bare = batch._replace(old=None, reference=None, sampled=None)  # one program for both
        parts = [jax.tree.map(itemgetter(slice(at, at + rows)), bare) for at in range(0, len(batch.tokens), rows)]
        placed = (self._placed(part, "batch", "seq") for part in parts)
        return np.concatenate([to_host(self._log_probabilities(variables, part)) for part in placed])

    def _of_batch(self, variables: Any, batch: RolloutBatch) -> Array:
        model = nnx.merge(self._graph, variables)
        return completion_log_probabilities(model, batch, self._grpo.temperature)[0]

    def _finish(self, step: int, batch: Any, measured: dict[str, Array], since: float, write: Any) -> float:
        host = {name: np.asarray(value) for name, value in self._measured_on_host.items()}
        return super()._finish(step, batch, measured | host, since, write)

    def _step(self, state: TrainState, parts: Any) -> tuple[TrainState, dict[str, Array]]:
        options, step = self._grpo, state.step + 1
        state, measured = super()._step(state, parts)
        if state.reference is not None and options.reference_every:
            mix = jnp.where(step % options.reference_every == 0, options.reference_mix, 0.0)
            params = nnx.filter_state(state.model, self._trainable)
            moved = jax.tree.map(lambda r, p: (1 - mix) * r + mix * p, state.reference, params)
            state = replace(state, reference=moved)
        return state, measured

    def _learned(self) -> TrainState:
        state = super()._learned()
        return state if self._grpo.reference_every else replace(state, reference=None)

    def _restore(self, checkpoints: Any) -> None:
        reference = self.state.reference  # where it never moves it is what the run began with
        super()._restore(checkpoints)
        if not self._grpo.reference_every:
            self.state = replace(self.state, reference=reference)


def _packed(batch: RolloutBatch) -> str:
    """As text, bit for bit."""
    file = io.BytesIO()
    np.savez_compressed(file, **{name: field for name, field in batch._asdict().items() if field is not None})
    return base64.b64encode(file.getvalue()).decode()


def _unpacked(text: str) -> RolloutBatch:
    with np.load(io.BytesIO(base64.b64decode(text))) as arrays:
        return RolloutBatch(**{name: arrays[name] for name in arrays.files})
