"""What the proxy counts, in the format of Prometheus; no label holds a tenant, a key or a prompt."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

_PREFIX = "kvbench_proxy_"

#: Upper edges in seconds: a hit from memory at one end, a long generation at the other.
_HIT_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 1.0)
_UPSTREAM_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The counters of one proxy, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(_PREFIX + name, text, labels, registry=self.registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(_PREFIX + name, text, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(_PREFIX + name, text, labels, buckets=buckets, registry=self.registry)

        self.hits = counter("hits_total", "Answers from the cache.", "kind")
        self.misses = counter("misses_total", "Lookups without an answer.", "reason")
        self.missed_only = counter(
            "missed_only_total", "Misses that differ from an earlier request in one part.", "part"
        )
        self.bypasses = counter("bypasses_total", "Requests that were not looked up.", "reason")
        self.refused = counter("refused_requests_total", "Requests that got no answer.", "reason")
        self.joined = counter("joined_total", "Requests that shared a call in flight.")
        self.upstream_calls = counter("upstream_calls_total", "Calls to the server.", "status")
        self.stopped = counter("stopped_generations_total", "Generations that nobody waited for.")
        self.guards = counter("guard_refusals_total", "Semantic hits that were refused.", "guard")
        self.stored = counter("stored_total", "Answers that were stored.")
        self.not_stored = counter("not_stored_total", "Answers that were not.", "reason")
        self.store_errors = counter("store_errors_total", "Failures of the store.")
        self.tokens = counter(
            "tokens_total",
            "Tokens served: paid for at the server, or saved by the cache.",
            "kind",
            "source",
        )
        self.money = counter("money_saved_total", "Price of the tokens saved.", "currency")
        self.entries = gauge("entries", "Answers in the store.")
        self.bytes = gauge("store_bytes", "Bytes of the answers in the store.")
        self.index_entries = gauge("index_entries", "Questions in the semantic index.")
        self.index_bytes = gauge("index_bytes", "Bytes of the semantic index.")
        self.flights = gauge("calls_in_flight", "Calls to the server under way.")
        self.connections = gauge("open_connections", "Open client connections.")
        self.hit_seconds = histogram(
            "hit_duration_seconds",
            "From the request's head to the last byte of a hit.",
            _HIT_BUCKETS,
        )
        self.upstream_seconds = histogram(
            "upstream_duration_seconds",
            "From a call to the server until its first byte, and until its end.",
            _UPSTREAM_BUCKETS,
            "until",
        )
        #: What every hit counts, looked up once.
        self.exact_hits = self.hits.labels("exact")
        self.saved_prompt = self.tokens.labels("prompt", "cache")
        self.saved_completion = self.tokens.labels("completion", "cache")
        self.encoder_seconds = histogram(
            "semantic_duration_seconds", "Lookups in the semantic cache.", _UPSTREAM_BUCKETS
        )

    def exposition(self) -> tuple[bytes, str]:
        """Return all metrics as text, and the content type of it."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
