"""Meshes of devices, and what lies where on them: one table from the names of axes to the axes of a mesh.

A mesh has four axes: ``data`` (rows of the batch; parameters are copied), ``fsdp`` (rows too; parameters are cut along
the model's width and gathered layer by layer), ``tensor`` (heads, feed-forward units, vocabulary), ``context`` (the
tokens of a row). What is not named in :data:`AXES` and :data:`PARAMETERS` is whole on every device.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from heddle import slurm
from heddle.attention.mask import Mask

from .context_parallel import (
    Axes,
    context_attend,
    permute_tokens,
    shard,
    to_natural_order,
    unpermute_tokens,
    unshard,
)

__all__ = [
    "AXES", "MESH_AXES", "PARAMETERS", "Layout", "check_parameters", "context_attend", "copies", "create",
    "initialize", "make_mesh", "of_all_processes", "parameter_axes", "partition_spec", "permute_tokens", "place",
    "shard", "shardings", "spec", "unpermute_tokens", "unshard",
]  # fmt: skip

MESH_AXES = ("data", "fsdp", "context", "tensor")  #: the last lies closest together

#: Of each axis of an array, by its name, the mesh axes it is spread over.
AXES: dict[str, Axes] = {
    "batch": ("data", "fsdp"),
    "seq": "context",
    "embed": "fsdp",  # the model's width, of parameters; of activations it is whole
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffn": "tensor",
    "vocab": "tensor",
}

#: The axes of parameters by the end of their path, for the optimiser's state too; of others nothing is cut. Adapters
#: follow the weights that they stand beside.
PARAMETERS: dict[str, tuple[str | None, ...]] = {
    "embedding": ("vocab", "embed"),
    "head.weight": ("embed", "vocab"),
    "q.weight": ("embed", "heads"),
    "k.weight": ("embed", "kv_heads"),
    "v.weight": ("embed", "kv_heads"),
    "o.weight": ("heads", "embed"),
    "q.bias": ("heads",),
    "k.bias": ("kv_heads",),
    "v.bias": ("kv_heads",),
    "ffn.gate.weight": ("embed", "ffn"),
    "ffn.up.weight": ("embed", "ffn"),
    "ffn.down.weight": ("ffn", "embed"),
    "ffn.gate.bias": ("ffn",),
    "ffn.up.bias": ("ffn",),
    # ParScale
    "replicas.prefix_k": (None, "kv_heads", None, None),
    "replicas.prefix_v": (None, "kv_heads", None, None),
    "replicas.cross_bias": ("heads",),
    "cross_proj.weight": ("heads", "embed"),
    "aggregate.down.weight": (None, "embed"),
    "aggregate.up.weight": ("embed", None),
    # LongNet
    "q_proj.weight": ("embed", "heads"),
    "k_proj.weight": ("embed", "heads"),
    "v_proj.weight": ("embed", "heads"),
    "out_proj.weight": ("heads", "embed"),
    "q_proj.bias": ("heads",),
    "k_proj.bias": ("heads",),
    "v_proj.bias": ("heads",),
    "linear1.weight": ("embed", "ffn"),
    "linear2.weight": ("ffn", "embed"),
    "linear1.bias": ("ffn",),
}

M = TypeVar("M")
C = TypeVar("C")


# ---------------------------------------------------------------- meshes


def make_mesh(
    *, data: int = 1, fsdp: int = 1, tensor: int = 1, context: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of all devices (of all processes).

    Args:
        data, fsdp, tensor, context: how many devices along each axis; one of them may be -1: what is left.
        devices: these alone.

    Raises:
        ValueError: sizes that don't come to the number of devices.
    """
    sizes, count = {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}, len(devices or jax.devices())
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
            raise ValueError(f"{name} must be a positive integer, or -1 for what is left, got {size!r}")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"one axis of the mesh may be -1, got {' and '.join(free)}")
    given = {name: size for name, size in sizes.items() if size > 1}
    wanted, said = math.prod(given.values()), ", ".join(f"{name}={size}" for name, size in given.items())
    if (free and count % wanted) or (not free and count != wanted):
        what = "divide" if free else "multiply to"
        raise ValueError(f"the axes of the mesh must {what} the {count} devices there are, got {said or 'data=1'}")
    if free:
        sizes[free[0]] = count // wanted
    return jax.make_mesh(
        tuple(sizes[name] for name in MESH_AXES), MESH_AXES, axis_types=(AxisType.Auto,) * 4, devices=devices
    )


