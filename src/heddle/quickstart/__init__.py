"""``heddle quickstart``: a tour in a few minutes, from a real model's answer to one trained here, and its report."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from . import steps
from .display import Display
from .report import Report

MARKER = ".heddle-quickstart"  # in the folders whose files a quickstart may replace


def run(out: str | Path = "out/quickstart", fast: bool = False, console: Console | None = None) -> Path:
    """Take the tour and write ``report.html``, ``report.json`` and PNGs into a folder; returns the page's path.

    Args:
        out: a new or empty folder, or an earlier quickstart's, whose files are replaced.
        fast: a shorter answer, part of the corpus and few training steps: what tests run.
        console: where progress is shown; None: standard output.

    Raises:
        ValueError: a folder that holds something else; a step that failed, by its letter.
    """
    began = time.perf_counter()
    folder = _claim(Path(out))
    display, report = Display(console or Console()), Report(folder)
    with display.live():
        with display.step("a") as summary:
            model, tokenizer = steps.answer(report, display, fast, summary)
        with display.step("b") as summary:
            steps.transformers(report, display, model, tokenizer, summary)
        del model
        with display.step("c") as summary:
            steps.pack(report, display, tokenizer, fast, summary)
        with display.step("d") as summary:
            steps.train(report, display, fast, summary)
        with display.step("e") as summary:
            steps.parscale(report, display, fast, summary)
        with display.step("f") as summary:
            path = report.write(time.perf_counter() - began)
            summary.append(f"{path} ({path.stat().st_size / 2**20:.1f} MiB, with {len(report.pngs)} PNGs beside it)")
    return path


def _claim(folder: Path) -> Path:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out must be a folder, got the file {folder}")
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise ValueError(f"--out must be new, empty or an earlier quickstart's, but {folder} holds something else")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    return folder
