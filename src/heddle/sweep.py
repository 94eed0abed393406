"""Sweeps: the runs of a configuration over the values of some of its options, here or by wandb, and what came of them.

A sweep is a file in ``configs/sweeps``: ``about`` says what it asks, ``config`` names the configuration, ``set`` holds
options that all runs have, and ``vary`` the values of those that differ; its runs are all combinations.
"""

from __future__ import annotations

import html
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from heddle import plot
from heddle.config import Config, load_config
from heddle.metrics import read_metrics

KEYS = {"about": str, "config": str, "set": dict, "vary": dict}
REPLICAS, SEED = "parscale.parscale_n", "training.seed"
SEVERAL = {"parscale.parscale_cross_attn_layers"}  #: options whose one value is a list


@dataclass(frozen=True)
class Sweep:
    """What is to be run.

    Args:
        name: the file's.
        about: what the sweep asks, in a line.
        config: the configuration's file.
        set: options that all runs have, as overrides.
        vary: the values of the options that differ.
    """

    name: str
    about: str
    config: Path
    set: tuple[str, ...]
    vary: dict[str, list[Any]]

    def runs(self) -> list[dict[str, Any]]:
        """The values of each run, by option: all combinations, the last option varying fastest."""
        return [dict(zip(self.vary, values, strict=True)) for values in itertools.product(*self.vary.values())]


@dataclass(frozen=True)
class Result:
    """A run that is done.

    Args:
        values: of the options that differ.
        loss: the last evaluation's, or without one the mean over the last tenth of the steps; nats a token.
        folder: of the run.
    """

    values: dict[str, Any]
    loss: float
    folder: Path


def names() -> list[str]:
    """The sweeps that come with Heddle."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def load(name: str, overrides: Iterable[str] = ()) -> Sweep:
    """A sweep by its name, with overrides of its configuration for every run.

    An override with a list of values, for an option that takes one, is varied too: ``training.seed=[0,1,2]``.

    Raises:
        ValueError: no sweep of this name, a file that doesn't describe one, options that don't fit.
    """
    path = _folder() / f"{name}.yaml"
    if name not in names():
        raise ValueError(f"NAME must be one of {', '.join(names())}; got {name!r}")
    described: Any = OmegaConf.to_container(OmegaConf.load(path))
    for key, kind in KEYS.items():
        if not isinstance(described.get(key, {} if key == "set" else None), kind):
            raise ValueError(f"{path}: {key} must be a {kind.__name__}, got {described.get(key)!r}")
    vary, fixed = dict(described["vary"]), {}
    for key, value in described.get("set", {}).items():
        fixed[key] = f"{key}={_text(value)}"
    for override in overrides:
        key, _, text = override.removeprefix("--").partition("=")
        vary.pop(key, None)
        if text.startswith("[") and key not in SEVERAL and (values := _list(text)) is not None:
            vary[key] = values
        else:
            fixed[key] = override
    sweep = Sweep(
        name, described["about"], _folder().parent / f"{described['config']}.yaml", tuple(fixed.values()), vary
    )
    for run in sweep.runs():
        _config(sweep, run)
    return sweep


def table() -> list[dict[str, Any]]:
    """All sweeps, with their number of runs."""
    sweeps = [load(name) for name in names()]
    return [{"name": s.name, "runs": len(s.runs()), "about": s.about, "vary": s.vary} for s in sweeps]


# ---------------------------------------------------------------------- here


def run_local(sweep: Sweep, *, as_json: bool = False) -> int:
    """Run what isn't done yet, a process each, one after the other; then draw and print what came of all.

    The folder is ``output``'s: a run's own in it is named after its values; ``sweep.html``, ``sweep.png`` and
    ``sweep.json`` stand beside them.

    Returns:
        0, or the exit code of a run that was told to stop.

    Raises:
        ValueError: a run that failed. The same command goes on with it.
    """
    runs = sweep.runs()
    for number, values in enumerate(runs, 1):
        config = _config(sweep, values)
        if _is_done(config):
            _note(f"{number}/{len(runs)} {_name(values)}: done before")
            continue
        _note(f"{number}/{len(runs)} {_name(values)}")
        overrides = [*sweep.set, *_overrides(values), f"output={config.output}"]
        command = [sys.executable, "-m", "heddle", "train", "--config", str(sweep.config), *overrides]
        code = subprocess.run(command, check=False).returncode
        if code > 128 or code < 0:
            return code if code > 0 else 128 - code
        if code:
            raise ValueError(f"{_name(values)} failed with exit code {code}; the same command goes on with it")
    results = [
        Result(values, final_loss(_config(sweep, values)), Path(_config(sweep, values).output)) for values in runs
    ]
    print(report(sweep, results) if not as_json else json.dumps(_described(sweep, results), indent=2))
    return 0


def final_loss(config: Config) -> float:
    """What a finished run came to: the last evaluation's loss, or the mean over the last tenth of its steps."""
    records = read_metrics(Path(config.output) / "metrics.jsonl")
    evaluated = [record["eval_loss"] for record in records if "eval_loss" in record]
    if evaluated:
        return evaluated[-1]
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    last = losses[-math.ceil(len(losses) / 10) :]
    return sum(last) / len(last)