def initialize(
    address: str | None = None, processes: int | None = None, process: int | None = None, heartbeat: int | None = None
) -> None:
    """Join the other processes of a run, if there are any: to be called before anything else asks JAX for devices.

    The tasks of one ``srun`` find each other. Those that share a host take the device of their number there, one that
    has it for itself takes all; ``JAX_LOCAL_DEVICE_IDS`` says otherwise.

    Where a process dies the others end too, by SIGABRT and with a word on it: at once if it was process 0, else when it
    has been silent for ``heartbeat`` seconds. Until then they may wait for it in a collective operation. One that
    raises alone tells its error at once, and waits for the others for 300 seconds (JAX's); then all end.

    Args:
        address: ``host:port`` of process 0; None: the environment's ``JAX_COORDINATOR_ADDRESS``, or Slurm's first
            host. Without one this process is alone.
        processes, process: how many there are, and which this is; None: ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``,
            or what a cluster's environment (Slurm, MPI, Kubernetes) tells.
        heartbeat: seconds, at least 1; None: ``HEDDLE_HEARTBEAT_SECONDS``, or 100.

    Raises:
        ValueError: numbers that aren't; a process that isn't below the number of processes; no address where the
            environment says that there are several processes; no time for a sign of life.
    """
    if jax.distributed.is_initialized():
        return
    step, devices = slurm.step(), None
    address = address or os.environ.get("JAX_COORDINATOR_ADDRESS") or (None if step is None else step.address)
    if address is None:
        _check_alone()
        return
    processes = _number("JAX_NUM_PROCESSES") if processes is None else processes
    process = _number("JAX_PROCESS_ID") if process is None else process
    if step is not None:
        processes, process = processes or step.processes, step.process if process is None else process
        if step.here > 1 and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
            devices = [step.local]
    if process is not None and not 0 <= process < (processes or math.inf):
        raise ValueError(f"process must be at least 0 and below the {processes} processes, got {process}")
    if heartbeat is None:
        given = _number("HEDDLE_HEARTBEAT_SECONDS")
        heartbeat = 100 if given is None else given
    if heartbeat < 1:
        raise ValueError(f"heartbeat must be at least 1 second, got {heartbeat}")
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is the trainer's to handle
    # Where all is known JAX must not look further: under Slurm it would take one device of a host with many.
    detect = "deactivate" if None not in (processes, process) else None
    jax.distributed.initialize(address, processes, process, devices, detect, heartbeat_timeout_seconds=heartbeat)


def _check_alone() -> None:
    """Two processes that don't know of each other would write into one folder."""
    for name in ("JAX_NUM_PROCESSES", "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"):
        if (_number(name) or 1) > 1:
            raise ValueError(
                "JAX_COORDINATOR_ADDRESS must be host:port of process 0 where there are several, as "
                f"{name}={os.environ[name]} says, got none; torchrun and accelerate launch are for framework=torch"
            )


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
        raise ValueError(f"{name} must be a number, got {text!r}")
    return None if text is None else int(text)


# ---------------------------------------------------------------- what lies where


def spec(*axes: str | None) -> PartitionSpec:
    """Of an array whose axes have these names; None: whole."""
    return PartitionSpec(*(None if name is None else AXES[name] for name in axes))


