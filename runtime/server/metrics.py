"""Metrics in Prometheus' format: requests, the queue, time to first token by stage, tokens, caches and memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ...models._mlx import mx
from ..benchmark.machine import peak_memory_bytes
from ..generate import Generation
from ..scheduler import SchedulerStats
from ..timings import TTFT_STAGES

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""The upper bounds of the times' buckets in seconds: from a cached prompt to a large model on a CPU."""

RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
"""The upper bounds of the buckets of decoding rates, in tokens per second."""

GAUGES = frozenset(("queued", "running", "batch", "cache_bytes"))
"""The values of `SchedulerStats` that also fall."""


class Metrics:
    """The metrics of one server."""

    def __init__(self, stats: Callable[[], SchedulerStats]) -> None:
        disable_created_metrics()  # a time of creation next to each value, which nothing here needs
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "fastvlm_requests", "Requests by route and status.", ("route", "status"), registry=self.registry
        )
        self._queue = Histogram("fastvlm_queue_seconds", "Time in the queue.", buckets=SECONDS, registry=self.registry)
        self._ttft = Histogram(
            "fastvlm_ttft_seconds", "Time to first token, without the queue.", buckets=SECONDS, registry=self.registry
        )
        self._stages = Histogram(
            "fastvlm_ttft_stage_seconds",
            "Time to first token by stage.",
            ("stage",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._decode = Histogram(
            "fastvlm_decode_tokens_per_second",
            "Tokens per second of one answer after its first token.",
            buckets=RATES,
            registry=self.registry,
        )
        self.registry.register(_Live(stats))

    def request(self, route: str, status: int) -> None:
        """Counts a request that has ended."""
        self._requests.labels(route, str(status)).inc()

    def answer(self, generation: Generation, queue_ms: float) -> None:
        """Records the times of an answer that was sent."""
        timings = generation.timings
        self._queue.observe(queue_ms / 1000)
        self._ttft.observe(timings.ttft_ms / 1000)
        for stage in TTFT_STAGES:
            self._stages.labels(stage.removesuffix("_ms")).observe(getattr(timings, stage) / 1000)
        if timings.decode_tps is not None:
            self._decode.observe(timings.decode_tps)

    def text(self) -> bytes:
        """Returns all values in Prometheus' text format."""
        return generate_latest(self.registry)


class _Live(Collector):
    """The scheduler's counts and the process's memory, read when they are asked for."""

    def __init__(self, stats: Callable[[], SchedulerStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for field in dataclasses.fields(stats):
            value = float(getattr(stats, field.name))
            words = field.name.replace("_", " ")
            if field.name in GAUGES:
                yield GaugeMetricFamily(f"fastvlm_{field.name}", f"Scheduler: {words}.", value)
            else:
                yield CounterMetricFamily(f"fastvlm_{field.name}", f"Scheduler: {words}.", value)
        yield GaugeMetricFamily("fastvlm_mlx_active_bytes", "Memory of MLX's arrays.", float(mx.get_active_memory()))
        peak = peak_memory_bytes()
        if peak is not None:
            yield GaugeMetricFamily("fastvlm_peak_memory_bytes", "Largest memory of this process so far.", float(peak))

    def describe(self) -> Iterator[Metric]:
        return iter(())
