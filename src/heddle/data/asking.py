"""How a task's problems are asked, as text or as a conversation, and what counts as a right answer.

The tasks are :mod:`heddle.data.tasks`'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from heddle.options import ANSWER_FORMS, GYM, SFT_FORMS

from .chat import ASSISTANT, Message, render, training_names
from .corpora import Reader, Take, report_broken
from .tasks import EPOCH, Problem, Task, gym, key_of
from .tokenizers import Tokenizer

OPEN, CLOSE = "<answer>", "</answer>"
IN_TAGS = f"Put the final answer, and nothing else, between {OPEN} and {CLOSE}, at the very end."


def asking(
    tokenizer: Tokenizer, answer_form: str, *, form: str = "auto", system: str | None = None
) -> Callable[[str | Sequence[Message]], str | list[Message]]:
    """What makes a prompt into the text or the conversation that a model reads.

    Args:
        tokenizer: which may have a chat template.
        answer_form: of the task, which says how answers are to be written.
        form: ``"chat"``, a prompt that is text becomes a user's message; ``"text"``; ``"auto"``, as a chat where there
            is a template.
        system: what is said before; None: how the answer is to be written, if in tags.

    Raises:
        ValueError: another form; ``"chat"`` without a template. What is returned raises it for messages without one.
    """
    if form not in SFT_FORMS:
        raise ValueError(f"form must be one of {', '.join(SFT_FORMS)}; got {form!r}")
    if form == "chat" and not tokenizer.chat_template:
        raise ValueError("prompt_form=chat needs a tokenizer with a chat template, this one has none")
    before = (IN_TAGS if answer_form == "tags" else "") if system is None else system

    def ask(prompt: str | Sequence[Message]) -> str | list[Message]:
        if isinstance(prompt, str) and (form == "text" or not tokenizer.chat_template):
            return f"{before}\n\n{prompt}\n" if before else prompt
        messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if before and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": before}, *messages]
        return messages

    return ask


def prompt_encoder(
    tokenizer: Tokenizer, answer_form: str, *, form: str = "auto", system: str | None = None
) -> Callable[[str | Sequence[Message]], list[int]]:
    """What makes a prompt into token ids; arguments and errors as of :func:`asking`."""
    ask = asking(tokenizer, answer_form, form=form, system=system)

    def encode(prompt: str | Sequence[Message]) -> list[int]:
        asked = ask(prompt)
        if isinstance(asked, str):
            return tokenizer.encode(asked)
        if not tokenizer.chat_template:
            raise ValueError("messages need a tokenizer with a chat template, this one has none")
        names = training_names(tokenizer.template_names)
        text = render(tokenizer.chat_template, asked, names, add_generation_prompt=True)
        return tokenizer.encode(text, add_special=False)

    return encode


def usable(
    encode: Callable[[Any], list[int]], seq_len: int, max_completion: int, *, answers: bool
) -> Callable[[Problem], None]:
    """What refuses a problem that can't be learned from, see :class:`heddle.data.tasks.Stream`.

    Args:
        encode: makes a prompt into token ids.
        seq_len: tokens of a prompt and its completion.
        max_completion: tokens of a completion.
        answers: whether a problem must have one, for the task's own score.
    """

    def check(problem: Problem) -> None:
        needed = len(encode(problem.prompt)) + max_completion
        if needed > seq_len:
            raise ValueError(
                f"data.seq_len must have room for a prompt of {needed - max_completion} tokens and grpo.max_completion "
                f"more, {needed}; got {seq_len}"
            )
        # Of reasoning-gym's tasks some are scored without one, by all that the package says of the problem.
        if answers and all(problem.fields.get(name) is None for name in ("answer", "entry")):
            raise ValueError("no 'answer', which the reward 'task' compares with")

    return check


def answered(
    task: Task, take: Take, ask: Callable[[Any], str | list[Message]], answer_form: str, *, name: str = "task",
    on_error: str = "fail",
) -> Reader:  # fmt: skip
    """A task's problems of its highest level with their right answers, as examples to learn from.

    Each has the key by which :class:`heddle.data.tasks.Stream` deals problems, so that what is held out from one is
    from the other. 10,000 problems are an epoch; the next one's are others.

    Args:
        task: one that makes its problems up, see :func:`heddle.options.makes_problems`.
        take: what makes a record of ``prompt`` and ``completion`` into an example.
        ask: see :func:`asking`.
        answer_form: how answers are written.
        name: of the task, for what is said of a problem that ``take`` refuses, or that has no one answer.
        on_error: what such a problem does: ``"fail"`` or ``"skip"``.
    """

    def read(epoch: int, cursor: Any) -> Iterator[tuple[str, Any, Any]]:
        for number in range(cursor or 0, EPOCH):
            at = epoch * EPOCH + number
            problem = task.problem(at, task.levels)
            prompt, answer = ask(problem.prompt), problem.fields["answer"]
            said = f"{OPEN}{answer}{CLOSE}" if answer_form == "tags" else str(answer)
            completion = said if isinstance(prompt, str) else [{"role": ASSISTANT, "content": said}]
            try:
                if answer is None:
                    raise ValueError("no 'answer' to learn")
                example = take({"prompt": prompt, "completion": completion})[1]
            except ValueError as error:
                report_broken(f"{name}:{at}", str(error), on_error)
                continue
            yield key_of(problem), example, number + 1

    return read


# ---------------------------------------------------------------------- answers


def parse_answer(completion: str, form: str) -> str | None:
    """The answer that a completion gives, strictly: None if it isn't written as asked.

    ``"tags"``: there is one ``<answer>`` and one ``</answer>``, and nothing after it. ``"whole"``: all of it, without
    the white space around it.

    Raises:
        ValueError: another form.
    """
    if form not in ANSWER_FORMS[1:]:
        raise ValueError(f"form must be {' or '.join(ANSWER_FORMS[1:])}, got {form!r}")
    text = completion.strip()
    if form == "whole":
        return text
    if text.count(OPEN) != 1 or text.count(CLOSE) != 1 or not text.endswith(CLOSE):
        return None
    return text.partition(OPEN)[2].removesuffix(CLOSE).strip()


def score(
    completion: str, *, task: str, answer: Any, answer_form: str, threshold: float = 1.0, entry: Any = None,
    **_: Any,
) -> float:  # fmt: skip
    """The reward of a task: 1 for a right answer, written as asked, and 0 for any other.

    The answer is parsed before it is scored, and right from ``threshold`` on: several of reasoning-gym's scorers pay
    something for any text in which the answer occurs.
    """
    found = parse_answer(completion, answer_form)
    if found is None:
        return 0.0
    if task.startswith(GYM):
        return float(_scorer(task.removeprefix(GYM))(found, entry) >= threshold)
    return float(found == str(answer).strip())


@lru_cache
def _scorer(name: str) -> Callable[[str, Any], float]:
    return gym().get_score_answer_fn(name)
