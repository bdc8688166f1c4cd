"""write_plot: TTFT distributions, load of the replicas over time, and hit rates, as one picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from serve.errors import ConfigError
from sim.metrics import Summary
from sim.outcome import Column, Outcome
from sim.study import Result

_MAX_SHOWN = 10  # results that are drawn, the best ones; more cannot be told apart
_MAX_LOADS = 6  # of them, those whose replicas' load is drawn
_SPANS = 240


def write_plot(path: Path, results: Sequence[Result], summaries: Sequence[Summary], title: str) -> None:
    """Draw the results, or the best of them.

    Args:
        path: Of the picture; its suffix says of which kind.
        results: At least one.
        summaries: Of the results, in the same order.
        title: Above it all.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        # Only whoever wants a picture needs it.
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "--plot needs matplotlib: pip install matplotlib, or use --json and draw it yourself"
        ) from None
    by_rank = sorted(range(len(results)), key=lambda i: (-summaries[i].goodput_per_s, summaries[i].ttft_s.p90))
    drawn = sorted(by_rank[:_MAX_SHOWN])
    results, summaries = [results[i] for i in drawn], [summaries[i] for i in drawn]
    shown = results[:_MAX_LOADS]
    figure = Figure(figsize=(13.0, 4.2 + 1.5 * len(shown)), layout="constrained")
    figure.suptitle(title if len(drawn) == len(by_rank) else f"{title}; the best {len(drawn)} of {len(by_rank)}")
    grid = figure.add_gridspec(1 + len(shown), 2, height_ratios=[3.0, *[1.1] * len(shown)])
    _draw_ttft(figure.add_subplot(grid[0, 0]), results)
    _draw_hits(figure.add_subplot(grid[0, 1]), results, summaries)
    most = max(float(_in_flight(result.outcome)[1].max(initial=1.0)) for result in shown)
    for row, result in enumerate(shown, 1):
        _draw_load(figure.add_subplot(grid[row, :]), result, most, row == len(shown))
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"--plot {path}: {exc}; give the name of a .png, .svg or .pdf file") from None


def _draw_ttft(axes: Any, results: Sequence[Result]) -> None:
    for result in results:
        ttft_s = np.sort(result.outcome.ttft_s[result.outcome.served])
        # Refused requests never get there.
        share = np.arange(1, len(ttft_s) + 1) / max(1, len(result.outcome.arrival_s))
        axes.plot(ttft_s, share, label=result.case.label, linewidth=1.2)
    axes.set(xscale="log", xlabel="TTFT, s", ylabel="share of the requests", ylim=(0, 1), title="Time to first token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")


def _draw_hits(axes: Any, results: Sequence[Result], summaries: Sequence[Summary]) -> None:
    labels = [result.case.label for result in results]
    bars = axes.barh(labels, [100.0 * summary.hit_rate for summary in summaries])
    axes.bar_label(bars, fmt="%.1f", fontsize="x-small", padding=2)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize="x-small")
    axes.set(xlabel="% of the prompt tokens", title="Found in the cache")


def _draw_load(axes: Any, result: Result, most: float, is_last: bool) -> None:
    times, loads = _in_flight(result.outcome)
    replicas = len(result.outcome.busy_s)
    axes.imshow(
        loads,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        extent=(0.0, float(times[-1]), -0.5, replicas - 0.5),
        vmin=0.0,
        vmax=most,
        cmap="magma_r",
    )
    axes.set_ylabel(f"{result.case.label}\nreplica", fontsize="x-small")
    if is_last:
        axes.set_xlabel(f"s; requests in flight on each replica, black: {most:.1f}")


def _in_flight(outcome: Outcome) -> tuple[Column, Column]:
    """Return the ends of equal spans of time, and (replicas, spans) requests in flight, each span's mean."""
    edges = np.linspace(0.0, max(outcome.end_of_all_s, 1e-3), _SPANS + 1)
    loads = np.zeros((len(outcome.busy_s), _SPANS))
    for replica in range(len(outcome.busy_s)):
        mine = outcome.replica == replica
        seconds = _seconds_since(outcome.arrival_s[mine], edges) - _seconds_since(outcome.end_s[mine], edges)
        loads[replica] = np.diff(seconds) / np.diff(edges)
    return edges[1:], loads


def _seconds_since(moments: Column, at_s: Column) -> Column:
    """Return at each time the sum of the seconds that have passed since each of the moments before it."""
    moments = np.sort(moments)
    before = np.searchsorted(moments, at_s)
    sums = np.concatenate(([0.0], np.cumsum(moments)))
    return before * at_s - sums[before]