def parameter_axes(path: str, ndim: int) -> tuple[str | None, ...]:
    """The names of a parameter's axes by its dotted path, such as ``layers.0.attention.q.weight``.

    Also of what an optimiser keeps of it, under a path that ends alike. What has another number of axes than its
    parameter, as the factors of a moment, is whole. An adapter's ``a`` has the inputs' axis of the weight beside it,
    ``b`` the outputs'; along their rank both are whole.
    """
    parts = path.split(".")
    if parts[-2:-1] == ["adapter"] and ndim == 2:
        inputs, outputs = parameter_axes(".".join([*parts[:-2], "weight"]), 2)
        return (inputs, None) if parts[-1] == "a" else (None, outputs)
    for length in (3, 2, 1):
        axes = PARAMETERS.get(".".join(parts[-length:]))
        if axes is not None and len(axes) == ndim:
            return axes
    return (None,) * ndim


def partition_spec(path: str, ndim: int) -> PartitionSpec:
    """How the parameter of this dotted path is spread; see :func:`parameter_axes`."""
    return spec(*parameter_axes(path, ndim))


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Of a model, its variables or an optimiser's state (arrays, or shapes as ``jax.eval_shape`` gives them): for each
    leaf how it lies on the mesh."""

    def one(path, leaf):
        return NamedSharding(mesh, partition_spec(dotted(path), leaf.ndim))  # type: ignore[arg-type]

    return jax.tree_util.tree_map_with_path(one, tree)


def check_parameters(model: Any, mesh: Mesh | AbstractMesh) -> None:
    """Refuse a model (or its shapes) whose parameters the devices of a mesh can't share equally.

    Raises:
        ValueError: naming the mesh axis, the size and the first such parameter.
    """
    config = getattr(model, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    counts = {"heads": heads, "kv_heads": getattr(config, "kv_heads", heads)}  # whole heads are dealt
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        name = dotted(path)
        for axis, size in zip(parameter_axes(name, leaf.ndim), leaf.shape, strict=True):
            over = None if axis is None else AXES[axis]
            devices, count = _devices(over, mesh), counts.get(axis or "") or size
            if count % devices:
                raise ValueError(
                    f"{axis} of {name} must be a multiple of the {devices} devices of mesh axis {over!r}, got {count}"
                )
    if mesh.shape["context"] > 1:
        patterns = getattr(config, "attention", None) or getattr(config, "segment_lengths", None)
        devices, heads = _devices(_HEADS_OF_WHOLE_ROWS, mesh), counts["kv_heads"] or 0
        if patterns is not None and heads % devices:
            raise ValueError(
                f"kv_heads of a model of dilated attention must be a multiple of the {devices} devices of mesh axes "
                f"{_HEADS_OF_WHOLE_ROWS!r}, got {heads}"
            )


def place(model: M, mesh: Mesh) -> M:
    """The model with its parameters spread over the mesh; its forward from now on computes there.

    Raises:
        ValueError: see :func:`check_parameters`.
    """
    check_parameters(model, mesh)
    placed: Any = jax.tree.map(jax.device_put, model, shardings(model, mesh))
    placed.mesh = mesh
    return placed


def copies(model: M) -> list[M]:
    """The model whole, as often as this process's devices can hold it: each copy is spread over ``tensor`` alone.

    What lies over ``fsdp`` is gathered by all processes together; arrays that are whole already aren't copied.

    Raises:
        ValueError: devices along ``tensor`` of several processes.
    """
    mesh: Mesh | None = getattr(model, "mesh", None)
    if mesh is None:
        return [model]
    groups = mesh.devices.reshape(-1, mesh.shape["tensor"])
    whose = [{device.process_index for device in group} for group in groups]
    if any(len(processes) > 1 for processes in whose):
        raise ValueError(
            f"the {mesh.shape['tensor']} devices along tensor must be of one process for it to hold the model whole, "
            f"got those of processes {sorted(set().union(*whose))}"
        )
    leaves, structure = jax.tree.flatten(model)
    kept = [_along(x.sharding.spec, "tensor") for x in leaves]
    whole = _moved(tuple(NamedSharding(mesh, spec) for spec in kept))(leaves)
    found = []
    for group, processes in zip(groups, whose, strict=True):
        if processes == {jax.process_index()}:
            own = Mesh(group.reshape(1, 1, 1, -1), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
            parts = [[shard.data for shard in x.addressable_shards if shard.device in group] for x in whole]
            arrays = [
                jax.make_array_from_single_device_arrays(x.shape, NamedSharding(own, spec), part)
                for x, spec, part in zip(whole, kept, parts, strict=True)
            ]
            copy: Any = jax.tree.unflatten(structure, arrays)
            copy.mesh = own
            found.append(copy)
    return found


def _along(spec: PartitionSpec, axis: str) -> PartitionSpec:
    """What a spec says of one mesh axis alone."""
    given = (names if isinstance(names, tuple) else (names,) for names in spec)
    return PartitionSpec(*(axis if axis in names else None for names in given))


@functools.lru_cache(maxsize=4)
def _moved(where: tuple[NamedSharding, ...]) -> Callable[[list[Array]], list[Array]]:
    """What moves arrays; compiled once."""
    return jax.jit(lambda arrays: arrays, out_shardings=list(where))


def of_all_processes(mine: Any) -> list[Any]:
    """What each process has, as JSON has it, in their order; all of them have to ask."""
    if jax.process_count() == 1:
        return [mine]
    from jax.experimental.multihost_utils import process_allgather

    text = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    lengths = np.asarray(process_allgather(np.int32(len(text)))).reshape(-1)
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(text)] = text
    rows = np.asarray(process_allgather(padded)).reshape(len(lengths), -1)
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def create(build: Callable[[], M], mesh: Mesh | None) -> M:
    """The model that ``build`` makes, of which each device ever holds its shards alone; None: as ``build`` does.

    Raises:
        ValueError: see :func:`check_parameters`; before anything is allocated.
    """
    if mesh is None:
        return build()
    shapes = jax.eval_shape(build)
    check_parameters(shapes, mesh)
    leaves = jax.jit(lambda: jax.tree.leaves(build()), out_shardings=jax.tree.leaves(shardings(shapes, mesh)))()
    model: Any = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    model.mesh = mesh
    return model


def dotted(path: tuple) -> str:
    """A leaf's path in a model as ``layers.0.attention.q.weight``."""
    keys = (getattr(key, "name", None) or getattr(key, "key", getattr(key, "idx", None)) for key in path)
    return ".".join(str(key) for key in keys if key != "value")


