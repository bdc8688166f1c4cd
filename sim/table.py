"""Tables of summaries: a row for each policy and fleet."""

import math
from collections.abc import Sequence

from sim.metrics import Summary

_COLUMNS = (
    "policy",
    "replicas",
    "hit %",
    "TTFT ms p50",
    "p90",
    "p99",
    "TPOT ms p50",
    "p90",
    "p99",
    "queue ms p50",
    "p90",
    "goodput/s",
    "good %",
    "spread req",
    "busy",
    "util %",
    "out tok/s",
    "GPU-s/1k tok",
    "refused",
)


def format_table(summaries: Sequence[Summary]) -> str:
    """Return a table for a terminal, a line for each summary."""
    rows = [_COLUMNS, *(_row(summary) for summary in summaries)]
    priced = any(not math.isnan(summary.dollars_per_1m_tokens) for summary in summaries)
    if priced:
        prices = ("$/1M tok", *(f"{summary.dollars_per_1m_tokens:.2f}" for summary in summaries))
        rows = [(*row, price) for row, price in zip(rows, prices, strict=True)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(_pad(cell, width, i == 0) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _pad(cell: str, width: int, left: bool) -> str:
    return cell.ljust(width) if left else cell.rjust(width)


def _row(s: Summary) -> tuple[str, ...]:
    return (
        s.policy,
        str(s.replicas),
        f"{100 * s.hit_rate:.1f}",
        *(f"{1e3 * value:.0f}" for value in (s.ttft_s.p50, s.ttft_s.p90, s.ttft_s.p99)),
        *(f"{1e3 * value:.1f}" for value in (s.tpot_s.p50, s.tpot_s.p90, s.tpot_s.p99)),
        *(f"{1e3 * value:.0f}" for value in (s.queue_s.p50, s.queue_s.p90)),
        f"{s.goodput_per_s:.3f}",
        f"{100 * s.goodput_share:.1f}",
        f"{s.spread_requests:.2f}",
        f"{s.spread_busy:.2f}",
        f"{100 * s.utilisation:.0f}",
        f"{s.output_tokens_per_s:.0f}",
        f"{s.gpu_s_per_1k_tokens:.2f}",
        str(s.refused),
    )
