"""What ``heddle memory`` shows: a plan as a table with bars, as JSON, as a page and a picture."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich import box
from rich.console import Console
from rich.table import Table

from heddle import plot
from heddle.config import FRAMEWORKS, Config
from heddle.options import MeshOptions
from heddle.run import tokenizer_of

from . import units

LONGEST_BAR = 40
MESH_AXES = tuple(option.name for option in dataclasses.fields(MeshOptions))


@runtime_checkable
class Plan(Protocol):
    """:class:`heddle.jax.memory.Plan` and :class:`heddle.torch.memory.Plan`: what takes how many bytes of a device."""

    @property
    def run(self) -> Any: ...

    @property
    def parts(self) -> dict[str, int]: ...

    @property
    def total(self) -> int: ...


def show(
    model: str | None,
    task: str,
    *,
    framework: str = "jax",
    batch: int | None = None,
    seq: int | None = None,
    mesh: str = "",
    find: str | None = None,
    within: str | None = None,
    as_json: bool = False,
    out: str | None = None,
    **options: Any,
) -> None:
    """Print the plan of a run; with ``find`` of the largest that fits.

    Args:
        model, task, framework, batch, seq, mesh, find, within, out: as ``heddle memory`` has them.
        options: what else :class:`heddle.jax.memory.Run` or :class:`heddle.torch.memory.Run` takes, or None.

    Raises:
        ValueError: an option out of range, sizes that the devices can't share equally, nothing that fits.
    """
    if framework not in FRAMEWORKS:
        raise ValueError(f"--framework must be one of {', '.join(FRAMEWORKS)}; got {framework!r}")
    planner = _planner(framework)
    options = {name: value for name, value in options.items() if value is not None}
    fields = {field.name for field in dataclasses.fields(planner.Run)}
    if strange := [name for name in options if name not in fields]:
        raise ValueError(f"--{strange[0].replace('_', '-')} does not go with --framework {framework}")
    config = planner.read_config(model)
    given = {"batch": batch, "seq": seq}
    if find is not None and find not in given:
        raise ValueError(f"--find must be batch or seq, got {find!r}")
    if (find is None) != (within is None):
        raise ValueError("--find and --bytes go together: name both")
    if find is not None and given[find] is not None:
        raise ValueError(f"--{find} must not be given where it is to be found, got {given[find]}")
    context = config.max_position_embeddings
    sizes = parse_mesh(mesh)
    least = sizes.get("data", 1) * sizes.get("fsdp", 1) * options.get("accumulation", 1)
    run = planner.Run(
        config, task, least if batch is None else batch, min(1024, context) if seq is None else seq, mesh=sizes,
        **options,
    )  # fmt: skip
    room = None
    if find is not None and within is not None:
        room = units.parse("--bytes", within)
        run = largest(planner.plan, run, find, room)
    found = planner.plan(run)
    name = Path(model).stem if model else "SmolLM2-135M-Instruct"
    files = write(found, name, out) if out else []
    if as_json:
        print(json.dumps(figures(found, name) | {"files": [str(file) for file in files]}))
        return
    _print(found, name, find, room)
    for file in files:
        print(f"wrote {file}")


def _planner(framework: str) -> Any:
    """What plans the framework's runs."""
    if framework == "torch":
        from heddle.torch import memory
    else:
        from heddle.jax import memory
    return memory


def dry_run(config: Config) -> None:
    """Print what a training run would be, and its memory on each device. Reads no weights and no data.

    Raises:
        ValueError: as :func:`heddle.jax.memory.plan` and :func:`heddle.torch.memory.plan`: sizes that the devices can't
            share equally, a model that they don't count.
    """
    if config.framework == "torch":
        from heddle.torch.run import model_config
    else:
        from heddle.jax.run import model_config
    planner = _planner(config.framework)
    training, tokenizer = config.training, tokenizer_of(config)
    sizes = dataclasses.asdict(config.mesh)
    if -1 in sizes.values():
        raise ValueError("mesh must say how many devices lie along each axis for a dry run, got -1")
    besides = {}
    if config.framework == "jax":
        grpo = config.grpo if training.objective == "grpo" else None
        copies = (training.ema_decay is not None) + (grpo is not None and grpo.beta > 0)
        besides = {"copies": copies, "group": 0 if grpo is None else grpo.num_generations}
    found = planner.plan(
        planner.Run(
            model_config(config, tokenizer), batch=training.batch_size, seq=config.data.seq_len,
            mesh={axis: size for axis, size in sizes.items() if size > 1}, optimizer=training.optimizer,
            accumulation=training.accumulation, remat=training.remat == "layer", dtype=training.compute_dtype,
            **besides,
        )
    )  # fmt: skip
    tokens = training.batch_size * config.data.seq_len
    print(f"{config.output}: {training.objective} with {config.framework}, {training.trainable} training")
    print(f"{training.max_steps:,} steps of {tokens:,} tokens, {training.max_steps * tokens:,} in all")
    print(f"{training.optimizer}, {training.schedule} learning rate {training.learning_rate:g} "
          f"after {training.warmup_steps:,} steps of warm-up")  # fmt: skip
    if training.trainable != "full":
        print("the plan counts all parameters as trained, which takes more than this run")
    if training.remat == "dots":
        print("the plan counts nothing as computed again, which takes more than training.remat=dots")
    _print(found, training.base_model or "a new model", None, None)


