"""``heddle bench report``: what a folder of measurements found, as one page of Markdown."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from . import attention, decode, dilated, parscale, serve, train
from .tables import markdown

MODULES = {
    "attention": attention,
    "decode": decode,
    "parscale": parscale,
    "dilated": dilated,
    "serve": serve,
    "train": train,
}  #: by record


def write(folder: str | Path, out: str | Path, title: str = "Measurements") -> Path:
    """Put the records of ``heddle bench`` below ``folder``, tuned tiles and tests' results (JUnit XML) into a page.

    Raises:
        ValueError: a folder that holds none of them.
    """
    folder, out = Path(folder), Path(out)
    parts = [_cases(sorted(folder.rglob("*.xml")))]
    parts += [_tiles(json.loads(path.read_text())) for path in sorted(folder.rglob("tiles.json"))]
    for name, module in MODULES.items():
        parts += [_measured(json.loads(path.read_text()), module) for path in sorted(folder.rglob(f"{name}.json"))]
    parts = [part for part in parts if part]
    if not parts:
        raise ValueError(f"folder must hold records of heddle bench (attention.json and the like), got {folder}")
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(out.name + ".part")
    beside.write_text("\n\n".join([f"# {title}", *parts]) + "\n")
    beside.replace(out)
    return out


def _measured(record: dict[str, Any], module: Any) -> str:
    tables = "\n\n".join(markdown(*table) for table in module.tables(record))
    notes = "\n".join(f"- {note}" for note in module.notes(record))
    return f"## {module.title(record)}\n\n```sh\n{record['command']}\n```\n\n{tables}\n\n{notes}"


def _tiles(tuned: dict[str, dict[str, dict[str, list[int]]]]) -> str:
    rows = [
        [f"{kernel}, head dim {dim}", f"sm_{capability}", *map(str, tile)]
        for capability, kernels in tuned.items()
        for kernel, dims in kernels.items()
        for dim, tile in dims.items()
    ]
    return "## Tiles that `heddle bench tune` chose\n\n" + markdown(
        ["kernel", "device", "queries", "keys", "warps", "stages"], rows
    )


def _cases(files: list[Path]) -> str:
    """How many tests passed, by file of results."""
    rows = []
    for path in files:
        found = Counter(_outcome(case) for case in ElementTree.parse(path).iter("testcase"))
        rows.append([path.stem, *(str(found[outcome]) for outcome in ("passed", "failed", "skipped"))])
    if not rows:
        return ""
    return "## Cases against the float64 oracle\n\n" + markdown(["cases", "passed", "failed", "skipped"], rows)


def _outcome(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "skipped" if case.find("skipped") is not None else "passed"
