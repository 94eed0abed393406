"""Answers in the form of OpenAI's API, whole or piece by piece."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from heddle.data.tokenizers import Decoder, Tokenizer
from heddle.jax.answer import TokenLogprobs
from heddle.jax.requests import Event, Handle

from .protocol import ChatBody, CompletionBody


class Form:
    """An answer to one HTTP request as it comes together. Its subclasses say how the two kinds look.

    Args:
        model: its name.
        tokenizer: of the model.
        body: the request.
        handles: one for each prompt.
    """

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str, tokenizer: Tokenizer, body: Any, handles: Sequence[Handle]):
        self.tokenizer, self.body, self.handles = tokenizer, body, handles
        self.choices = [Choice(tokenizer.decoder()) for handle in handles for _ in range(handle.request.n)]
        self.head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def opening(self) -> list[dict[str, Any]]:
        """What is streamed before the first event."""
        raise NotImplementedError

    def add(self, index: int, handle: Handle, event: Event) -> dict[str, Any] | None:
        """Take an event of one choice; what to stream of it, if anything."""
        choice = self.choices[index]
        choice.text += event.text
        choice.count += event.token >= 0
        choice.finish_reason = event.finish_reason
        logprobs = None
        # A token that ends the answer isn't part of it.
        if event.logprobs is not None and event.token not in handle.stop_ids:
            choice.tokens.append(event.token)
            choice.told.append(event.logprobs)
            choice.offsets.append(choice.length)
            choice.length += len(choice.decoder.add(event.token))
            logprobs = self.logprobs([event.token], [event.logprobs], choice.offsets[-1:])
        if not event.text and logprobs is None and event.finish_reason is None:
            return None
        return self.chunk([self.piece(index, event.text, logprobs, event.finish_reason)])

    def closing(self) -> list[dict[str, Any]]:
        """What is streamed after the last event."""
        return [self.chunk([]) | {"usage": self.usage()}] if self.body.usage_too else []

    def whole(self) -> dict[str, Any]:
        """The answer, not streamed."""
        choices = []
        for index, choice in enumerate(self.choices):
            wanted = self.body.likeliest is not None
            logprobs = self.logprobs(choice.tokens, choice.told, choice.offsets) if wanted else None
            choices.append(self.message(index, choice.text, logprobs, choice.finish_reason))
        return {**self.head, "object": self.whole_object, "choices": choices, "usage": self.usage()}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        # Where the usage comes at the end, all other chunks say that they have none.
        none = {"usage": None} if self.body.usage_too else {}
        return {**self.head, "object": self.chunk_object, "choices": choices, **none}

    def usage(self) -> dict[str, Any]:
        prompt, answers = sum(h.prompt_tokens for h in self.handles), sum(choice.count for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answers,
            "total_tokens": prompt + answers,
            "prompt_tokens_details": {"cached_tokens": sum(h.reused_tokens for h in self.handles)},
        }

    def token(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special=False)

    def piece(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        """A choice's next part, streamed."""
        raise NotImplementedError

    def message(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        """A choice as a whole."""
        raise NotImplementedError

    def logprobs(self, tokens: Sequence[int], told: Sequence[TokenLogprobs], offsets: Sequence[int]) -> dict[str, Any]:
        """Log-probabilities of some tokens, and where in the text each begins."""
        raise NotImplementedError


class Choice:
    """One answer so far."""

    def __init__(self, decoder: Decoder):
        self.text = ""
        self.count = 0
        self.finish_reason: str | None = None
        self.tokens: list[int] = []
        self.told: list[TokenLogprobs] = []
        self.offsets: list[int] = []
        # Characters that are whole; more than the text has, while some of it may yet become a stop string.
        self.decoder, self.length = decoder, 0


class CompletionForm(Form):
    """/v1/completions"""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"
    body: CompletionBody

    def opening(self):
        if not self.body.echo:
            return []
        for choice, prompt in zip(self.choices, self._prompts(), strict=True):
            choice.text = prompt
        return [self.chunk([self.piece(i, choice.text, None, None)]) for i, choice in enumerate(self.choices)]

    def whole(self):
        whole = super().whole()
        if self.body.echo:
            for choice, prompt in zip(whole["choices"], self._prompts(), strict=True):
                choice["text"] = prompt + choice["text"]
        return whole

    def _prompts(self) -> list[str]:
        """Of each choice."""
        prompts = [p if isinstance(p, str) else self.tokenizer.decode(p) for p in self.body.prompts()]
        return [prompt for prompt in prompts for _ in range(self.body.answers)]

    def piece(self, index, text, logprobs, reason):
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    message = piece

    def logprobs(self, tokens, told, offsets):
        names = [self.token(token) for token in tokens]
        return {
            "tokens": names,
            "token_logprobs": [each.chosen for each in told],
            "top_logprobs": [
                {self.token(token): logprob for token, logprob in each.top} | {name: each.chosen}
                for name, each in zip(names, told, strict=True)
            ],
            "text_offset": list(offsets),
        }


class ChatForm(Form):
    """/v1/chat/completions"""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"
    body: ChatBody

    def opening(self):
        delta = {"role": "assistant", "content": ""}
        return [
            self.chunk([{"index": i, "delta": delta, "logprobs": None, "finish_reason": None}])
            for i in range(len(self.choices))
        ]

    def piece(self, index, text, logprobs, reason):
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def message(self, index, text, logprobs, reason):
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def logprobs(self, tokens, told, offsets):
        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self.token(token)
            # A token that is part of a character has no text of its own, and what bytes it has isn't known here.
            return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

        content = [
            entry(token, each.chosen) | {"top_logprobs": [entry(*other) for other in each.top]}
            for token, each in zip(tokens, told, strict=True)
        ]
        return {"content": content, "refusal": None}