def parse_mesh(text: str) -> dict[str, int]:
    """``data=2,fsdp=4`` as sizes by axis.

    Raises:
        ValueError: an axis that there isn't or that comes twice, a size that isn't a positive integer.
    """
    mesh: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if axis not in MESH_AXES:
            raise ValueError(f"--mesh must name axes among {', '.join(MESH_AXES)}, got {axis!r}")
        if axis in mesh:
            raise ValueError(f"--mesh must name each axis once, got {axis} twice")
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"--mesh must give {axis} a size of at least 1, as in {axis}=2; got {size!r}")
        mesh[axis] = int(size)
    return mesh


def largest(plan: Callable[[Any], Plan], run: Any, what: str, room: int) -> Any:
    """The run with the largest batch, or sequences, that takes no more than ``room`` bytes on a device.

    Raises:
        ValueError: the least that there can be takes more.
    """
    step = run.least(what)
    most = run.config.max_position_embeddings // step if what == "seq" else 2**40 // step

    def total(count: int) -> int:
        return plan(dataclasses.replace(run, **{what: count * step})).total

    if most < 1 or (least := total(1)) > room:
        needs = "" if most < 1 else f": {what} {step} takes {units.show(least)}"
        raise ValueError(f"--bytes must have room for the least {what} there is{needs}; got {units.show(room)}")
    low, fits, high, over = 1, least, most + 1, None  # what fits and what doesn't, or can't be; what they take
    for turn in itertools.count():
        if high - low <= 1:
            # A larger one may take less, where it is computed otherwise: look on, up to twice as large.
            further = (low + 2**k for k in range(1, low.bit_length() + 1) if low + 2**k <= most)
            found = next(((count, taken) for count in further if (taken := total(count)) <= room), None)
            if found is None:
                break
            (low, fits), high, over = found, most + 1, None
            continue
        if over is None:
            guess = 2 * low
        elif turn % 3:  # memory grows nearly in a straight line
            guess = low + (room - fits) * (high - low) // (over - fits)
        else:
            guess = (low + high) // 2
        guess = min(max(guess, low + 1), high - 1)
        if (taken := total(guess)) <= room:
            low, fits = guess, taken
        else:
            high, over = guess, taken
    return dataclasses.replace(run, **{what: low * step})


def figures(found: Plan, name: str) -> dict[str, Any]:
    """The plan as JSON values, in bytes a device."""
    run = found.run
    settings = {field.name: getattr(run, field.name) for field in dataclasses.fields(run) if field.name != "config"}
    framework = type(found).__module__.split(".")[1]
    return {
        "model": name, "framework": framework, **settings, "devices": run.devices, "parts": found.parts,
        "total": found.total,
    }  # fmt: skip


def picture(found: Plan, name: str) -> plot.Picture:
    """A bar for each part."""
    parts = {part: size for part, size in found.parts.items() if size}
    unit, scale = max((u for u in units.UNITS.items() if u[1] <= found.total), key=lambda u: u[1], default=("B", 1))
    return plot.bars(
        {"memory": [size / scale for size in parts.values()]},
        categories=parts, title=f"{name}, {described(found.run)}: {units.show(found.total)} a device", y=unit,
    )  # fmt: skip


def write(found: Plan, name: str, out: str | Path) -> list[Path]:
    """Write the picture: into a directory as ``memory.png`` and ``memory.html``, or to ``out`` with those endings."""
    drawing, path = picture(found, name), Path(out)
    if path.suffix in (".png", ".html"):
        return [drawing.png(path) if path.suffix == ".png" else drawing.html(path)]
    if path.is_dir() or str(out).endswith("/"):
        path = path / "memory"
    return [drawing.png(path.with_name(path.name + ".png")), drawing.html(path.with_name(path.name + ".html"))]


def described(run: Any) -> str:
    """A run in a few words."""
    spread = ", ".join(f"{axis}={size}" for axis, size in run.mesh.items() if size > 1)
    return f"{run.task}, {run.batch} × {run.seq:,} tokens" + (f", {spread}" if spread else "")


def _print(found: Plan, name: str, find: str | None, room: int | None) -> None:
    console = Console()
    if not console.is_terminal:  # nothing is cut off in a file
        console = Console(width=120)
    console.print(f"{name}: {described(found.run)}", highlight=False, markup=False)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading, justify in (("on each device", "left"), ("at most", "right"), ("of all", "right"), ("", "left")):
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    longest = max(found.parts.values())
    for part, size in found.parts.items():
        if size:
            bar = "█" * max(1, round(LONGEST_BAR * size / longest))
            table.add_row(part, units.show(size), f"{size / found.total:.1%}", bar)
    table.add_row("at the peak", units.show(found.total), "", "", style="bold")
    console.print(table)
    if found.total < sum(found.parts.values()):
        console.print("the layer at work and the logits are never there at once: the larger of them counts")
    if find is not None and room is not None:
        value = getattr(found.run, find)
        console.print(f"the largest {find} in {units.show(room)}: {value:,}", highlight=False, markup=False)
