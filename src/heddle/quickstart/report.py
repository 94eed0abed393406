"""The quickstart's report: one page, its numbers as JSON, its pictures as PNGs."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heddle import plot
from heddle.bench.timing import machine
from heddle.plot import write_beside

from .display import STEPS

LEDE = (
    "A real model answered a question, its weights ran in another framework with the same result, a corpus was packed, "
    "and a small model was trained on it: all by this machine, from what was installed on it."
)


@dataclass
class Report:
    """The parts of the page, and the figures at its top."""

    folder: Path
    parts: list[plot.Picture | str] = field(default_factory=list)
    highlights: list[tuple[str, str]] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)  # of each step, for report.json
    pngs: list[Path] = field(default_factory=list)

    def heading(self, letter: str, text: str) -> None:
        self.parts += [f"<h2>{html.escape(STEPS[letter])}</h2>", f"<p>{text}</p>"]

    def figures(self, *figures: tuple[str, str]) -> None:
        self.parts.append(_figures(figures))

    def picture(self, name: str, picture: plot.Picture) -> None:
        """Add a picture, and write it as a PNG beside the page."""
        self.parts.append(picture)
        self.pngs.append(picture.png(self.folder / f"{name}.png"))

    def note(self, text: str) -> None:
        self.parts.append(f'<p class="note">{text}</p>')

    def write(self, seconds: float) -> Path:
        """Write ``report.json`` and ``report.html``; returns the page's path."""
        here = machine()
        numbers = {"seconds": seconds, "machine": here, **self.numbers}
        write_beside(self.folder / "report.json", lambda file: file.write(json.dumps(numbers, indent=1).encode()))
        versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
        where = (
            f"{here['processor']}, {here['cores']} cores, {here['memory_gib']} GiB; Python {here['python']}, {versions}"
        )
        top = [
            f"<p>{LEDE}</p>",
            _figures(self.highlights),
            f'<p class="note">Made by <code>heddle quickstart</code> in {_duration(seconds)} on {here["date"][:10]}, '
            f"with no network. {html.escape(where)}.</p>",
        ]
        return plot.page(self.folder / "report.html", "Heddle quickstart", [*top, *self.parts])


def _figures(figures: Any) -> str:
    items = (f"<li><b>{html.escape(value)}</b> {html.escape(name)}</li>" for value, name in figures)
    return f'<ul class="figures">{"".join(items)}</ul>'


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
