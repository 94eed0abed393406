"""The ``heddle`` command. Each command parses its arguments and calls one function elsewhere."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

app = typer.Typer(name="heddle", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
bench = typer.Typer(no_args_is_help=True, help="Measure, beside peers, in one interleaved run.")
app.add_typer(bench, name="bench")


@app.callback(invoke_without_command=True)
def heddle(
    version: bool = typer.Option(False, "--version", help="Print the version and leave."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Structured attention for LLMs, in PyTorch and JAX.

    Example: heddle chat
    """
    if version:
        from heddle import __version__

        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command; a user's error is one line on stderr and exit code 2."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        app([a for a in arguments if a != "--debug"])
    except (ValueError, NotImplementedError, OSError) as error:
        if debug:
            raise
        message = " ".join(str(error).split())
        Console(stderr=True, soft_wrap=True).print(f"heddle: {message}", style="red", markup=False, highlight=False)
        raise SystemExit(2) from None
