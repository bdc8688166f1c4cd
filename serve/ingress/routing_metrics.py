"""What routing counts, in Prometheus' form; made when someone asks."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as PrometheusMetric

from serve import telemetry
from serve.core.histogram import Histogram
from serve.ingress.routing_desk import RoutingDesk
from serve.router.board import RoutingBoard
from serve.telemetry import Metric

Samples = Iterable[tuple[tuple[str, ...], float]]  # label values after the model, and the value


def routing_families(desk: RoutingDesk) -> Iterator[PrometheusMetric]:
    """Yield every routing metric of `telemetry.GATEWAY_METRICS`."""
    boards = desk.boards.values()
    yield _numbers(boards, telemetry.ROUTING_DECISIONS, lambda board: sorted(board.counts.decisions.items()))
    yield _numbers(boards, telemetry.ROUTING_REFUSALS, lambda board: [((), board.counts.refusals)])
    yield _histogram(boards, telemetry.ROUTING_DECISION, lambda board: board.counts.decision_s)
    yield _numbers(boards, telemetry.ROUTING_PROMPT_TOKENS, lambda board: [((), board.counts.prompt_tokens)])
    yield _numbers(boards, telemetry.ROUTING_EXPECTED_TOKENS, lambda board: [((), board.counts.expected_tokens)])
    yield _numbers(boards, telemetry.ROUTING_CACHED_TOKENS, lambda board: [((), board.counts.cached_tokens)])
    yield _numbers(boards, telemetry.ROUTING_MISSED_BLOCKS, lambda board: sorted(board.counts.missed_blocks.items()))
    yield _histogram(boards, telemetry.ROUTING_TTFT_RATIO, lambda board: board.counts.ttft_ratio)
    yield from _queue_families(desk)
    yield _numbers(boards, telemetry.ROUTING_INDEX_BLOCKS, _index_blocks)
    yield _numbers(boards, telemetry.ROUTING_REPLICAS, _replicas)
    for metric, name in telemetry.EVENT_PLANE_COUNTS.items():
        yield _numbers(boards, metric, partial(_heard, name))
    log = telemetry.REQUEST_LOG_DROPPED
    yield CounterMetricFamily(log.name, log.help, value=desk.log_dropped)


def _queue_families(desk: RoutingDesk) -> Iterator[PrometheusMetric]:
    metric = telemetry.ROUTING_QUEUED
    queued = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
    metric = telemetry.ROUTING_QUEUE_WAIT
    waits = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
    metric = telemetry.ROUTING_TURNED_AWAY
    refused = CounterMetricFamily(metric.name, metric.help, labels=metric.labels)
    for model, gate in desk.gates.items():
        for tenant, count in sorted(gate.queued().items()):
            queued.add_metric([model, tenant], count)
        buckets, total_s = gate.waited_s.cumulated()
        waits.add_metric([model], buckets, total_s)
        for reason, count in sorted(gate.turned_away.items()):
            refused.add_metric([model, reason], count)
    yield from (queued, waits, refused)


def _heard(name: str, board: RoutingBoard) -> Samples:
    return [((), getattr(board.roster.feeds.counts, name))]


def _replicas(board: RoutingBoard) -> Samples:
    roster = board.roster
    return [(("yes",), roster.heard), (("no",), len(roster) - roster.heard)]


def _index_blocks(board: RoutingBoard) -> Samples:
    router = board.roster.router
    return [((), len(router.index) if router is not None else 0)]


def _numbers(
    boards: Iterable[RoutingBoard], metric: Metric, samples: Callable[[RoutingBoard], Samples]
) -> PrometheusMetric:
    make = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = make(metric.name, metric.help, labels=metric.labels)
    for board in boards:
        for labels, value in samples(board):
            family.add_metric([board.model, *labels], value)
    return family


def _histogram(
    boards: Iterable[RoutingBoard], metric: Metric, histogram: Callable[[RoutingBoard], Histogram]
) -> PrometheusMetric:
    family = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
    for board in boards:
        buckets, total = histogram(board).cumulated()
        family.add_metric([board.model], buckets, total)
    return family
