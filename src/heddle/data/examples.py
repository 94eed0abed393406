"""Examples of what to answer, for supervised fine-tuning: prompts and completions out of records, as token ids.

A record has ``messages``, a conversation that the assistant ends, or ``prompt`` and ``completion``, both text or both
messages; for a chat template that writes them ``tools`` too. Which tokens are learned is said by
:class:`heddle.data.packing.Document`; all others are context.
"""

from __future__ import annotations

import ast
import io
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from heddle.options import OVERLONG, SFT_FORMS, SFT_LOSSES

from .chat import ASSISTANT, Message, Span, assistant_spans, opening, render, training_names
from .corpora import (
    Reader,
    Take,
    check_choices,
    kind_of,
    open_records,
    part_of,
    record_text,
    report_broken,
    stdlib,
)
from .packing import Document, Documents
from .tokenizers import Tokenizer

log = logging.getLogger(__name__)

STDLIB_DOCSTRINGS = "stdlib-docstrings"
SHORTEST_DOCSTRING = 20  #: characters; below that a docstring says too little to write its function from


class Example(NamedTuple):
    """What is given, and what is to be answered: both text, or both messages."""

    prompt: str | Sequence[Message]
    completion: str | Sequence[Message]
    tools: Sequence[Any] | None = None  #: that the assistant may call, for the chat template


