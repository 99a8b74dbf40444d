"""What ``/metrics`` shows, in the Prometheus text format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from headrace.inbox import Inbox
from headrace.model import Receipt


class Metrics:
    """Counts of one server process."""

    def __init__(self, inbox: Inbox) -> None:
        self._registry = CollectorRegistry()
        self._uploads = Counter("headrace_uploads", "Uploads acknowledged", registry=self._registry)
        self._records = Counter("headrace_records", "Records acknowledged", registry=self._registry)
        self._rejected = Counter("headrace_rejected", "Records refused within an upload", registry=self._registry)
        self._seconds = Histogram("headrace_upload_seconds", "From first byte to durable", registry=self._registry)
        self._failures = Counter("headrace_errors", "Error answers", ["code"], registry=self._registry)
        held = Gauge("headrace_inbox_bytes", "Bytes waiting for the flusher", registry=self._registry)
        held.set_function(lambda: inbox.held_bytes)

    def uploaded(self, receipt: Receipt, seconds: float) -> None:
        """Count one acknowledged upload."""
        self._uploads.inc()
        self._records.inc(receipt.accepted - receipt.duplicates)
        self._rejected.inc(receipt.rejected)
        self._seconds.observe(seconds)

    def failed(self, code: str) -> None:
        """Count one error answer."""
        self._failures.labels(code).inc()

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self._registry)
