"""A benchmark's tables on the terminal and in Markdown: a header and rows of text each."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table


def show(title: str, tables: Sequence[tuple[list[str], list[list[str]]]], notes: Sequence[str]) -> None:
    """Print tables between what they measure and what a reader of the figures must know."""
    console = Console()
    if not console.is_terminal:  # nothing is cut off in a file
        console = Console(width=150)
    console.print(title, highlight=False, markup=False)
    for header, rows in tables:
        drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for index, name in enumerate(header):
            drawn.add_column(name, justify="right" if index else "left", no_wrap=True)
        for row in rows:
            drawn.add_row(*row)
        console.print(drawn)
    for line in notes:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