@dataclass
class TakeExample:
    """Examples as token ids, of the records of a corpus.

    Args:
        tokenizer: whose chat template writes conversations.
        max_tokens: of an example; what is longer is cut or refused.
        loss_on: what is learned: ``"completion"``, the last answer; ``"assistant"``, everything the assistant says;
            ``"all"``, prompts too.
        form: how a prompt and completion that are text are written: ``"chat"``, as a user's and an assistant's message;
            ``"text"``, one after the other, closed by the end of text; ``"auto"``, as a chat where there is a template.
        overlong: ``"truncate"`` cuts the end off (the first time with a warning), ``"refuse"`` takes the record for
            broken.

    Raises:
        ValueError: choices that don't exist; ``form="chat"`` without a template.
    """

    tokenizer: Tokenizer
    max_tokens: int
    loss_on: str = "completion"
    form: str = "auto"
    overlong: str = "truncate"
    fields: tuple[str, ...] = field(default=("messages", "prompt", "completion", "tools"), init=False)
    _warned: bool = field(default=False, init=False)

    def __post_init__(self):
        for name, choices in (("loss_on", SFT_LOSSES), ("form", SFT_FORMS), ("overlong", OVERLONG)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        if self.form == "chat" and not self.tokenizer.chat_template:
            raise ValueError("form=chat needs a tokenizer with a chat template, this one has none")

    def __call__(self, record: Any) -> tuple[str, Document]:
        """The record's key, and the example as token ids.

        Raises:
            ValueError: what is wrong with the record, in one clause.
        """
        example = read_example(record)
        tokens, learned = self._encode(example)
        count = len(tokens)
        if count > self.max_tokens:
            if self.overlong == "refuse":
                raise ValueError(f"{count} tokens, more than the {self.max_tokens} of a row")
            tokens, learned = tokens[: self.max_tokens], learned[: self.max_tokens]
        if not any(learned[1:]):
            raise ValueError(
                "nothing to learn: there is no token to answer"
                if count <= self.max_tokens
                else f"nothing to learn: the prompt fills all {self.max_tokens} tokens of a row"
            )
        if count > self.max_tokens and not self._warned:
            self._warned = True
            log.warning(
                "an example of %d tokens was cut to the %d of a row; others won't be reported", count, self.max_tokens
            )
        key = json.dumps({"prompt": example.prompt, "completion": example.completion}, sort_keys=True, default=str)
        return key, Document(np.asarray(tokens, np.int32), np.asarray(learned, bool))

    def _encode(self, example: Example) -> tuple[list[int], list[bool]]:
        tokenizer, template = self.tokenizer, self.tokenizer.chat_template
        prompt, completion, tools = example
        if tools and (not template or (isinstance(prompt, str) and self.form == "text")):
            raise ValueError("'tools' are for conversations by a chat template")
        if isinstance(prompt, str) and isinstance(completion, str):
            if not template or self.form == "text":
                end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
                before, after = tokenizer.encode(prompt), tokenizer.encode(completion, add_special=False) + end
                return before + after, [self.loss_on == "all"] * len(before) + [True] * len(after)
            prompt = [{"role": "user", "content": prompt}]
            completion = [{"role": ASSISTANT, "content": completion}]
        if not template:
            raise ValueError("messages need a tokenizer with a chat template, this one has none")
        return self._encode_chat(template, list(prompt), list(completion), tools)  # type: ignore[arg-type]

    def _encode_chat(
        self, template: str, prompt: list[Message], completion: list[Message], tools: Sequence[Any] | None
    ) -> tuple[list[int], list[bool]]:
        names, messages = training_names({**self.tokenizer.template_names, "tools": tools}), [*prompt, *completion]
        spans: list[Span]
        if self.loss_on == "assistant":
            text, spans = assistant_spans(template, messages, names)
        else:
            text = render(template, messages, names)
            begin = 0 if self.loss_on == "all" else len(opening(template, prompt, text, names))
            spans = [(begin, len(text))]
        return self.tokenizer.encode_spans(text, spans)


def read_example(record: Any) -> Example:
    """The example that a record holds.

    Raises:
        ValueError: what is wrong with the record, in one clause.
    """
    tools = _tools(record.get("tools")) if isinstance(record, dict) else None
    if isinstance(record, dict) and record.get("messages") is not None:
        messages = _messages(record, "messages")
        if messages[-1]["role"] != ASSISTANT:
            raise ValueError(f"'messages' must end with the assistant's, but the last is the {messages[-1]['role']}'s")
        return Example(messages[:-1], messages[-1:], tools)
    if isinstance(record, dict) and not {"prompt", "completion"} <= record.keys():
        has = ", ".join(map(str, record)) or "none"
        raise ValueError(f"neither 'messages' nor 'prompt' and 'completion'; it has {has}")
    if isinstance(record, dict) and isinstance(record["prompt"], list):
        return Example(_messages(record, "prompt"), _messages(record, "completion"), tools)
    prompt, completion = record_text(record, "prompt"), record_text(record, "completion")
    if not completion:
        raise ValueError("'completion' is empty")
    return Example(prompt, completion, tools)


def _tools(tools: Any) -> list[Any] | None:
    """A list of what describes each, or JSON's text of one."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"'tools' is no JSON: {error.msg}") from None
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"'tools' is {kind_of(tools)}, not a list")
    return _without_nulls(tools) or None


def _without_nulls(value: Any) -> Any:
    """Without the null fields that columns of Parquet fill objects up with."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _messages(record: dict[str, Any], name: str) -> list[Message]:
    messages = record[name]
    if not isinstance(messages, list):
        raise ValueError(f"{name!r} is {kind_of(messages)}, not a list of messages")
    if not messages:
        raise ValueError(f"{name!r} is empty")
    read = []
    for number, message in enumerate(messages):
        where = f"message {number} of {name!r}"
        if not isinstance(message, dict):
            raise ValueError(f"{where} is {kind_of(message)}, not an object")
        message = {key: value for key, value in message.items() if value is not None}  # as columns of Parquet have it
        try:
            record_text(message, "role")
            if "tool_calls" not in message:
                record_text(message, "content")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        read.append(message)
    return read


# ---------------------------------------------------------------------- corpora


def open_examples(
    name: str,
    take: Take,
    *,
    part: str = "all",
    held_out: float = 0.02,
    seed: int | None = None,
    on_error: str = "fail",
) -> Reader:
    """The examples of a corpus: JSONL, Parquet, a dataset of the hub, or ``"stdlib-docstrings"``.

    Arguments as of :func:`heddle.data.corpora.open_corpus`. A record that ``take`` refuses, for whatever reason, is a
    broken line.

    Raises:
        ValueError: a name that stands for no file, files of plain text, impossible options.
    """
    check_choices(part, held_out, on_error)
    if name == STDLIB_DOCSTRINGS:
        reader = stdlib_docstrings(take, seed, on_error)
    else:
        opened = open_records(name, take, seed=seed, on_error=on_error, builtin=STDLIB_DOCSTRINGS)
        if opened is None:
            raise ValueError(f"examples must be JSONL, Parquet or of the hub, {name!r} holds plain text")
        reader = opened
    return part_of(reader, part, held_out)


def documents(reader: Reader) -> Documents:
    """The examples of a corpus, for packing."""

    def read(epoch: int, cursor: Any) -> Iterator[tuple[Document, Any]]:
        return ((document, after) for _, document, after in reader(epoch, cursor))

    return read


def stdlib_docstrings(take: Take, seed: int | None = None, on_error: str = "fail") -> Reader:
    """The functions of the running interpreter's library that say what they do: from docstring to function.

    The prompt is the docstring, the completion the function as it stands in its file, without its docstring. 6,366
    pairs (Python 3.11).
    """
    files = stdlib(seed)

    def read(epoch: int, cursor: Any) -> Iterator[tuple[str, Any, Any]]:
        before, done = cursor or (None, 0)  # where its file begins, and how many of that file's pairs are behind it
        for name, source, after in files(epoch, before):
            for number, (qualified, pair) in enumerate(docstring_pairs(source), 1):
                if number <= done:
                    continue
                try:
                    _, value = take(pair)
                except ValueError as error:
                    report_broken(f"{name}:{qualified}", str(error), on_error)
                    continue
                yield f"{name}:{qualified}", value, [before, number]
            before, done = after, 0

    return read


def docstring_pairs(source: str) -> Iterator[tuple[str, dict[str, str]]]:
    """``(name, {"prompt", "completion"})`` of the functions in a file of Python that have a docstring worth reading and
    a body."""
    lines = io.StringIO(source, newline=None).readlines()  # as the parser counts them: a form feed ends none

    def visit(node: ast.AST, inside: str) -> Iterator[tuple[str, dict[str, str]]]:
        for child in ast.iter_child_nodes(node):
            name = f"{inside}{child.name}." if isinstance(child, _NAMED) else inside
            if isinstance(child, _FUNCTIONS) and _tells(child):
                prompt = f'"""{ast.get_docstring(child)}"""\n'
                yield name[:-1], {"prompt": prompt, "completion": _without_docstring(child, lines)}
            yield from visit(child, name)

    yield from visit(ast.parse(source), "")


def _tells(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return len(ast.get_docstring(function) or "") >= SHORTEST_DOCSTRING and len(function.body) > 1


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_NAMED = (*_FUNCTIONS, ast.ClassDef)


def _without_docstring(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)]) - 1
    docstring, then = function.body[:2]
    head, body = lines[first : docstring.lineno - 1], lines[docstring.end_lineno : function.end_lineno]
    if docstring.end_lineno == then.lineno:  # on one line with what follows; columns count bytes
        before = lines[docstring.lineno - 1].encode()[: docstring.col_offset]
        line = before + lines[then.lineno - 1].encode()[then.col_offset :]
        body = [line.decode(), *lines[then.lineno : function.end_lineno]]
    return "".join(line.removeprefix(" " * function.col_offset) for line in [*head, *body]).rstrip() + "\n"
