"""One sequence's text, token by token: whole characters, up to a stop id, a stop string or a number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from heddle.data.tokenizers import Decoder


class TokenLogprobs(NamedTuple):
    """The model's log-probabilities at one token, before the sampler's transforms."""

    chosen: float  #: of the token itself
    top: tuple[tuple[int, float], ...]  #: the likeliest ids and theirs, the highest first


class Piece(NamedTuple):
    """What one token added: text that is certain now, perhaps none; at the end the reason for it."""

    text: str
    token: int
    finish_reason: str | None
    logprobs: TokenLogprobs | None = None


@dataclass
class Answer:
    """A text under way.

    Args:
        decoder: of the tokenizer, fresh.
        stop: strings that end the text, before them.
        stop_ids: token ids that end it.
        limit: how many tokens it has at most.
    """

    decoder: Decoder
    stop: tuple[str, ...]
    stop_ids: frozenset[int]
    limit: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    held: str = ""  #: text that may be the beginning of a stop string
    finish_reason: str | None = None

    def add(self, token: int, logprobs: TokenLogprobs | None = None) -> Piece:
        """What the next token adds; ``finish_reason`` is ``"stop"`` or, at ``limit``, ``"length"``."""
        self.tokens.append(token)
        if token in self.stop_ids:
            self.held += self.decoder.rest()
            self.finish_reason = "stop"
        else:
            self.held += self.decoder.add(token)
            if len(self.tokens) == self.limit:
                self.held += self.decoder.rest()
                self.finish_reason = "length"
        ends = [at for at in (self.held.find(string) for string in self.stop) if at >= 0]
        if ends:
            self.held, self.finish_reason = self.held[: min(ends)], "stop"
        keep = 0 if self.finish_reason else max((_overlap(self.held, string) for string in self.stop), default=0)
        piece = self.held[: len(self.held) - keep]
        self.held = self.held[len(piece) :]
        self.text += piece
        return Piece(piece, token, self.finish_reason, logprobs)


def stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Checked.

    Raises:
        ValueError: a string that is empty, or none.
    """
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(string, str) and string for string in strings):
        raise ValueError(f"stop must hold strings that aren't empty, got {stop!r}")
    return strings


def _overlap(text: str, string: str) -> int:
    """How many characters at the end of ``text`` may begin ``string``."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if string.startswith(text[-n:])), 0)
