"""Training in PyTorch: a Hugging Face model on packed batches, on one process or sharded over many, with exact resume.

accelerate gives processes, devices and precision. The sharding is torch's own ``fully_shard`` (FSDP2), so
that CPUs have it too, and a checkpoint is a set of named tensors that any number of processes can go on from.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from signal import Signals
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from heddle import slurm
from heddle.data.packing import NO_TARGET, Batch, Packer, prepared
from heddle.metrics import MetricsFile, Record
from heddle.options import TrainingOptions
from heddle.run import Stop, due, stop_on_signals

from .flops import peak_flops, training_flops

IGNORED = -100  #: what torch's cross-entropy leaves out


def processes() -> PartialState:
    """The processes of this run, which torchrun, accelerate or ``srun`` started.

    Their group is set up at the first call.

    Raises:
        ValueError: torchrun knows of fewer processes than ``srun`` started tasks.
    """
    step = slurm.step()
    if step is not None:  # as torchrun would say it
        host, _, port = step.address.rpartition(":")
        for name, value in {
            "RANK": step.process, "WORLD_SIZE": step.processes, "LOCAL_RANK": step.local, "LOCAL_WORLD_SIZE": step.here,
            "MASTER_ADDR": host, "MASTER_PORT": port,
        }.items():  # fmt: skip
            os.environ.setdefault(name, str(value))
        if int(os.environ["WORLD_SIZE"]) < step.processes:
            raise ValueError(
                f"WORLD_SIZE must be at least the {step.processes} tasks that srun started, got "
                f"{os.environ['WORLD_SIZE']}: torchrun has to know of all of them, --nnodes={step.processes}"
            )
    return PartialState(cpu=not torch.accelerator.is_available())


def learning_rate(options: TrainingOptions, step: int) -> float:
    """The learning rate of a step, counted from 0: a linear warm-up, then what ``options.schedule`` says.

    ``cosine`` falls to ``final_share`` of the rate along half a cosine (arXiv 1608.03983, eq. 5, without restarts);
    ``wsd`` stays, and falls linearly to it over the last ``decay_share`` of all steps (arXiv 2404.06395, section 4).
    """
    peak, warm, final = options.learning_rate, options.warmup_steps, options.final_share
    if step < warm:
        return peak * (step + 1) / warm
    rest = options.max_steps - warm
    if options.schedule == "cosine":
        return peak * (final + (1 - final) * (1 + math.cos(math.pi * min(1, (step - warm) / rest))) / 2)
    decay = min(rest, round(options.decay_share * options.max_steps))
    if options.schedule == "wsd" and decay:
        return peak * (1 - (1 - final) * max(0, step - (options.max_steps - decay)) / decay)
    return peak


def make_optimizer(options: TrainingOptions, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW with its state all there from the start; weight matrices decay, norms and biases don't."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (options.beta1, options.beta2)
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=betas, eps=options.epsilon, fused=True)
    # As its first step would; now, so that a checkpoint has the same tensors at any step.
    for p in parameters:
        moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
    return optimizer


def recompute(model: Any) -> None:
    """Have a Hugging Face model compute each layer again in the backward pass, and keep its input alone."""
    names = "activation_checkpointing_enable", "gradient_checkpointing_enable"  # transformers' new and old one
    next(getattr(model, name) for name in names if hasattr(model, name))({"use_reentrant": False})


def shard(model: Any, bfloat16: bool, mesh: DeviceMesh | None = None) -> Any:
    """Spread each decoder layer, and the rest of the model, over the processes (FSDP2), in place; None: over all."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bfloat16 else MixedPrecisionPolicy()
    names = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in names:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def summed_loss(model: Any, tokens: Tensor, targets: Tensor, positions: Tensor, segment_ids: Tensor | None) -> Tensor:
    """The sum of the losses of packed rows, ``(rows, row_len)`` each, in float32."""
    labels = torch.where(targets == NO_TARGET, IGNORED, targets).long()
    output = model(
        input_ids=tokens.long(),
        position_ids=positions.long(),
        segment_ids=segment_ids,
        labels=labels,
        shift_labels=labels,  # targets are the next tokens already, across a document's cuts too
        num_items_in_batch=1,  # the sum, not a mean
        use_cache=False,
    )
    return output.loss


