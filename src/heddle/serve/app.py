"""The server's application: OpenAI's API, health, metrics and the chat page."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from heddle.jax.engine import Closed, Engine, QueueFull
from heddle.jax.requests import CANCELLED, ERROR, TIMEOUT, Event, Handle

from .answers import ChatForm, CompletionForm, Form
from .metrics import CountResponses, Metrics
from .protocol import ChatBody, CompletionBody, Refusal, refuse_invalid

PAGE = Path(__file__).parent / "page.html"
#: The page holds no reference to anything but this server.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
BODY_SECONDS = 30.0  #: in which a request's body has to arrive

Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Args:
        body_bytes: of its body.
        max_tokens: of one answer.
        seconds: until it is broken off.
    """

    body_bytes: int = 2**20
    max_tokens: int = 4096
    seconds: float = 600.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")


def create_app(engine: Engine, name: str, *, api_keys: Sequence[str] = (), limits: Limits | None = None) -> FastAPI:
    """The application over a running engine.

    Args:
        engine: started.
        name: the model's, as requests give it.
        api_keys: one of them has to come with each request to ``/v1``; none: anyone may ask.
        limits: what a request may ask for.

    Raises:
        ValueError: an empty key.
    """
    if not all(api_keys):
        raise ValueError("api_keys must not be empty strings")
    app = FastAPI(title="Heddle", docs_url=None, redoc_url=None)  # whose pages load assets from elsewhere
    service = Service(engine, name, limits or Limits(), Metrics(engine))
    digests = [hashlib.sha256(key.encode()).digest() for key in api_keys]

    def authorized(request: Request) -> None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode()).digest()
        # Every key is compared, each in constant time: how long it takes says nothing about them.
        known = [hmac.compare_digest(given, digest) for digest in digests]
        if digests and not (any(known) and scheme.lower() == "bearer"):
            raise Refusal(401, "the API key is missing or wrong", code="invalid_api_key")

    guard = [Depends(authorized)]

    @app.get("/v1/models", dependencies=guard)
    async def models() -> Any:
        return {"object": "list", "data": [service.model]}

    @app.get("/v1/models/{model:path}", dependencies=guard)
    async def model(model: str) -> Any:
        service.check_model(model)
        return service.model

    @app.post("/v1/completions", dependencies=guard)
    async def completions(request: Request) -> Response:
        return await service.completions(request)

    @app.post("/v1/chat/completions", dependencies=guard)
    async def chat(request: Request) -> Response:
        return await service.chat(request)

    @app.get("/health")
    async def health() -> Response:
        status = "ok" if engine.alive and not engine.closing else "stopping" if engine.alive else "stopped"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=Metrics.media_type)

    @app.get("/")
    async def page() -> Response:
        return FileResponse(PAGE, headers={"content-security-policy": POLICY, "cache-control": "no-cache"})

    @app.exception_handler(Refusal)
    async def refuse(request: Request, error: Refusal) -> Response:
        headers = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}, 503: {"retry-after": "5"}}
        if error.code == "timeout":  # OpenAI's client would ask again, and wait as long again
            headers = {408: {"x-should-retry": "false"}}
        return JSONResponse(error.body(), error.status, headers.get(error.status))

    @app.exception_handler(HTTPException)
    async def refuse_http(request: Request, error: HTTPException) -> Response:
        refusal = Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse(refusal.body(), error.status_code, error.headers)

    app.add_middleware(CountResponses, metrics=service.metrics)
    return app