def report(sweep: Sweep, results: Sequence[Result]) -> str:
    """Write the sweep's page, picture and figures beside its runs; returns a table of the means in words."""
    folder = results[0].folder.parent
    means = summary(results)
    series: dict[str, list[dict[str, Any]]] = {}
    for mean in means:
        others = {k: v for k, v in mean["values"].items() if k != REPLICAS}
        series.setdefault(_name(others) if others else "loss", []).append(mean)
    against = REPLICAS if any(REPLICAS in mean["values"] for mean in means) else None
    axis = [[mean["values"].get(against, 1) for mean in points] for points in series.values()]
    curves = {
        name: (xs, [mean["loss"] for mean in points]) for xs, (name, points) in zip(axis, series.items(), strict=True)
    }
    bars = {
        name: [mean["standard_error"] or 0.0 for mean in points]
        for name, points in series.items()
        if any(mean["standard_error"] for mean in points)
    }
    picture = plot.lines(
        curves, title=sweep.about, x="replicas P", y="nats a token", log_x=True, errors=bars, markers=True
    )
    head = "".join(f"<th>{name}</th>" for name in ("run", "seeds", "loss", "standard error"))
    rows = "".join(
        f"<tr><td>{html.escape(_name(m['values']))}</td><td class=number>{m['seeds']}</td>"
        f"<td class=number>{m['loss']:.4f}</td><td class=number>{_error(m)}</td></tr>"
        for m in means
    )
    config = _config(sweep, results[0].values)
    note = (
        f"{len(results)} runs of {config.training.max_steps:,} steps, {config.training.batch_size} rows of "
        f"{config.data.seq_len:,} tokens a step. Bars: the standard error over seeds, where there are several."
    )
    parts = [f'<p class="note">{note}</p>', picture, f"<table><tr>{head}</tr>{rows}</table>"]
    plot.page(folder / "sweep.html", f"Sweep {sweep.name}", parts)
    picture.png(folder / "sweep.png")
    (folder / "sweep.json").write_text(json.dumps(_described(sweep, results), indent=2) + "\n")
    width = max(len(_name(m["values"])) for m in means)
    lines = [f"{_name(m['values']):{width}}  {m['loss']:.4f}  {_error(m)}".rstrip() for m in means]
    return "\n".join([*lines, f"wrote {folder / 'sweep.html'}"])


