"""Sweeps over replicas beside each other, and what the law of ParScale makes of them."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heddle import plot
from heddle.scaling_law import LAWS, fit, relative
from heddle.sweep import REPLICAS, SEED, mean_and_error


def compare(
    folders: Sequence[str | Path], out: str | Path, *, law: str = "stack", floor: float = 0.0, as_json: bool = False
) -> str:
    """Draw the losses of sweeps over replicas beside each other, with the law of ParScale fitted to each.

    Runs of one seed are compared with the run of one replica of that seed: what the seed does to all of them cancels.

    Args:
        folders: of sweeps that are done; each is named as its folder.
        out: a folder for ``compare.html``, ``compare.png`` and ``compare.json``.
        law: whose α the fit takes, stack or pile; see :func:`heddle.scaling_law.fit`.
        floor: E of the law, in nats a token of this corpus.
        as_json: return the figures as JSON.

    Returns:
        A table of the means, the differences and the fits, in words; or JSON.

    Raises:
        ValueError: a folder without a finished sweep over replicas, two folders of one name, an unknown law.
    """
    if law not in LAWS:
        raise ValueError(f"--law must be one of {', '.join(LAWS)}, got {law}")
    names = [Path(folder).name for folder in folders]
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"FOLDER must be one folder or more, each of another name, got {', '.join(names) or 'none'}")
    series = {name: _replica_losses(Path(folder)) for name, folder in zip(names, folders, strict=True)}
    figures = {name: _figures(losses, LAWS[law]["alpha"], floor) for name, losses in series.items()}
    record = {"alpha": LAWS[law]["alpha"], "floor": floor, "sweeps": figures}

    curves, errors, dashed = {}, {}, []
    for name, figure in figures.items():
        points = figure["points"]
        counts = [point["replicas"] for point in points]
        curves[name] = (counts, [point["loss"] for point in points])
        errors[name] = [point["standard_error"] or 0.0 for point in points]
        if figure["fit"] is not None:
            k, one = figure["fit"]["k"], figure["fit"]["one"]
            dashed.append(f"{name}, law")
            curves[dashed[-1]] = (counts, [relative(p, k, one, record["alpha"], floor) for p in counts])
    picture = plot.lines(
        curves, title="Loss against replicas", x="replicas P", y="nats a token", log_x=True, errors=errors,
        markers=True, dashed=dashed,
    )  # fmt: skip
    header = ["sweep", "P", "seeds", "loss", "± s.e.", "less than P = 1", "± s.e."]
    rows = [
        [name, str(p["replicas"]), str(p["seeds"]), *(_figure(p[key]) for key in ("loss", "standard_error"))]
        + [_figure(p[key]) for key in ("gain", "gain_error")]
        for name, figure in figures.items()
        for p in figure["points"]
    ]
    said = [
        f"{name}: k = {figure['fit']['k']:.3f} ± {figure['fit']['k_error']:.3f}"
        for name, figure in figures.items()
        if figure["fit"] is not None
    ]
    note = (
        f"Bars and ±: the standard error over seeds. Less than P = 1: the mean over seeds of the difference from the "
        f"run of that seed with one replica. Law: L = E + (L1 - E) (k ln P + 1)^-α with α = {record['alpha']}, "
        f"E = {floor:g}; {law}'s own k is {LAWS[law]['k']}."
    )
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(
        f"<tr><td>{html.escape(row[0])}</td>" + "".join(f"<td class=number>{x}</td>" for x in row[1:]) + "</tr>"
        for row in rows
    )
    fits = "".join(f"<p>{html.escape(line)}</p>" for line in said)
    parts = [f'<p class="note">{html.escape(note)}</p>', picture, f"<table><tr>{head}</tr>{body}</table>", fits]
    plot.page(folder / "compare.html", "Sweeps compared", parts)
    picture.png(folder / "compare.png")
    text = json.dumps(record, indent=2)
    (folder / "compare.json").write_text(text + "\n")
    if as_json:
        return text
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in [header, *rows]]
    return "\n".join([*lines, *said, note, f"wrote {folder / 'compare.html'}"])


def _replica_losses(folder: Path) -> dict[int, dict[int, float]]:
    """The losses of a finished sweep by the number of replicas and the seed."""
    path = folder / "sweep.json"
    if not path.is_file():
        raise ValueError(f"{folder} must hold a finished sweep, but it has no sweep.json")
    losses: dict[int, dict[int, float]] = {}
    for run in json.loads(path.read_text())["runs"]:
        values = dict(run["values"])
        count, seed = values.pop(REPLICAS, None), values.pop(SEED, 0)
        if count is None or values:
            raise ValueError(f"{path} must be a sweep over {REPLICAS} and seeds alone, got {', '.join(run['values'])}")
        losses.setdefault(count, {})[seed] = run["loss"]
    return dict(sorted(losses.items()))


def _figures(losses: dict[int, dict[int, float]], alpha: float, floor: float) -> dict[str, Any]:
    """Mean losses, what they are below one replica's, and the law's fit (None: too few runs)."""
    one, points = losses.get(1, {}), []
    for count, by_seed in losses.items():
        mean, error = mean_and_error(list(by_seed.values()))
        gains = [one[seed] - loss for seed, loss in by_seed.items() if seed in one and count > 1]
        gain, gain_error = mean_and_error(gains) if gains else (None, None)
        points.append(
            {"replicas": count, "seeds": len(by_seed), "losses": list(by_seed.values())}
            | {"loss": mean, "standard_error": error}
            | {"gain": gain, "gain_error": gain_error}
        )
    counts = [count for count, by_seed in losses.items() for _ in by_seed]
    every = [loss for by_seed in losses.values() for loss in by_seed.values()]
    fitted = fit(counts, every, alpha=alpha, floor=floor) if len(losses) > 1 and len(every) > 2 else None
    return {"points": points, "fit": None if fitted is None else fitted._asdict()}


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