class Service:
    """What the routes do.

    Arguments as of :func:`create_app`.
    """

    def __init__(self, engine: Engine, name: str, limits: Limits, metrics: Metrics):
        self.engine, self.limits, self.metrics = engine, limits, metrics
        self.model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "heddle"}

    # ------------------------------------------------------------------ requests

    async def completions(self, http: Request) -> Response:
        body = await self._read(http, CompletionBody)
        prompts, limit = body.prompts(), self._limit(body.limit, "max_tokens")
        requests = [body.request(prompt, limit, body.logprobs, self.limits.seconds) for prompt in prompts]
        handles = await asyncio.to_thread(self._submit, requests)  # a long text's ids take a while
        form = CompletionForm(self.model["id"], self.engine.tokenizer, body, handles)
        return await self._answer(http, body, handles, form)

    async def chat(self, http: Request) -> Response:
        body = await self._read(http, ChatBody)
        name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        tokenizer = self.engine.tokenizer
        limit = self.limits.max_tokens if body.limit is None else self._limit(body.limit, name)

        def submit() -> list[Handle]:
            try:
                prompt = tokenizer.encode(tokenizer.chat([m.plain() for m in body.messages]), add_special=False)
            except ValueError as error:
                raise Refusal(400, f"messages: {error}", "messages") from None
            return self._submit([body.request(prompt, limit, body.likeliest, self.limits.seconds)], "messages")

        handles = await asyncio.to_thread(submit)
        return await self._answer(http, body, handles, ChatForm(self.model["id"], tokenizer, body, handles))

    async def _read(self, http: Request, kind: type[Body]) -> Any:
        """The body, checked.

        Only JSON is read: a browser sends that to another site's server only if the server agrees.
        """
        if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "content-type must be application/json")
        too_large = Refusal(413, f"the body must be at most {self.limits.body_bytes} bytes")
        length = http.headers.get("content-length", "")
        if length.isdecimal() and int(length) > self.limits.body_bytes:
            raise too_large
        received = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in http.stream():
                    received += chunk
                    if len(received) > self.limits.body_bytes:
                        raise too_large
        except TimeoutError:
            raise Refusal(408, f"the body must arrive within {BODY_SECONDS:.0f} seconds") from None
        except ClientDisconnect:
            raise Refusal(400, "the body ended early") from None
        try:
            body: Any = kind.model_validate_json(bytes(received))
        except ValidationError as error:
            raise refuse_invalid(error) from None
        self.check_model(body.model)
        return body

    def check_model(self, name: str) -> None:
        if name != self.model["id"]:
            raise Refusal(404, f"model must be {self.model['id']!r}, got {name!r}", "model", "model_not_found")

    def _limit(self, asked: int | None, name: str) -> int:
        if asked is None or asked > self.limits.max_tokens:
            raise Refusal(400, f"{name} must be at most {self.limits.max_tokens}, got {asked}", name)
        return asked

    def _submit(self, requests: Sequence[Any], name: str = "prompt") -> list[Handle]:
        """All or none."""
        handles: list[Handle] = []
        try:
            for request in requests:
                handles.append(self.engine.submit(request))
        except (ValueError, QueueFull, Closed) as error:
            for handle in handles:
                handle.cancel()
            if isinstance(error, QueueFull):
                raise Refusal(429, f"the server is busy: {error}", code="queue_full") from None
            if isinstance(error, Closed):
                raise Refusal(503, str(error), code="stopping") from None
            word = str(error).split()[0]
            raise Refusal(400, str(error), name if word == "prompt" else word) from None
        return handles

    # ------------------------------------------------------------------ answers

    async def _answer(self, http: Request, body: Any, handles: list[Handle], form: Form) -> Response:
        if body.stream:
            return StreamingResponse(self._stream(handles, form), media_type="text/event-stream", headers=_UNBUFFERED)
        gone = asyncio.create_task(_disconnected(http))
        gathered = asyncio.create_task(self._gather(handles, form))
        try:
            await asyncio.wait((gone, gathered), return_when=asyncio.FIRST_COMPLETED)
            if not gathered.done():
                return Response(status_code=499)  # nobody is there to read it
            return JSONResponse(gathered.result())
        finally:
            for handle in handles:
                handle.cancel()
            for task in (gone, gathered):
                task.cancel()

    async def _events(self, handles: list[Handle]) -> AsyncGenerator[tuple[int, Handle, Event]]:
        """The events of all handles as they come, each with its choice's number."""
        arrived: asyncio.Queue = asyncio.Queue()

        async def forward(first: int, handle: Handle) -> None:
            async for event in handle:
                await arrived.put((first + event.index, handle, event))

        firsts = [sum(h.request.n for h in handles[:i]) for i in range(len(handles))]
        tasks = [asyncio.create_task(forward(first, handle)) for first, handle in zip(firsts, handles, strict=True)]
        left, begun = sum(handle.request.n for handle in handles), set()
        try:
            while left:
                choice, handle, event = await arrived.get()
                left -= event.finish_reason is not None
                if handle not in begun and event.token >= 0:
                    begun.add(handle)
                    self.metrics.first_token.observe(time.monotonic() - handle.arrival)
                yield choice, handle, event
            for handle in handles:
                self.metrics.duration.observe(time.monotonic() - handle.arrival)
        finally:
            for handle in handles:  # whatever is left, if nobody waits for it any more
                handle.cancel()
            for task in tasks:
                task.cancel()

    async def _gather(self, handles: list[Handle], form: Form) -> dict[str, Any]:
        async with contextlib.aclosing(self._events(handles)) as events:
            async for choice, handle, event in events:
                _check_end(event, self.limits)
                form.add(choice, handle, event)
        return form.whole()

    async def _stream(self, handles: list[Handle], form: Form) -> AsyncIterator[str]:
        def send(data: Any) -> str:
            return f"data: {json.dumps(data)}\n\n"  # in ASCII: some clients end lines at U+2028 and U+0085 too

        try:
            for chunk in form.opening():
                yield send(chunk)
            async with contextlib.aclosing(self._events(handles)) as events:
                async for choice, handle, event in events:
                    _check_end(event, self.limits)
                    if (chunk := form.add(choice, handle, event)) is not None:
                        yield send(chunk)
            for chunk in form.closing():
                yield send(chunk)
            yield "data: [DONE]\n\n"
        except Refusal as error:
            yield send(error.body())
        finally:
            for handle in handles:
                handle.cancel()


_UNBUFFERED = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def _check_end(event: Event, limits: Limits) -> None:
    """Ends that aren't answers are errors."""
    if event.finish_reason == TIMEOUT:
        raise Refusal(408, f"the answer took longer than {limits.seconds:g} seconds", code="timeout")
    if event.finish_reason == CANCELLED:
        raise Refusal(503, "the server is stopping", code="stopping")
    if event.finish_reason == ERROR:
        raise Refusal(500, "the model failed; the server's log says why")


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
