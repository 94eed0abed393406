"""Docstrings as Markdown: doctests become code blocks, and the roles of Sphinx plain code."""

import re

import griffe


def markdown(text: str) -> str:
    r"""
    >>> markdown("Adds, see :func:`sum`.\n\n>>> 1 + 1\n2").splitlines()
    ['Adds, see `sum`.', '', '```pycon', '>>> 1 + 1', '2', '```']
    """
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    paragraphs = re.split(r"\n\s*\n", text)
    # An indented doctest stands in an Examples section, which griffe knows by itself.
    return "\n\n".join(f"```pycon\n{p}\n```" if p.startswith(">>> ") else p for p in paragraphs)


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