def clip(parameters: Iterable[nn.Parameter], most: float | None) -> Tensor:
    """Clip the gradients by their global norm, if there is a ``most``; returns what it was."""
    parameters = list(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if most is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm


class Trainer:
    """Trains the parameters of a causal language model that require gradients.

    A run lives in a folder: ``metrics.jsonl``, a record each step, and ``checkpoints/``. :meth:`fit` goes on from the
    latest checkpoint there, with exactly the losses that the uninterrupted run has. The loss of a batch is the sum over
    its targets by their number, so each token weighs the same, whatever parts and processes it is computed in; a step
    whose loss or gradient isn't finite changes nothing.

    With more than one process (torchrun, accelerate launch) each decoder layer and the rest of the model are sharded,
    and each process takes its rows of every batch.

    Args:
        model: a Hugging Face model that takes ``segment_ids`` (``attn_implementation="heddle"``), in float32. It is
            moved, sharded and trained in place.
        data: batches of ``options.batch_size`` rows, the same in every process.
        options: how to train.
        output: the run's folder.
        evaluation: batches to evaluate on every ``options.eval_every`` steps.

    Raises:
        ValueError: batches that the parts and processes can't share evenly.
    """

    def __init__(
        self,
        model: Any,
        data: Packer,
        options: TrainingOptions,
        output: str | Path,
        evaluation: Sequence[Batch] = (),
    ):
        if data.rows != options.batch_size:
            raise ValueError(f"data must come in batches of {options.batch_size} rows, got {data.rows}")
        self.options, self.output = options, Path(output)
        self.step, self.nonfinite = 0, 0  #: steps done; how many of the last in a row were skipped
        self.stopped_by: Signals | None = None  #: the signal that ended the last fit early
        self._data, self._evaluation, self._place = data, evaluation, data.state()
        bfloat16 = options.compute_dtype == "bfloat16"
        processes()  # before the Accelerator, which would take CPUs for one process each
        self.accelerator = Accelerator(mixed_precision="bf16" if bfloat16 else "no")
        self._processes = self.accelerator.num_processes
        if options.batch_size % (options.accumulation * self._processes):
            raise ValueError(
                f"training.batch_size must be a multiple of training.accumulation times the processes, "
                f"got {options.batch_size}, {options.accumulation} and {self._processes}"
            )
        if options.remat != "none":
            recompute(model)
        self._flops = training_flops(model)
        self._peak = peak_flops(self.accelerator.device, torch.bfloat16 if bfloat16 else torch.float32)
        model = model.to(self.accelerator.device)
        self.model = model if self._processes == 1 else shard(model, bfloat16)
        self._trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._optimizer = make_optimizer(options, self._trained.values())

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.accelerator.is_main_process

    def fit(self, report: Callable[[Record], object] = lambda record: None) -> Any:
        """Train up to ``options.max_steps``, from the latest checkpoint in the run's folder if there is one.

        SIGTERM and Ctrl-C end the step, save, and return (``stopped_by`` then says which); Ctrl-C then ends at once.

        Args:
            report: called with each record that goes into ``metrics.jsonl``, in the main process.

        Returns:
            The model.

        Raises:
            FloatingPointError: ``options.max_nonfinite`` steps in a row without a finite loss and gradient. The last
                batch is saved beside the metrics.
            ValueError: checkpoints of another model or optimiser.
        """
        self.stopped_by = None
        self._restore()
        if self.step < self.options.max_steps:
            self.output.mkdir(parents=True, exist_ok=True)
            metrics = MetricsFile(self.output / "metrics.jsonl", self.step) if self.is_main else None

            def write(record: Record) -> None:
                if metrics is not None:
                    metrics.write(record)
                    report(record)

            try:
                with stop_on_signals() as stop:
                    self._run(metrics, write, stop)
            finally:
                if metrics is not None:
                    metrics.close()
        return self.model

    def evaluate(self) -> Record:
        """The mean loss over the tokens of the evaluation batches."""
        self.model.eval()
        total, targets = torch.zeros((), device=self.accelerator.device), 0
        with torch.no_grad():
            for batch in self._evaluation:
                targets += _targets(batch)
                total += self._loss(self._rows(batch))
        self.model.train()
        return {"eval_loss": self._sum(total).item() / max(targets, 1)}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model as a Hugging Face folder, in float32. All processes must call it."""
        if self._processes > 1:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state = get_model_state_dict(self.model, options=options)
            if self.is_main:
                every, once = (dict(self.model.named_parameters(remove_duplicate=d)) for d in (False, True))
                state = {name: value for name, value in state.items() if name in once or name not in every}  # tied
                self.model.save_pretrained(folder, state_dict=state)
        else:
            self.model.save_pretrained(folder)
        self.accelerator.wait_for_everyone()

    # ------------------------------------------------------------------ the loop

    def _run(self, metrics: MetricsFile | None, write: Callable[[Record], None], stop: Stop) -> None:
        options = self.options
        self._data.restore(self._place)
        if options.eval_first and not self.step and len(self._evaluation):
            write({"step": 0, **self.evaluate()})
        self.model.train()
        with closing(prepared(self._data)) as batches:
            since = time.perf_counter()
            for step, (batch, after, last) in zip(range(self.step + 1, options.max_steps + 1), batches, strict=False):
                record, stopped = self._train(batch, stop)
                self.step, self._place = step, after
                seconds, since = time.perf_counter() - since, time.perf_counter()
                rates = {
                    "tokens_per_second": record["tokens"] / seconds, "seconds": seconds,
                    "mfu": self._flops(batch.segment_ids, record["tokens"]) / seconds / (self._peak * self._processes),
                }  # fmt: skip
                write({"step": step, **record, **rates})
                if self.nonfinite >= options.max_nonfinite:
                    raise self._give_up(batch)
                ended = last or step == options.max_steps
                if evaluates := len(self._evaluation) and due(step, options.eval_every, ended):
                    write({"step": step, **self.evaluate()})
                if saves := ended or stopped is not None or due(step, options.checkpoint_every):
                    self._save(metrics)
                if evaluates or saves:
                    since = time.perf_counter()
                if stopped is not None:
                    self.stopped_by = None if ended else stopped
                    return

    def _train(self, batch: Batch, stop: Stop) -> tuple[Record, Signals | None]:
        """One step over a batch; what was measured, and the signal that has come to any process."""
        targets = _targets(batch)
        total = torch.zeros((), device=self.accelerator.device)
        for rows in self._parts(batch):
            loss = self._loss(rows)
            # Sharding averages gradients over the processes.
            self.accelerator.backward(loss * (self._processes / max(targets, 1)))
            total += loss.detach()
        signal = stop.signal  # read once: the processes must agree whether one has come
        came = torch.tensor(float(signal is not None), device=total.device)
        sums = self._sum(torch.stack([total, came]))
        norm = clip(self._trained.values(), self.options.clip).item()
        rate = learning_rate(self.options, self.step)
        loss = sums[0].item() / max(targets, 1)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            self._optimizer.step()
        self.nonfinite = 0 if finite else self.nonfinite + 1
        self._optimizer.zero_grad()
        record = {"loss": loss, "tokens": targets, "gradient_norm": norm, "learning_rate": rate}
        stopped = (signal or Signals.SIGTERM) if sums[1].item() else None
        return record | ({} if finite else {"skipped": True}), stopped

    def _loss(self, rows: Batch) -> Tensor:
        """The sum of the losses of this process's rows, in float32."""
        inputs = {name: torch.from_numpy(x).to(self.accelerator.device) for name, x in rows._asdict().items()}
        with self.accelerator.autocast():
            return summed_loss(self.model, **inputs)

    def _give_up(self, batch: Batch) -> FloatingPointError:
        path = self.output / f"nonfinite-{self.step}.npz"
        if self.is_main:
            np.savez(path, **batch._asdict())  # type: ignore[arg-type]
        return FloatingPointError(
            f"{self.nonfinite} steps in a row had no finite loss and gradient, the last one step {self.step}; "
            f"its batch is in {path}"
        )

    # ------------------------------------------------------------------ processes

    def _parts(self, batch: Batch) -> Iterator[Batch]:
        for part in range(self.options.accumulation):
            yield self._rows(Batch(*(np.split(field, self.options.accumulation)[part] for field in batch)))

    def _rows(self, batch: Batch) -> Batch:
        """This process's rows of a part that all processes share."""
        return Batch(*(np.split(field, self._processes)[self.accelerator.process_index] for field in batch))

    def _sum(self, x: Tensor) -> Tensor:
        """Over all processes."""
        return x if self._processes == 1 else self.accelerator.reduce(x, "sum")  # type: ignore[return-value]

    # ------------------------------------------------------------------ on disk

    def _tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds: what is trained, and the optimiser's state, sharing memory with them."""
        tensors = {f"model.{name}": p.detach() for name, p in self._trained.items()}
        for name, p in self._trained.items():
            tensors |= {f"optimizer.{key}.{name}": value for key, value in self._optimizer.state[p].items()}
        return tensors

    def _save(self, metrics: MetricsFile | None) -> None:
        """Written beside its place and renamed when it is whole; the oldest beyond ``options.keep`` go."""
        if metrics is not None:
            metrics.sync()
        folder = self.output / "checkpoints" / str(self.step)
        unfinished = folder.with_name(f".{folder.name}.new")
        if self.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with _alone():
            save(self._tensors(), checkpoint_id=unfinished)
        if self.is_main:
            state = {"step": self.step, "nonfinite": self.nonfinite, "data": self._place, "shapes": self._shapes()}
            (unfinished / "state.json").write_text(json.dumps(state))
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.replace(folder)
            for step in self._saved()[: -self.options.keep]:
                shutil.rmtree(folder.with_name(str(step)))
        self.accelerator.wait_for_everyone()

    def _restore(self) -> None:
        saved = self._saved()
        if not saved or saved[-1] == self.step:
            return
        folder = self.output / "checkpoints" / str(saved[-1])
        state, here = json.loads((folder / "state.json").read_text()), self._shapes()
        for name in sorted({*state["shapes"], *here}):
            there, wanted = state["shapes"].get(name), here.get(name)
            if there != wanted:
                raise ValueError(
                    f"{self.output} holds a checkpoint of another model or optimiser: "
                    f"{name} has shape {there} there and {wanted} here"
                )
        with _alone():
            load(self._tensors(), checkpoint_id=folder)
        self.step, self.nonfinite, self._place = state["step"], state["nonfinite"], state["data"]

    def _shapes(self) -> dict[str, list[int]]:
        return {name: list(tensor.shape) for name, tensor in self._tensors().items()}

    def _saved(self) -> list[int]:
        """The steps of the checkpoints, ascending."""
        return sorted(int(path.name) for path in (self.output / "checkpoints").glob("*") if path.name.isdigit())


@contextmanager
def _alone() -> Iterator[None]:
    """One process that saves for itself is nothing to warn of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def _targets(batch: Batch) -> int:
    return int((batch.targets != NO_TARGET).sum())
