"""The quickstart's progress on the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.padding import Padding
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

STEPS = {
    "a": "A real model answers a question",
    "b": "The same weights in transformers",
    "c": "Documents packed into rows",
    "d": "A small model trained on them",
    "e": "The real model twice, learning together",
    "f": "The report",
}


class Display:
    """The steps, live: what is done, what is running and what it shows, how long each took.

    Without a terminal, a line for each step that is done and for each :meth:`log`.
    """

    def __init__(self, console: Console):
        self._console = console
        self._lines: dict[str, tuple[str, str, float]] = {}  # letter: mark, summary, seconds
        self._letter, self._begun, self._shown = "", 0.0, None
        self._spinner = Spinner("dots", style="cyan")

    @contextmanager
    def live(self) -> Iterator[None]:
        if not self._console.is_terminal:
            yield
            return
        with Live(get_renderable=self._render, console=self._console, refresh_per_second=8):
            yield

    @contextmanager
    def step(self, letter: str) -> Iterator[list[str]]:
        """Run a step, which appends its summary to the list. What goes wrong becomes a ValueError that names it."""
        self._letter, self._begun, self._shown = letter, time.perf_counter(), None
        summary: list[str] = []
        mark = "[red]✗[/]"
        try:
            yield summary
            mark = "[green]✓[/]"
        except Exception as error:
            # Whatever a step stumbles over, the user hears which step it was; --debug shows the rest.
            what = str(error) or type(error).__name__
            if isinstance(error, ImportError):
                what += "; the quickstart needs heddle-attention[torch,jax,bench]"
            raise ValueError(f"quickstart stopped at ({letter}) {STEPS[letter]}: {what}") from error
        finally:
            seconds, told = time.perf_counter() - self._begun, "; ".join(summary)
            self._lines[letter] = (mark, told, seconds)
            self._letter, self._shown = "", None
            if not self._console.is_terminal:
                line = f"{mark} ({letter}) {STEPS[letter]}, {seconds:.0f} s"
                self._console.print(f"{line}: {escape(told)}" if told else line, highlight=False, soft_wrap=True)

    def show(self, what: RenderableType) -> None:
        """Show this below the running step."""
        self._shown = what

    def log(self, text: str) -> None:
        """A line of progress for those without a terminal."""
        if not self._console.is_terminal:
            self._console.print(f"  ({self._letter}) {text}", highlight=False, markup=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        table = Table.grid(padding=(0, 1))
        table.add_column(width=1)
        table.add_column(no_wrap=True)
        table.add_column(justify="right", style="dim", no_wrap=True)
        table.add_column(style="dim", overflow="fold")
        for letter, title in STEPS.items():
            name = Text(f"({letter}) {title}")
            if letter in self._lines:
                mark, summary, seconds = self._lines[letter]
                table.add_row(Text.from_markup(mark), name, f"{seconds:.0f} s", Text(summary))
            elif letter == self._letter:
                name.stylize("bold")
                table.add_row(self._spinner, name, f"{time.perf_counter() - self._begun:.0f} s", "")
            else:
                name.stylize("dim")
                table.add_row("", name, "", "")
        return table if self._shown is None else Group(table, Padding(self._shown, (1, 0, 0, 4)))
