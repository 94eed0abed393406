"""What Prometheus is told: the engine's counters as they stand when it asks, and times that requests took."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from heddle.jax.engine import Engine

SECONDS = (0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)  #: upper ends of the histograms' buckets


class Metrics:
    """The server's, in a registry of its own."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Engine):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self.responses = Counter(
            "heddle_http_responses", "HTTP responses.", ("path", "status"), registry=self._registry
        )
        self.first_token = Histogram(
            "heddle_first_token_seconds", "From a request's arrival to its first token.",
            buckets=SECONDS, registry=self._registry,
        )  # fmt: skip
        self.duration = Histogram(
            "heddle_request_seconds", "From a request's arrival to its last token.",
            buckets=SECONDS, registry=self._registry,
        )  # fmt: skip

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine, counters = self._engine, self._engine.counters
        blocks = engine.scheduler.blocks
        for name, text, value in (
            ("requests", "Requests taken in.", counters.requests),
            ("requests_refused", "Requests refused because the queue was full.", counters.refused),
            ("prompt_tokens", "Tokens of prompts.", counters.prompt_tokens),
            ("reused_prompt_tokens", "Tokens of prompts that the cache held already.", counters.reused_tokens),
            ("generated_tokens", "Tokens of answers.", counters.tokens),
            ("engine_steps", "Steps of the engine.", counters.steps),
            ("preemptions", "Sequences that gave their blocks back and were read again.", engine.preemptions),
        ):
            yield CounterMetricFamily(f"heddle_{name}", text, value)
        finished = CounterMetricFamily("heddle_answers_finished", "Answers, by why they ended.", labels=["reason"])
        for reason, value in list(counters.finished.items()):
            finished.add_metric([reason], value)
        yield finished
        yield GaugeMetricFamily("heddle_requests_waiting", "Requests that wait.", engine.waiting)
        yield GaugeMetricFamily("heddle_sequences_running", "Sequences that run.", engine.running)
        states = GaugeMetricFamily("heddle_cache_blocks", "Blocks of the cache.", labels=["state"])
        idle, held = blocks.idle, blocks.held
        for state, value in (("held", held), ("idle", idle), ("blank", blocks.count - held - idle)):
            states.add_metric([state], value)
        yield states


class CountResponses:
    """ASGI middleware that counts responses by route and status."""

    def __init__(self, app: Any, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")
                self._metrics.responses.labels(path, message["status"]).inc()
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)