def summary(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The mean loss over the seeds of runs that are alike otherwise, and its standard error (None for one seed)."""
    alike: dict[str, list[Result]] = {}
    for result in results:
        values = {k: v for k, v in result.values.items() if k != SEED}
        alike.setdefault(json.dumps(values), []).append(result)
    means = []
    for key, group in alike.items():
        mean, error = mean_and_error([result.loss for result in group])
        means.append({"values": json.loads(key), "seeds": len(group), "loss": mean, "standard_error": error})
    return means


# ---------------------------------------------------------------------- by wandb


def as_wandb(sweep: Sweep) -> dict[str, Any]:
    """The sweep as wandb's own configuration; its agents call ``heddle train``, each run in a folder of its own."""
    run = "${oc.env:WANDB_RUN_ID}"  # filled in by the run itself
    return {
        "name": sweep.name,
        "description": sweep.about,
        "program": "heddle",
        "method": "grid",
        "metric": {"name": "eval_loss", "goal": "minimize"},
        "parameters": {name: {"values": values} for name, values in sweep.vary.items()},
        "command": [
            "${env}", "heddle", "train", "--config", str(sweep.config), *sweep.set, "training.report_to=wandb",
            f"output={_output(sweep)}/{run}", "${args}",
        ],
    }  # fmt: skip


def wandb_yaml(sweep: Sweep) -> str:
    """:func:`as_wandb` as YAML, for ``wandb sweep FILE``."""
    return yaml.safe_dump(as_wandb(sweep), sort_keys=False)


def create(sweep: Sweep, project: str = "heddle") -> str:
    """Create the sweep on wandb; returns its id, which ``wandb agent`` takes.

    Raises:
        ValueError: no wandb here, no account, no network.
    """
    try:
        import wandb  # type: ignore[import-not-found]
    except ImportError:
        raise ValueError("creating a wandb sweep needs the wandb package: pip install wandb") from None
    try:
        return wandb.sweep(as_wandb(sweep), project=project)
    except Exception as error:  # its client raises its own, its HTTP library's and argument errors
        reason = " ".join(str(error).split())
        raise ValueError(f"wandb did not create the sweep, log in with `wandb login`: {reason}") from None


# ---------------------------------------------------------------------- pieces


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and its standard error (None: of one value)."""
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return mean, None
    return mean, math.sqrt(sum((x - mean) ** 2 for x in values) / (n - 1) / n)


def _folder() -> Path:
    """configs/sweeps, of the checkout or as it is packaged."""
    package = Path(__file__).parent
    places = [folder / "configs" / "sweeps" for folder in (package, package.parents[1])]
    return next((place for place in places if place.exists()), places[-1])


def _config(sweep: Sweep, values: dict[str, Any]) -> Config:
    """A run's, in its own folder."""
    output = f"{_output(sweep)}/{_name(values)}"
    return load_config(sweep.config, [*sweep.set, *_overrides(values), f"output={output}"])


def _output(sweep: Sweep) -> str:
    given = [override for override in sweep.set if override.removeprefix("--").startswith("output=")]
    return given[-1].partition("=")[2] if given else f"runs/{sweep.name}"


def _list(text: str) -> list[Any] | None:
    """The values of a YAML list; None: not one, which loading the configuration will say better."""
    try:
        return list(OmegaConf.from_dotlist([f"value={text}"])["value"])
    except (yaml.YAMLError, OmegaConfBaseException):
        return None


def _overrides(values: dict[str, Any]) -> list[str]:
    return [f"{name}={_text(value)}" for name, value in values.items()]


def _name(values: dict[str, Any]) -> str:
    """A run's, after the last words of its options: ``learning_rate=0.0001,parscale_n=4``."""
    return ",".join(f"{name.rpartition('.')[2]}={_text(value)}" for name, value in values.items()) or "run"


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _is_done(config: Config) -> bool:
    folder = Path(config.output)
    if not (folder / "model" / "config.json").exists() or not (folder / "config.yaml").exists():
        return False
    return load_config(folder / "config.yaml") == config


def _described(sweep: Sweep, results: Sequence[Result]) -> dict[str, Any]:
    runs = [{"values": r.values, "loss": r.loss, "folder": str(r.folder)} for r in results]
    return {"sweep": sweep.name, "about": sweep.about, "set": list(sweep.set), "runs": runs, "means": summary(results)}


def _error(mean: dict[str, Any]) -> str:
    return "" if mean["standard_error"] is None else f"± {mean['standard_error']:.4f}"


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
