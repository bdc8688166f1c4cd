"""GatewayMetrics: counts what the gateway does, for Prometheus.

A recorded value costs a fraction of a microsecond: numbers are plain attributes of one event loop, and turned into
Prometheus' form only when someone asks.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import (
    Metric as PrometheusMetric,
)
from prometheus_client.registry import Collector

from serve import telemetry
from serve.core.histogram import Histogram
from serve.ingress.routing_desk import RoutingDesk
from serve.ingress.routing_metrics import routing_families
from serve.telemetry import Metric


class ModelMetrics:
    """What is counted for one model."""

    __slots__ = (
        "cached_tokens",
        "completion_tokens",
        "e2e",
        "in_flight",
        "itl",
        "prefill",
        "prompt_tokens",
        "queue",
        "tpot",
        "ttft",
        "waiting",
    )

    def __init__(self) -> None:
        """Start at zero."""
        self.ttft = Histogram(telemetry.TTFT.buckets)
        self.itl = Histogram(telemetry.ITL.buckets)
        self.tpot = Histogram(telemetry.TPOT.buckets)
        self.e2e = Histogram(telemetry.E2E.buckets)
        self.queue = Histogram(telemetry.QUEUE.buckets)
        self.prefill = Histogram(telemetry.PREFILL.buckets)
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.in_flight = 0
        self.waiting = 0


class GatewayMetrics(Collector):
    """All that one gateway counts, in a registry of its own."""

    def __init__(self, models: Iterable[str], fallbacks: Callable[[], Mapping[str, str]], desk: RoutingDesk) -> None:
        """Start at zero for each model id; `fallbacks` and `desk` are asked when someone reads the numbers."""
        self._fallbacks = fallbacks
        self._desk = desk
        self.models = {model: ModelMetrics() for model in models}
        self.requests_in_flight = 0
        self._requests: Counter[tuple[str, str, int]] = Counter()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def count_request(self, model: str, endpoint: str, status: int) -> None:
        """Count an answer. `model` is empty if the request named none that is served."""
        self._requests[model, endpoint, status] += 1

    def exposition(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[PrometheusMetric]:
        """Yield every metric of `telemetry.GATEWAY_METRICS`."""
        requests = CounterMetricFamily(
            telemetry.REQUESTS.name, telemetry.REQUESTS.help, labels=telemetry.REQUESTS.labels
        )
        for (model, endpoint, status), count in sorted(self._requests.items()):
            requests.add_metric([model, endpoint, str(status)], count)
        yield requests
        in_flight = telemetry.REQUESTS_IN_FLIGHT
        yield GaugeMetricFamily(in_flight.name, in_flight.help, value=self.requests_in_flight)
        yield self._numbers(telemetry.SEQUENCES_IN_FLIGHT, "in_flight")
        yield self._numbers(telemetry.SEQUENCES_WAITING, "waiting")
        yield self._histograms(telemetry.TTFT, "ttft")
        yield self._histograms(telemetry.ITL, "itl")
        yield self._histograms(telemetry.TPOT, "tpot")
        yield self._histograms(telemetry.E2E, "e2e")
        yield self._histograms(telemetry.QUEUE, "queue")
        yield self._histograms(telemetry.PREFILL, "prefill")
        yield self._numbers(telemetry.PROMPT_TOKENS, "prompt_tokens")
        yield self._numbers(telemetry.CACHED_TOKENS, "cached_tokens")
        yield self._numbers(telemetry.COMPLETION_TOKENS, "completion_tokens")
        active = GaugeMetricFamily(telemetry.FALLBACK.name, telemetry.FALLBACK.help, labels=telemetry.FALLBACK.labels)
        fallbacks = self._fallbacks()
        for model in self.models:
            active.add_metric([model], float(model in fallbacks))
        yield active
        yield from routing_families(self._desk)

    def _numbers(self, metric: Metric, attribute: str) -> PrometheusMetric:
        make = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
        family = make(metric.name, metric.help, labels=metric.labels)
        for model, metrics in self.models.items():
            family.add_metric([model], getattr(metrics, attribute))
        return family

    def _histograms(self, metric: Metric, attribute: str) -> PrometheusMetric:
        family = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
        for model, metrics in self.models.items():
            buckets, total = getattr(metrics, attribute).cumulated()
            family.add_metric([model], buckets, total)
        return family
