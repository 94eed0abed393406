"""How much memory a training step or a generation takes in torch: the step itself, run on tensors without values.

Nothing is computed and nothing allocated: torch's own operations say how large their results are, and autograd, the
optimiser and ``fully_shard`` keep and free them as they would. What is alive is counted, storage by storage.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM

from heddle.data.gguf import GGUF
from heddle.data.locate import locate
from heddle.data.meta import Meta
from heddle.options import TrainingOptions

from . import longnet, parscale  # noqa: F401  # their models are then Auto classes' too
from .huggingface import dilation
from .train import clip, make_optimizer, recompute, shard, summed_loss

TASKS = ("train", "generate")
DTYPES = ("float32", "bfloat16")
PARTS = {
    "Parameter": "parameters", "Buffer": "buffers", "Optstate": "optimizer state", "Gradient": "gradients",
    "Activation": "activations", "Temp": "at work",
}  #: what MemTracker calls them, and what a plan does  # fmt: skip


def read_config(name: str | None) -> Any:
    """The configuration of a model, as transformers has it.

    Raises:
        FileNotFoundError, ValueError: as :func:`heddle.data.locate.locate`.
    """
    path = locate(name, weights=False)
    if path.suffix == ".gguf":
        return AutoConfig.for_model(**GGUF.open(path).config())
    return AutoConfig.for_model(**Meta(path).config()) if Meta.is_at(path) else AutoConfig.from_pretrained(path)


@dataclass(frozen=True)
class Run:
    """What is to be run, in the words of ``heddle memory``; see :class:`heddle.jax.memory.Run`.

    Args:
        config: the model, as transformers has it.
        mesh: ``{"fsdp": n}`` alone: processes that ``fully_shard`` (FSDP2) spreads the model over.
        dtype: of the computation, under autocast in training, whose weights are float32; of generation's weights too.

    Raises:
        ValueError: a value out of range, or that torch's trainer has no use for; a batch that can't be shared equally.
    """

    config: Any
    task: str = "train"
    batch: int = 1
    seq: int = 1024
    mesh: dict[str, int] = field(default_factory=dict)
    optimizer: str = "adamw"
    accumulation: int = 1
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        options = {
            "--task": (self.task, TASKS), "--dtype": (self.dtype, DTYPES), "--optimizer": (self.optimizer, ("adamw",)),
        }  # fmt: skip
        for name, (value, allowed) in options.items():
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)} with --framework torch; got {value!r}")
        for name in ("batch", "seq", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        trains = self.task == "train"
        asked = {"--remat": self.remat, "--accumulation": self.accumulation > 1, "--mesh": self.devices > 1}
        for name, given in asked.items():
            if given and not trains:
                raise ValueError(f"{name} goes with --task train in torch")
        if dilation(self.config) is not None:
            raise ValueError("--framework torch counts what plain attention keeps, got a model of dilated attention")
        if other := sorted(axis for axis, size in self.mesh.items() if size > 1 and axis != "fsdp"):
            raise ValueError(f"--mesh must name fsdp alone with --framework torch, got {', '.join(other)}")
        context = self.config.max_position_embeddings
        if not trains and not 2 <= self.seq <= context:
            raise ValueError(f"--seq must be from 2 to the model's context of {context} tokens, got {self.seq}")
        if self.batch % self.least("batch"):
            raise ValueError(f"--batch must be a multiple of {self.least('batch')}, got {self.batch}")

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())

    def least(self, what: str) -> int:
        """The smallest ``"batch"`` or ``"seq"`` there can be; the others are multiples of it."""
        if what == "batch":
            return self.accumulation * self.devices
        return 1 if self.task == "train" else 2


@dataclass(frozen=True)
class Plan:
    """Bytes on each device.

    Args:
        run: what was planned.
        parts: by what takes them, at the moment of the peak.
    """

    run: Run
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """At the peak."""
        return sum(self.parts.values())


def plan(run: Run) -> Plan:
    """What a run takes; see :class:`Run`. Some seconds: every operation of the step is gone through."""
    with _processes(run.devices) as mesh, FakeTensorMode():
        return Plan(run, _training(run, mesh) if run.task == "train" else _generation(run))


class _Tracker(MemTracker):
    """Without what it keeps of each module, which takes it most of its time."""

    def _update_peak_stats(self, peak_state: Any) -> None:
        for device, found in self._curr_mem_snap.items():
            if self._peak_mem.get(device, 0) < found["Total"]:
                self._peak_mem[device] = found["Total"]
                self._peak_mem_snap[device] = dict(found)

    def parts(self) -> dict[str, int]:
        [found] = self.get_tracker_snapshot("peak").values()
        return {name: found.get(kind, 0) for kind, name in PARTS.items()}


def _training(run: Run, mesh: DeviceMesh | None) -> dict[str, int]:
    bfloat16 = run.dtype == "bfloat16"
    model = _model(run.config, torch.float32)
    if run.remat:
        recompute(model)
    model = (model if mesh is None else shard(model, bfloat16, mesh)).train()
    options = TrainingOptions(batch_size=run.batch, accumulation=run.accumulation)
    optimizer = make_optimizer(options, model.parameters())
    rows = torch.zeros(run.batch // run.accumulation // run.devices, run.seq, dtype=torch.int64)
    tracker = _Tracker()
    tracker.track_external(model, optimizer, rows)
    with tracker:
        for _ in range(run.accumulation):
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = summed_loss(model, rows, rows, rows, None)
            loss.backward()
            del loss
            tracker.reset_mod_stats()
        clip(model.parameters(), options.clip)
        optimizer.step()
    return tracker.parts()


def _generation(run: Run) -> dict[str, int]:
    model = _model(run.config, getattr(torch, run.dtype)).eval()
    tokens = torch.zeros(run.batch, run.seq - 1, dtype=torch.int64)
    tracker = _Tracker()
    tracker.track_external(model, tokens)
    with tracker, torch.inference_mode():
        found = model(tokens, use_cache=True, logits_to_keep=1)
        tracker.reset_mod_stats()
        model(tokens[:, :1], past_key_values=found.past_key_values, use_cache=True)
    return tracker.parts()


def _model(config: Any, dtype: torch.dtype) -> Any:
    kind = {"attn_implementation": "heddle", "dtype": dtype}
    return AutoModelForCausalLM.from_config(config, **kind)


@contextlib.contextmanager
def _processes(count: int) -> Iterator[DeviceMesh | None]:
    """This process as the first of so many that do not exist; None: alone."""
    if count == 1:
        yield None
        return
    import torch.testing._internal.distributed.fake_pg  # noqa: F401  # makes the back end "fake" known

    dist.init_process_group("fake", store=HashStore(), rank=0, world_size=count)
    try:
        yield init_device_mesh("cpu", (count,))
    finally:
        dist.destroy_process_group()
