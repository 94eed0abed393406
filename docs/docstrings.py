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


def arguments(fields: dict[str, str]) -> str:
    """A section of these arguments, each with the line that declares it, for a docstring.

    >>> print(arguments({"steps": "steps: int = 1000  #: optimiser steps", "beta": "beta: float = 0.9"}))
    Args:
        steps: optimiser steps
        beta:
    """
    texts = {name: re.search(r"#: (.*)$", line) for name, line in fields.items()}
    return "Args:" + "".join(f"\n    {name}: {text[1] if text else ''}".rstrip() for name, text in texts.items())


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed; a dataclass takes the ``#:`` beside its fields for its arguments."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)

    def on_class_members(self, *, cls: griffe.Class, **kwargs) -> None:
        fields = {name: attribute.lines[0] for name, attribute in cls.attributes.items() if attribute.annotation}
        if cls.docstring and "Args:" not in cls.docstring.value and any("#: " in line for line in fields.values()):
            cls.docstring.value += "\n\n" + arguments(fields)
