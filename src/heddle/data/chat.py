"""Conversations as text by a model's chat template, and which stretches of that text an answer is."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

Message = Mapping[str, Any]  #: ``{"role": ..., "content": ...}``
Span = tuple[int, int]  #: characters of a text, from and up to

ASSISTANT = "assistant"
#: Today's date in training, for templates that write it: a run goes on another day with the tokens that it began with.
#: It is the date that Llama 3's templates fall back to.
TRAINING_DATE = datetime.datetime(2024, 7, 26)
#: Around what ``{% generation %}`` encloses, while it is looked for.
_BEGIN, _END = "\0generation\0", "\0endgeneration\0"


def render(
    template: str, messages: Sequence[Message], names: Mapping[str, Any], *, add_generation_prompt: bool = False
) -> str:
    """A conversation as the template writes it.

    Args:
        template: in Jinja.
        messages: the oldest first.
        names: what else the template may name, such as ``bos_token``, or ``tools``.
        add_generation_prompt: end with the opening of the assistant's turn.

    Raises:
        ValueError: a template that is broken, or messages that it refuses.
    """
    return _render(template, messages, names, add_generation_prompt, marked=False)


def training_names(names: Mapping[str, Any]) -> dict[str, Any]:
    """What a template may name where a model is trained: ``names``, and :data:`TRAINING_DATE` for today."""
    return {**names, "strftime_now": TRAINING_DATE.strftime}


def marks_answers(template: str) -> bool:
    """Whether a template says itself what the assistant generates, by ``{% generation %}``."""
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template) is not None


def assistant_spans(template: str, messages: Sequence[Message], names: Mapping[str, Any]) -> tuple[str, list[Span]]:
    """The conversation as text, and where in it the assistant speaks.

    Found by ``{% generation %}`` where the template has it. Else by writing the conversation up to each of the
    assistant's turns, with and without it: what the turn adds is the assistant's.

    Raises:
        ValueError: as :func:`render`; a template that writes the beginning of a conversation differently once more of
            it follows, so that a turn can't be found.
    """
    if marks_answers(template):
        return _between_marks(_render(template, messages, names, False, marked=True))
    text, spans = render(template, messages, names), []
    for turn, message in enumerate(messages):
        if message["role"] == ASSISTANT:
            begin = len(opening(template, messages[:turn], text, names))
            until = render(template, messages[: turn + 1], names)
            if not text.startswith(until) or len(until) < begin:
                raise ValueError(_moving(turn))
            spans.append((begin, len(until)))
    return text, spans


def opening(template: str, prompt: Sequence[Message], text: str, names: Mapping[str, Any]) -> str:
    """The text of the messages before an answer, up to where the assistant begins to speak.

    Raises:
        ValueError: as :func:`render`; a template by which ``text``, of the whole conversation, doesn't begin with it.
    """
    before = render(template, prompt, names, add_generation_prompt=True)
    if not text.startswith(before):
        raise ValueError(_moving(len(prompt)))
    return before


def _moving(turn: int) -> str:
    return (
        f"the chat template writes the conversation before message {turn} differently once that message follows, so "
        "that its text can't be found: use a template with {% generation %} around the assistant's text"
    )


def _between_marks(marked: str) -> tuple[str, list[Span]]:
    text, spans = "", []
    for piece in re.split(f"({_BEGIN}.*?{_END})", marked, flags=re.DOTALL):
        begin = len(text)
        if piece.startswith(_BEGIN):
            text += piece[len(_BEGIN) : -len(_END)]
            spans.append((begin, len(text)))
        else:
            text += piece
    return text, spans


def _render(template: str, messages: Sequence[Message], names: Mapping[str, Any], prompt: bool, *, marked: bool) -> str:
    import jinja2

    try:
        return _compiled(template, marked).render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=prompt,
            **{"tools": None, "documents": None, **names},
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"the chat template refuses these messages: {error}") from None


@lru_cache(maxsize=8)
def _compiled(template: str, marked: bool) -> Any:
    """By Jinja as transformers sets it up for chat templates: sandboxed, since templates come with models."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            if marked:
                begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (_BEGIN, _END))
                body = [begin, *body, end]
            return nodes.Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.filters["tojson"] = to_json
    return environment.from_string(template)
