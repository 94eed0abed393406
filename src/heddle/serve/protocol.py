"""Requests and answers in the form of OpenAI's API, and what they are to an engine."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from heddle.jax.paged import MOST_LOGPROBS
from heddle.jax.requests import Request
from heddle.jax.sampling import sampler

COMPLETION_TOKENS = 16  #: of an answer to /v1/completions where the request doesn't say, as OpenAI has it
MOST_STOPS = 16
MOST_PROMPTS = 128
MOST_FIELDS = 64  #: of one object: each that isn't known costs an error

T = TypeVar("T")
#: Of which the first wrong element is told: in a body full of them each would cost an error for every alternative.
FirstWrong = Annotated[list[T], Field(fail_fast=True)]
Nothing = Annotated[list[Any], Field(max_length=0, fail_fast=True)] | None  #: what clients send of what isn't served


class Refusal(Exception):
    """A request that can't be served: an HTTP status and OpenAI's error object."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refuse_invalid(error: ValidationError) -> Refusal:
    """One of a body's mistakes, by its field's name."""
    # Of a union pydantic tells each alternative's failure: the one that got furthest is the one that was meant. The
    # alternatives' names, and pydantic's for validators, say nothing.
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    first = max(errors, key=lambda each: len(each["loc"]))
    place = [str(part) for part in first["loc"] if isinstance(part, int) or part in _NAMES]
    param = ".".join(place) or None
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        param = ".".join(map(str, first["loc"]))
        message = "this field is not supported"
    if param is None:  # several fields together: the message begins with one's name
        return Refusal(400, message, message.split()[0] if message.split()[0] in _NAMES else None)
    return Refusal(400, f"{param}: {message}", param)


class _Body(BaseModel):
    # strict: "5" is no number. What isn't known is refused, not dropped.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_size(cls, given: Any) -> Any:
        if isinstance(given, dict) and len(given) > MOST_FIELDS:
            raise ValueError(f"an object must have at most {MOST_FIELDS} fields, got {len(given)}")
        return given


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | FirstWrong[Part] | None = None
    name: str | None = None
    # An answer comes back with the next question as OpenAI's client has it.
    refusal: None = None
    annotations: Nothing = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing = None

    def plain(self) -> dict[str, str]:
        """As chat templates have it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class Part(_Body):
    type: Literal["text"]
    text: str


class _Sampled(_Body):
    """What both kinds of request have."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: str | FirstWrong[str] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Said to us, of no consequence here.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, value: Any) -> Any:
        strings = [value] if isinstance(value, str) else value or []
        if len(strings) > MOST_STOPS or not all(strings):
            raise ValueError(f"must be at most {MOST_STOPS} strings that aren't empty")
        return value

    @model_validator(mode="after")
    def _check_stream_options(self):
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options must go with stream")
        return self

    @property
    def usage_too(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def answers(self) -> int:
        return self.n or 1

    def request(
        self, prompt: str | Sequence[int], max_tokens: int, logprobs: int | None, timeout: float | None
    ) -> Request:
        """What an engine is asked."""
        seed = secrets.randbits(32) if self.seed is None else self.seed % 2**32
        chosen = sampler(
            1.0 if self.temperature is None else self.temperature, self.top_k, self.top_p, self.min_p,
            self.repetition_penalty, self.presence_penalty or None, self.frequency_penalty or None,
        )  # fmt: skip
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        ends = () if self.ignore_eos else None
        return Request(prompt, max_tokens, chosen, seed, self.answers, stop, ends, logprobs=logprobs, timeout=timeout)


class CompletionBody(_Sampled):
    """/v1/completions"""

    prompt: str | FirstWrong[str] | FirstWrong[int] | FirstWrong[FirstWrong[int]]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _check_together(self):
        if self.best_of not in (None, self.answers):
            raise ValueError("best_of must be n: answers are not ranked here")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo must be false with logprobs: the prompt's are not computed")
        return self

    @property
    def likeliest(self) -> int | None:
        """Of how many tokens besides the chosen one to tell log-probabilities; None: of none."""
        return self.logprobs

    @property
    def limit(self) -> int | None:
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, of one or many."""
        given = self.prompt
        one = isinstance(given, str) or not given or isinstance(given[0], int)
        prompts: list[Any] = [given] if one else list(given)
        if len(prompts) > MOST_PROMPTS:
            raise Refusal(400, f"prompt: must be at most {MOST_PROMPTS} prompts, got {len(prompts)}", "prompt")
        return prompts


class ResponseFormat(_Body):
    type: Literal["text"]


class ChatBody(_Sampled):
    """/v1/chat/completions"""

    messages: Annotated[FirstWrong[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    response_format: ResponseFormat | None = None
    tools: Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: Nothing = None
    function_call: Literal["none", "auto"] | None = None
    # Known to OpenAI's clients, some of which say that they don't want it.
    audio: None = None
    moderation: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None
    modalities: FirstWrong[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _check_together(self):
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs must go with logprobs")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def likeliest(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


_BODIES = (CompletionBody, ChatBody, Message, Part, StreamOptions, ResponseFormat)
_NAMES = {name for body in _BODIES for name in body.model_fields}
