"""Training: one compiled step over packed batches, with exact resume."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jaxtyping import Int, UInt32
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from heddle.attention.arrays import Array
from heddle.data.packing import prepared
from heddle.metrics import MetricsFile, Record
from heddle.options import TrainingOptions
from heddle.run import Stop, due, stop_on_signals

from .flops import peak_flops, training_flops
from .optimizer import make_optimizer, make_schedule
from .parallel import Layout, shardings, to_mesh

#: ``objective(model, batch, rng)`` returns the sum of the batch's losses (float32), the number of tokens it is over,
#: and further sums to log, divided by the same number. A batch's loss is the one sum over the other, whatever parts it
#: is computed in, so each token weighs the same. ``rng`` holds a key for each row, the same in whatever part it comes.
Objective = Callable[[Any, Any, Array], tuple[Array, Array, dict[str, Array]]]

Variables = Any  #: an nnx.State


@runtime_checkable
class Source(Protocol):
    """Where batches come from: a :class:`heddle.data.packing.Packer`, or rollouts."""

    rows: int  #: of a batch
    row_len: int  #: tokens of a row

    def state(self) -> Any:
        """Where it stands, as JSON has it."""
        ...

    def restore(self, state: Any) -> None:
        """Stand where :meth:`state` said."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a run consists of at one moment; what a checkpoint holds, and what resuming needs.

    Args:
        step: int32, how many steps are done.
        model: the model's variables, parameters in float32.
        optimizer: optax's state.
        rng: the data of the run's random key; each step's key is folded from it.
        nonfinite: int32, how many of the last steps in a row were skipped.
        average: the trained parameters' exponential moving average; None: none is kept.
        reference: trained parameters that an objective holds the model's against; None: there are none.
        data: where the next batch begins (:meth:`heddle.data.packing.Packer.state`); None inside the compiled step.
    """

    step: Int[Array, ""]
    model: Variables
    optimizer: optax.OptState
    rng: UInt32[Array, ...]
    nonfinite: Int[Array, ""]
    average: Variables | None = None
    reference: Variables | None = None
    data: Any = None


class Trainer:
    """Trains a model's parameters on packed batches.

    A run lives in a folder: ``metrics.jsonl``, a record each step, and ``checkpoints/``. :meth:`fit` goes on from the
    latest checkpoint there, with exactly the losses that the uninterrupted run has (bit for bit on the same machine).
    Gradients are summed over the parts of a batch and divided by its number of tokens at the end, clipped by global
    norm, and applied to float32 parameters; a step whose loss or gradient isn't finite changes nothing.

    A model that is spread over a mesh (``model.mesh``) is trained there: its optimiser's state lies as it does, rows
    are dealt over ``data`` and ``fsdp``, their tokens over ``context``. A run may go on on another mesh. Of several
    processes each has all of ``data`` and takes its part, and the first alone writes metrics and reports.

    Args:
        model: an ``nnx`` module. It is trained in place: its arrays belong to the trainer while it fits.
        objective: see :data:`Objective`; :func:`heddle.jax.lm.lm` for language modelling.
        data: batches of ``options.batch_size`` rows.
        options: how to train.
        output: the run's folder.
        evaluation: batches to evaluate on every ``options.eval_every`` steps.
        trainable: an ``nnx`` filter, the parameters that are trained; the others stay as they are, and take neither a
            gradient nor optimiser state.
        eval_objective: what to evaluate by; None: ``objective``.

    Raises:
        ValueError: ``data`` whose batches aren't of ``options.batch_size`` rows; a part of a batch, or rows, that the
            devices can't share equally.
    """

    prepares_ahead = True  #: whether a batch can be made before the step before it is done
    _began = 0.0  # where making a batch is work of its own, when that was done

    def __init__(
        self,
        model: Any,
        objective: Objective,
        data: Source,
        options: TrainingOptions,
        output: str | Path,
        evaluation: Sequence[Any] = (),
        trainable: Any = nnx.Param,
        eval_objective: Objective | None = None,
    ):
        if data.rows != options.batch_size:
            raise ValueError(f"data must come in batches of {options.batch_size} rows, got {data.rows}")
        self._mesh = getattr(model, "mesh", None)
        Layout(self._mesh).check(options.batch_size // options.accumulation, data.row_len)
        self.model, self.options, self.output = model, options, Path(output)
        self.stopped_by: signal.Signals | None = None  #: the signal that ended the last fit early
        self._objective, self._data, self._evaluation, self._trainable = objective, data, evaluation, trainable
        self._schedule, self._optimizer = make_schedule(options), make_optimizer(options)
        self._flops, self._peak = training_flops(model, trainable), math.nan
        self._graph, variables = nnx.split(model)
        variables = jax.tree.map(_master, variables)
        params = nnx.filter_state(variables, trainable)
        self.state = TrainState(
            step=self._everywhere(np.int32(0)),
            model=variables,
            optimizer=self._new_optimizer(params),
            rng=self._everywhere(np.asarray(jax.random.key_data(jax.random.key(options.seed)))),
            nonfinite=self._everywhere(np.int32(0)),
            average=None if options.ema_decay is None else jax.tree.map(jnp.copy, params),
            data=data.state(),
        )
        self._evaluate = jax.jit(partial(self._loss, eval_objective or objective))

    def _everywhere(self, x: Any) -> Array:
        return jnp.asarray(to_mesh(np.asarray(x), self._mesh))

    def _new_optimizer(self, params: Variables) -> optax.OptState:
        init = self._optimizer.init
        if self._mesh is None:
            return init(params)
        return jax.jit(init, out_shardings=shardings(jax.eval_shape(init, params), self._mesh))(params)

    def _placed(self, batch: Any, *axes: str | None) -> Any:
        return jax.tree.map(lambda field: to_mesh(np.asarray(field), self._mesh, *axes), batch)

    def fit(self, report: Callable[[Record], object] = lambda record: None) -> TrainState:
        """Train up to ``options.max_steps``, from the latest checkpoint in the run's folder if there is one.

        SIGTERM and Ctrl-C end the step, save, and return (``stopped_by`` then says which); Ctrl-C then ends at once.

        Args:
            report: called with each record that goes into ``metrics.jsonl``.

        Raises:
            FloatingPointError: ``options.max_nonfinite`` steps in a row without a finite loss and gradient. The last
                batch is saved beside the metrics.
            ValueError: checkpoints of another model or optimiser.
        """
        self.stopped_by = None
        # Signals are noted until the last checkpoint is whole: a second SIGTERM must not end its writing.
        with stop_on_signals() as stop, closing(self._checkpoints()) as checkpoints:
            self._restore(checkpoints)
            done = int(self.state.step)
            try:
                if done < self.options.max_steps:
                    with ExitStack() as stack:
                        metrics = None  # of other processes than the first
                        if not jax.process_index():
                            metrics = stack.enter_context(closing(MetricsFile(self.output / "metrics.jsonl", done)))
                        self._run(checkpoints, metrics, report, stop)
            finally:
                nnx.update(self.model, self.state.model)
        return self.state

    def evaluate(self) -> Record:
        """The mean loss over the tokens of the evaluation batches, and whatever else the objective measures.

        Where an average of the weights is kept, also its loss, ``eval_average_loss``.
        """
        key = jax.random.wrap_key_data(self.state.rng)
        measured = {"": self.state.model} | ({} if self.state.average is None else {"average_": self._averaged()})
        record = {}
        for whose, variables in measured.items():
            placed = (self._placed(batch, "batch", "seq") for batch in self._evaluation)
            sums = [self._evaluate(variables, batch, jax.random.split(key, len(batch.tokens))) for batch in placed]
            means = _means(jax.tree.map(lambda *parts: sum(parts), *sums))
            record |= {f"eval_{whose}{name}": value.item() for name, value in means.items()}
        record.pop("eval_average_tokens", None)
        return record

    def averaged(self) -> Any:
        """The model with the average of its weights.

        Raises:
            ValueError: no ``options.ema_decay``, so that none is kept.
        """
        if self.state.average is None:
            raise ValueError("training.ema_decay must be given for an average of the weights to be kept, got None")
        return nnx.merge(self._graph, jax.tree.map(lambda x: x, self._averaged()))  # its own variables

    def best(self) -> tuple[Any, int]:
        """The model of the checkpoint that did best on held-out data, and its step.

        Raises:
            ValueError: no ``options.keep_best``, so that none is kept; no such checkpoint yet.
        """
        if not self.options.keep_best:
            raise ValueError("training.keep_best must be true for the best checkpoint to be kept, got False")
        with closing(self._checkpoints()) as checkpoints:
            step = checkpoints.best_step()
            if step is None:
                raise ValueError(f"{self.output} must hold a checkpoint that was evaluated, got none")
            return nnx.merge(self._graph, self._read(checkpoints, step).model), step

    def _averaged(self) -> Variables:
        others = nnx.split_state(self.state.model, self._trainable, ...)[1]
        return nnx.merge_state(self.state.average or {}, others)

    def _batches(self) -> Generator[tuple[Any, Any, bool]]:
        """What to train on from here on; with each batch where the data stand after it, and whether it is the last."""
        return prepared(self._data)

    def _run(self, checkpoints, metrics: MetricsFile | None, report: Callable[[Record], object], stop: Stop) -> None:
        options, done, compiled = self.options, int(self.state.step), None
        self._data.restore(self.state.data)

        def write(record: Record) -> None:
            if metrics is not None:
                metrics.write(record)
                report(record)

        def save(evaluated: Record) -> None:
            if metrics is not None:
                metrics.sync()
            self._save(checkpoints, evaluated)

        if options.eval_first and not done and len(self._evaluation):
            write({"step": 0, **self.evaluate()})
        with closing(self._batches()) as batches:
            since = time.perf_counter()
            running = None  # the step that the device works at while the host prepares the next
            for step, (batch, after, last) in zip(range(done + 1, options.max_steps + 1), batches, strict=False):
                parts = jax.tree.map(lambda x: x.reshape(options.accumulation, -1, *x.shape[1:]), batch)
                parts = self._placed(parts, None, "batch", "seq")
                arrays = replace(self.state, data=None)
                if compiled is None:  # ahead of time, so that the first step's tokens/s is true too
                    made = time.perf_counter()
                    compiled = self._compile(arrays, parts)
                    if self._flops is not None:
                        self._peak = peak_flops(self.model.dtype, self._mesh)
                    now = time.perf_counter()
                    # What isn't made ahead counts: a rollout is a part of its step.
                    since, self._began = now if self.prepares_ahead else since + now - made, now
                arrays, measured = compiled(arrays, parts)
                self.state = replace(arrays, data=after)
                if running is not None:
                    since = self._finish(*running, since, write)
                running = step, batch, measured
                if not self.prepares_ahead:
                    since, running = self._finish(*running, since, write), None

                stopped, ended = _agreed(stop.signal), last or step == options.max_steps
                evaluates = len(self._evaluation) and due(step, options.eval_every, ended)
                saves = ended or stopped is not None or due(step, options.checkpoint_every)
                if evaluates or saves:
                    if running is not None:
                        self._finish(*running, since, write)
                        running = None
                    evaluated = self.evaluate() if evaluates else {}
                    if evaluates:
                        write({"step": step, **evaluated})
                    if saves:
                        save(evaluated)
                    since = time.perf_counter()
                if stopped is not None:
                    self.stopped_by = None if ended else stopped
                    return

    def _finish(self, step: int, batch: Any, measured: dict[str, Array], since: float, write) -> float:
        """Wait until the device has done ``step``, and record it; returns when that was."""
        record = {name: value.item() for name, value in jax.device_get(measured).items()}
        now, nonfinite = time.perf_counter(), record.pop("nonfinite")
        rates = {"tokens_per_second": record["tokens"] / (now - since), "seconds": now - since}
        if self._flops is not None:
            rates["mfu"] = self._flops(batch.segment_ids, record["tokens"])
            rates["mfu"] /= self._peak * (now - max(since, self._began))
        first = {"step": step, "loss": record["loss"], "tokens": record["tokens"]}  # what a reader looks for
        write(first | record | ({"skipped": True} if nonfinite else {}) | rates)
        if nonfinite >= self.options.max_nonfinite:
            path = self.output / f"nonfinite-{step}.npz"
            if not jax.process_index():
                np.savez(path, **{k: v for k, v in batch._asdict().items() if v is not None})
            raise FloatingPointError(
                f"{nonfinite} steps in a row had no finite loss and gradient, the last one step {step}; "
                f"its batch is in {path}"
            )
        return now

    # ------------------------------------------------------------------ on the device

    def _compile(self, arrays: TrainState, parts: Any) -> jax.stages.Compiled:
        where = [x.sharding for x in jax.tree.leaves(arrays)]

        def step(arrays: TrainState, parts: Any) -> tuple[TrainState, dict[str, Array]]:
            state, measured = self._step(arrays, parts)
            if self._mesh is not None:  # what comes out lies where it lay
                leaves, structure = jax.tree.flatten(state)
                leaves = [jax.lax.with_sharding_constraint(*pair) for pair in zip(leaves, where, strict=True)]
                state = jax.tree.unflatten(structure, leaves)
            return state, measured

        return jax.jit(step, donate_argnums=0).lower(arrays, parts).compile()

    def _loss(
        self, objective: Objective, variables: Variables, batch: Any, key: Array
    ) -> tuple[Array, tuple[Array, dict[str, Array]]]:
        total, tokens, metrics = objective(nnx.merge(self._graph, variables), batch, key)
        return total, (tokens, metrics)

    def _step(self, state: TrainState, parts: Any) -> tuple[TrainState, dict[str, Array]]:
        """One step over the ``parts`` of a batch, each field ``(accumulation, rows, row_len)``."""
        params, others = nnx.split_state(state.model, self._trainable, ...)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)

        def loss(params, *inputs):
            return self._loss(self._objective, nnx.merge_state(params, others), *inputs)

        def part(inputs):
            return jax.value_and_grad(loss, has_aux=True)(params, *inputs)

        def accumulate(sums, inputs):
            return jax.tree.map(jnp.add, sums, part(inputs)), None

        count, rows = jax.tree.leaves(parts)[0].shape[:2]
        inputs = (parts, jax.random.split(key, (count, rows)))
        first = jax.tree.map(lambda x: x[0], inputs)
        if count == 1:
            sums, gradient = part(first)
        else:
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part, first))
            (sums, gradient), _ = jax.lax.scan(accumulate, zeros, inputs)

        record = _means(sums)
        gradient = jax.tree.map(lambda g: g / jnp.maximum(record["tokens"], 1), gradient)
        norm, rate = optax.tree.norm(gradient), self._schedule(state.step)
        updates, optimizer = self._optimizer.update(gradient, state.optimizer, params)
        updated = jax.tree.map(lambda p, u: p + rate * u, params, updates)
        finite = jnp.isfinite(record["loss"]) & jnp.isfinite(norm)
        params, optimizer = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (updated, optimizer), (params, state.optimizer)
        )
        nonfinite, average = jnp.where(finite, 0, state.nonfinite + 1), state.average
        if average is not None and (decay := self.options.ema_decay) is not None:
            # Less at first, so that the start is soon forgotten.
            keep = jnp.minimum(decay, (1 + state.step) / (10 + state.step))
            average = jax.tree.map(lambda a, p: jnp.where(finite, keep * a + (1 - keep) * p, a), average, params)
        state = replace(
            state, step=state.step + 1, model=nnx.merge_state(params, others), optimizer=optimizer,
            nonfinite=nonfinite, average=average,
        )  # fmt: skip
        return state, record | {"gradient_norm": norm, "learning_rate": rate, "nonfinite": nonfinite}

    # ------------------------------------------------------------------ on disk

    def _checkpoints(self) -> ocp.CheckpointManager:
        """Asynchronous, and atomic: a checkpoint is written beside and renamed when it is whole."""
        kept: list[Any] = [LatestN(n=self.options.keep)]
        if best := self.options.keep_best:
            kept.append(BestN(get_metric_fn=_held_out, reverse=True, n=1, keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(kept), best_fn=_held_out if best else None, best_mode="min",
            cleanup_tmp_directories=True,
        )  # fmt: skip
        return ocp.CheckpointManager((self.output / "checkpoints").resolve(), options=options)

    def _save(self, checkpoints: ocp.CheckpointManager, evaluated: Record) -> None:
        arrays = _named(self._learned())
        shapes = {name: list(array.shape) for name, array in arrays.items()}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays), data=ocp.args.JsonSave({"data": self.state.data, "shapes": shapes})
        )
        checkpoints.save(int(self.state.step), args=items, metrics=evaluated or None)

    def _restore(self, checkpoints: ocp.CheckpointManager) -> None:
        step = checkpoints.latest_step()
        if step is not None:
            self.state = self._read(checkpoints, step)

    def _read(self, checkpoints: ocp.CheckpointManager, step: int) -> TrainState:
        arrays = self._learned()
        here = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in _named(arrays).items()}
        saved = checkpoints.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"]
        for name in sorted({*saved["shapes"], *here}):
            there, wanted = saved["shapes"].get(name), list(here[name].shape) if name in here else None
            if there != wanted:
                raise ValueError(
                    f"{self.output} holds a checkpoint of another model or optimiser: "
                    f"{name} has shape {there} there and {wanted} here"
                )
        restored = checkpoints.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(here)))["state"]
        state = jax.tree.unflatten(jax.tree.structure(arrays), [restored[name] for name in here])
        others = nnx.split_state(self.state.model, self._trainable, ...)[1]
        return replace(state, model=nnx.merge_state(state.model, others), data=saved["data"])

    def _learned(self) -> TrainState:
        """What a checkpoint holds: of the model what is trained, since the rest stays as it began."""
        return replace(self.state, data=None, model=nnx.filter_state(self.state.model, self._trainable))


def _agreed(signal_: signal.Signals | None) -> signal.Signals | None:
    """The signal that has come, to whichever process: all stop after the same step."""
    if jax.process_count() == 1:
        return signal_
    from jax.experimental.multihost_utils import process_allgather

    latest = int(process_allgather(np.int32(signal_ or 0)).max())
    return signal.Signals(latest) if latest else None


def _means(sums: tuple[Array, tuple[Array, dict[str, Array]]]) -> dict[str, Array]:
    """What :meth:`Trainer._loss` summed, by token; and the number of tokens."""
    total, (tokens, metrics) = sums
    count = jnp.maximum(tokens, 1)
    return {"loss": total / count, "tokens": tokens} | {name: value / count for name, value in metrics.items()}


def _held_out(measured: Record) -> float:
    """A checkpoint's rank: the lower the better."""
    rank = measured["eval_loss"] if "eval_loss" in measured else -measured["eval_reward"]
    return rank if math.isfinite(rank) else math.inf


def _master(x: Array) -> Array:
    """Parameters are kept in float32, whatever they are computed in."""
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their path, so that a checkpoint depends on names alone, not on classes."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
