"""What ``/metrics`` shows, in the Prometheus text format."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

from headrace.inbox import Inbox
from headrace.model import Receipt

_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Metrics:
    """Counts of one server process."""

    def __init__(self, inbox: Inbox) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._uploads = self._records = self._rejected = 0
        self._seconds = 0.0
        self._within = [0] * (len(_BOUNDS) + 1)
        self._failures = Counter("headrace_errors", "Error answers", ["code"], registry=self._registry)
        held = Gauge("headrace_inbox_bytes", "Bytes waiting for the flusher", registry=self._registry)
        held.set_function(lambda: inbox.held_bytes)

    def uploaded(self, receipt: Receipt, seconds: float) -> None:
        """Count one acknowledged upload."""
        # Plain numbers of the one event loop: a counter with its lock would cost a tenth of a small upload.
        self._uploads += 1
        self._records += receipt.accepted - receipt.duplicates
        self._rejected += receipt.rejected
        self._seconds += seconds
        self._within[bisect_left(_BOUNDS, seconds)] += 1

    def collect(self) -> Iterator[Metric]:
        """The plain numbers, for the registry."""
        yield CounterMetricFamily("headrace_uploads", "Uploads acknowledged", self._uploads)
        yield CounterMetricFamily("headrace_records", "Records acknowledged", self._records)
        yield CounterMetricFamily("headrace_rejected", "Records refused within an upload", self._rejected)
        names = [*(f"{bound:g}" for bound in _BOUNDS), "+Inf"]
        buckets = list(zip(names, accumulate(self._within), strict=True))
        yield HistogramMetricFamily("headrace_upload_seconds", "From first byte to durable", buckets, self._seconds)

    def failed(self, code: str) -> None:
        """Count one error answer."""
        self._failures.labels(code).inc()

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self._registry)