def _devices(axes: Axes, mesh: Mesh | AbstractMesh) -> int:
    return math.prod(mesh.shape[name] for name in (axes if isinstance(axes, tuple) else (axes,)) if name)


# ---------------------------------------------------------------- of a forward

#: Where every device has whole rows: heads are dealt over the devices that otherwise share the row's tokens.
_HEADS_OF_WHOLE_ROWS = ("tensor", "context")


@jax.tree_util.register_static
@dataclass(frozen=True)
class Layout:
    """Where the activations of a forward lie. Without a mesh all of this does nothing.

    Args:
        mesh: the devices.
        whole_rows: the tokens of a row aren't dealt over ``context``, as where there is a cache.
    """

    mesh: Mesh | AbstractMesh | None = None
    whole_rows: bool = False

    def __call__(self, x: Array, *axes: str | None) -> Array:
        """``x`` spread by the names of its leading axes."""
        if self.mesh is None:
            return x
        axes = tuple(None if name == "seq" and self.whole_rows else name for name in axes)
        return lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec(*axes)))

    @property
    def context(self) -> int:
        """How many devices share the tokens of a row."""
        return 1 if self.mesh is None or self.whole_rows else self.mesh.shape["context"]

    @property
    def devices(self) -> int:
        return 1 if self.mesh is None else self.mesh.size

    def check(self, batch: int, seq: int) -> None:
        """
        Raises:
            ValueError: a batch or length that the devices can't share equally.
        """
        if self.mesh is None:
            return
        for what, size, axis in (("batch", batch, "batch"), ("length", seq, "seq")):
            devices = 1 if axis == "seq" and self.whole_rows else _devices(AXES[axis], self.mesh)
            if size % devices:
                raise ValueError(
                    f"the {what} must be a multiple of the {devices} devices of mesh axis {AXES[axis]!r}, got {size}"
                )

    def by_heads(self, x: Array) -> Array:
        """``(batch, seq, heads, dim)`` for attention that wants whole rows."""
        if self.mesh is None:
            return x
        where = PartitionSpec(AXES["batch"], None, _HEADS_OF_WHOLE_ROWS)
        return lax.with_sharding_constraint(x, NamedSharding(self.mesh, where))

    def attend(
        self, query: Array, key: Array, value: Array, mask: Mask, order: Int[Array, "rows seq"]
    ) -> tuple[Array, Array]:
        """``(out, lse)`` of rows whose tokens are in ``order``; the mask is of the queries in that order."""
        return context_attend(
            query, key, value, mask, "context", mesh=self.mesh, batch_axis=AXES["batch"], head_axis=AXES["heads"],
            kv_order=order, return_lse=True,
        )  # fmt: skip

    def to_natural_order(self, x: Array, order: Int[Array, "rows seq"]) -> Array:
        """``x (rows, seq, hidden)``, whose rows are in ``order``, as they were."""
        return to_natural_order(x, order, "context", mesh=self.mesh, batch_axis=AXES["batch"])

    def empty(self, make: Callable[[], C], batch: int) -> C:
        """The cache of zeros that ``make`` makes of so many sequences, spread by its rows and heads.

        Raises:
            ValueError: sequences that the devices can't share equally.
        """
        self.check(batch, 0)
        return self.zeros(make)

    def zeros(self, make: Callable[[], C]) -> C:
        """The arrays of zeros that ``make`` makes, of a cache or a pool, each made where it lies."""
        if self.mesh is None:
            return make()
        return self._on_mesh(lambda x, sharding: jnp.zeros(x.shape, x.dtype, device=sharding), jax.eval_shape(make))

    def keep(self, cache: C) -> C:
        """A cache that stays where it lies."""
        if self.mesh is None:
            return cache
        return self._on_mesh(lax.with_sharding_constraint, cache)

    def _on_mesh(self, move: Callable[[Any, NamedSharding], Array], cache: C) -> C:
        mesh, rows = self.mesh, getattr(cache, "rows_axis", None)

        def one(path, x):
            return move(x, NamedSharding(mesh, cache_spec(dotted(path), rows)))  # type: ignore[arg-type]

        return jax.tree_util.tree_map_with_path(one, cache)


ONE_DEVICE = Layout()

#: Of a cache's arrays, those that have heads behind their rows.
_WITH_HEADS = ("keys", "values", "key_scales", "value_scales")


def cache_spec(path: str, rows: str | None = "batch") -> PartitionSpec:
    """How the array of a cache at this path, such as ``keys.0``, is spread: by its rows and, where it has them, heads.

    ``rows`` names what rows are; None of a pool of blocks, where any sequence may hold any slot.
    """
    return spec(rows, "kv_heads") if path.partition(".")[0] in _WITH_HEADS else spec(rows)


def to_mesh(x: np.ndarray, mesh: Mesh | None, *axes: str | None) -> Any:
    """A host's array, the same in every process, spread over all processes' devices; each takes only its own part."""
    if mesh is None:
        return x
    sharding = NamedSharding(mesh, spec(*axes))
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def to_host(x: Array) -> np.ndarray:
    """The whole array, wherever its parts lie; all processes have to ask."""
    if not x.is_fully_addressable:
        mesh: Any = x.sharding.mesh  # type: ignore[attr-defined]
        [x] = _moved((NamedSharding(mesh, PartitionSpec()),))([x])
    return np.asarray(x)
