"""A model at the terminal: an answer as it comes, and a conversation. Text goes to stdout, all else to stderr."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from heddle.data.tokenizers import Tokenizer

from . import checkpoint
from .cache import cache_dtype as check_cache_dtype
from .generation import Past, Piece, generate, stream
from .model import LanguageModel
from .sampling import Sampler
from .speculation import PromptLookup

HELP = """\
/reset          forget the conversation
/system TEXT    set the system message, and forget the conversation; without TEXT: the model's own
/save FILE      write the conversation as JSON
/exit           leave, as does the end of input (Ctrl-D); Ctrl-C stops an answer"""


def load(
    name: str | Path | None, dtype: str = "auto", tokenizer: str | Path | None = None
) -> tuple[LanguageModel, Tokenizer]:
    """The model and its tokenizer (None: the model's own), while a spinner turns. What XLA compiles is kept from run to
    run, in ``$JAX_COMPILATION_CACHE_DIR``, by default ``heddle/xla`` in the user's cache folder.
    """
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "heddle" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    with Console(stderr=True).status(f"loading {name or 'SmolLM2-135M-Instruct'}"):
        return checkpoint.load(name, dtype=dtype), Tokenizer.from_pretrained(name if tokenizer is None else tokenizer)


@dataclass
class Speed:
    """How fast an answer came, from its pieces' arrivals. The first two steps, which may compile, count apart."""

    prompt_tokens: int
    began: float = field(default_factory=time.perf_counter)
    arrivals: list[float] = field(default_factory=list)

    def watch(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            self.arrivals.append(time.perf_counter())
            yield piece

    @property
    def tokens_per_second(self) -> float | None:
        """Of the third token on."""
        steady = self.arrivals[1:]
        return (len(steady) - 1) / (steady[-1] - steady[0]) if len(steady) > 1 else None

    def __str__(self) -> str:
        if not self.arrivals:
            return f"{self.prompt_tokens} prompt tokens"
        rate = self.tokens_per_second
        parts = [
            f"{self.prompt_tokens} prompt tokens",
            f"first token after {self.arrivals[0] - self.began:.2f} s",
            f"{len(self.arrivals)} tokens" + (f" at {rate:.1f} tokens/s" if rate else ""),
        ]
        return ", ".join(parts)


def answer(
    name: str | Path | None,
    prompts: Sequence[str],
    *,
    sampler: Sampler,
    max_tokens: int = 256,
    seed: int = 0,
    stop: Sequence[str] = (),
    system: str | None = None,
    speculate: int = 0,
    raw: bool = False,
    dtype: str = "auto",
    cache_dtype: str | None = None,
    tokenizer: str | Path | None = None,
    as_json: bool = False,
) -> None:
    """Load a model and print how it continues the prompts; a single one as it comes.

    Args:
        name: as :meth:`Transformer.from_pretrained` has it.
        prompts: what to answer; several are one batch. Without any, what stands on stdin.
        raw: continue the text as it is; else, where the model has a chat template, a prompt is a user's message.
        system: the system message; None: the model's own.
        speculate: tokens of a draft by prompt lookup, 0: none.
        cache_dtype: as :func:`generate` has it.
        tokenizer: as ``name``; None: the model's own.
        as_json: print one JSON object for each prompt.
    """
    if not prompts:
        if sys.stdin.isatty():
            raise ValueError("--prompt must be given where stdin is a terminal")
        prompts = [sys.stdin.read().removesuffix("\n")]
    if speculate < 0:
        raise ValueError(f"--speculate must be at least 0, got {speculate}")
    if cache_dtype is not None:
        check_cache_dtype("--cache-dtype", cache_dtype)
    model, words = load(name, dtype, tokenizer)
    if system is not None and (raw or not words.chat_template):
        raise ValueError("--system must go with a chat template, and without --raw")
    encoded = []
    for prompt in prompts:
        if raw or not words.chat_template:
            encoded.append(words.encode(prompt))
        else:
            messages = [*_opening(system), {"role": "user", "content": prompt}]
            encoded.append(words.encode(words.chat(messages), add_special=False))
    options: dict[str, Any] = {"max_tokens": max_tokens, "sampler": sampler, "seed": seed, "stop": stop}
    options["cache_dtype"] = cache_dtype
    options["speculate"] = PromptLookup(num_tokens=speculate) if speculate else None
    if len(encoded) == 1 and not as_json:
        speed = Speed(len(encoded[0]))
        _print(speed.watch(stream(model, words, encoded[0], **options)))
        print()
        _say(str(speed))
        return
    began = time.perf_counter()
    completions = generate(model, words, encoded, **options)
    seconds = time.perf_counter() - began
    for prompt, completion in zip(prompts, completions, strict=True):
        if as_json:
            record = {
                "prompt": prompt,
                "text": completion.text,
                "finish_reason": completion.finish_reason,
                "prompt_tokens": completion.prompt_tokens,
                "tokens": len(completion.tokens),
            }
            print(json.dumps(record, ensure_ascii=False))
        else:
            print(f"{prompt}\n{completion.text}\n")
    total = sum(len(completion.tokens) for completion in completions)
    _say(f"{len(prompts)} prompts, {total} tokens in {seconds:.2f} s with compilation")


def chat(
    name: str | Path | None,
    *,
    sampler: Sampler,
    max_tokens: int = 1024,
    seed: int = 0,
    system: str | None = None,
    dtype: str = "auto",
    cache_dtype: str | None = None,
    tokenizer: str | Path | None = None,
) -> None:
    """A conversation on stdin and stdout, until the end of input. Arguments as of :func:`answer`."""
    if cache_dtype is not None:
        check_cache_dtype("--cache-dtype", cache_dtype)
    model, words = load(name, dtype, tokenizer)
    if not words.chat_template:
        raise ValueError("the model must have a chat template to chat; try heddle generate")
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (gives input() its line editing and history)
        _say("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
    past = Past(max_len=1024, cache_dtype=cache_dtype)
    talk = Conversation(model, words, system, past, sampler=sampler, max_tokens=max_tokens, seed=seed)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            if interactive:
                print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if line in ("/exit", "/quit"):
            return
        if not line:
            continue
        try:
            if line.startswith("/"):
                _say(talk.command(line))
            else:
                speed = talk.ask(line, _print)
                print(flush=True)
                _say(str(speed))
        except KeyboardInterrupt:  # before the first token: nothing of the answer is there, and the message not added
            print()
            _say("stopped")
        except (ValueError, OSError) as error:  # a conversation outlives a mistake
            _say(" ".join(str(error).split()))


class Conversation:
    """Messages so far, and the cache that holds them."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        system: str | None = None,
        past: Past | None = None,
        **options: Any,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.options = options
        self.messages = _opening(system)
        self.past = past or Past(max_len=1024)

    def ask(self, text: str, show: Callable[[Iterator[Piece]], str]) -> Speed:
        """Answer a message; ``show`` takes the pieces and returns as much of the answer as it took.

        Raises:
            ValueError: the conversation no longer fits in the model's context; the message is not added.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self.tokenizer.encode(self.tokenizer.chat(messages), add_special=False)
        context = self.model.config.max_position_embeddings
        if len(prompt) >= context:
            raise ValueError(f"the conversation has {len(prompt)} tokens, the model's context {context}: try /reset")
        speed = Speed(len(prompt))
        pieces = stream(self.model, self.tokenizer, prompt, past=self.past, **self.options)
        content = show(speed.watch(pieces))
        self.messages = [*messages, {"role": "assistant", "content": content}]
        return speed

    def command(self, line: str) -> str:
        """Obey a line that begins with ``/``; what to tell the user."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/reset":
            self.messages = [m for m in self.messages if m["role"] == "system"]
            return "forgotten"
        if name == "/system":
            self.messages = _opening(rest or None)
            return "system message set, conversation forgotten"
        if name == "/save":
            if not rest:
                raise ValueError("/save must name a file")
            Path(rest).expanduser().write_text(json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n")
            return f"{len(self.messages)} messages saved as {rest}"
        if name == "/help":
            return HELP
        raise ValueError(f"{name} is not a command; /help lists them")


def _opening(system: str | None) -> list[dict[str, str]]:
    return [] if system is None else [{"role": "system", "content": system}]


def _print(pieces: Iterator[Piece]) -> str:
    """Print the pieces as they come, until Ctrl-C; the text that came."""
    text = ""
    with _interrupts() as interrupted:
        for piece in pieces:
            text += piece.text
            print(piece.text, end="", flush=True)
            if interrupted:
                break
    return text


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that Ctrl-C adds to instead of raising: between two tokens is the time to stop."""
    received: list[int] = []
    try:
        before = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    except ValueError:  # not the main thread, which alone gets signals
        yield received
        return
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)


def _say(message: str) -> None:
    Console(stderr=True, soft_wrap=True).print(message, style="dim", markup=False, highlight=False)
