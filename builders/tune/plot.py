"""write_plot: the whole search as one picture."""

from pathlib import Path
from typing import Any

from builders.tune.tuning_record import TrialRecord, TuningRecord

_CHOSEN, _OTHER, _FAILED, _BASE = "#0b7a3b", "#9aa5b1", "#b3261e", "#1a56a0"


def write_plot(path: Path, record: TuningRecord, title: str) -> bool:
    """Draw a search: what each trial brought, and throughput and latencies over concurrency.

    Returns:
        Whether it was drawn: not without matplotlib, which nothing else here needs.
    """
    try:
        from matplotlib.figure import Figure  # only whoever wants a picture needs it
    except ImportError:
        return False
    figure = Figure(figsize=(13.0, 4.6 + 0.42 * len(record.trials)), layout="constrained")
    figure.suptitle(title)
    grid = figure.add_gridspec(2, 3, height_ratios=[2.0 + 0.42 * len(record.trials), 4.0])
    _draw_trials(figure.add_subplot(grid[0, :]), record)
    _draw_curves(figure.add_subplot(grid[1, 0]), record, "goodput_tokens_per_s", "goodput, tokens/s", None)
    _draw_curves(figure.add_subplot(grid[1, 1]), record, "ttft_p95_s", "TTFT p95, s", record.ttft_limit_s)
    _draw_curves(figure.add_subplot(grid[1, 2]), record, "tpot_p95_s", "TPOT p95, s", record.tpot_limit_s)
    figure.savefig(path, dpi=100)
    return True


def _draw_trials(axes: Any, record: TuningRecord) -> None:
    trials = record.trials
    axes.barh(
        [trial.number for trial in trials],
        [_shown(trial) for trial in trials],
        color=[_colour(trial) for trial in trials],
    )
    most = max(map(_shown, trials), default=0.0) or 1.0
    for trial in trials:
        axes.text(_shown(trial) + 0.01 * most, trial.number, _label(trial), va="center", fontsize=8)
    axes.set_yticks([trial.number for trial in trials])
    axes.set_xlim(0.0, 1.9 * most)
    axes.invert_yaxis()
    axes.set_ylabel("trial")
    axes.set_xlabel(
        f"goodput, tokens/s (TTFT <= {record.ttft_limit_s:g} s and TPOT <= {record.tpot_limit_s:g} s "
        f"for {record.percentile:g} % of the requests)"
    )
    axes.set_title(f"{len(trials)} trials; {record.why}", fontsize=9)


def _draw_curves(axes: Any, record: TuningRecord, figure: str, label: str, limit: float | None) -> None:
    for trial in sorted(record.trials, key=lambda trial: trial.verdict == "chosen"):  # on top of the others
        points = sorted(trial.points, key=lambda point: point.concurrency)
        values = [getattr(point, figure) for point in points]
        shown = trial.verdict or None
        axes.plot([point.concurrency for point in points], values, "o-", color=_colour(trial), label=shown, ms=4)
    if limit is not None:
        axes.axhline(limit, color=_FAILED, ls="--", lw=1, label="limit")
    if any(trial.points for trial in record.trials):
        axes.set_xscale("log", base=2)
    axes.set_xlabel("concurrent requests")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0.0)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8)


def _shown(trial: TrialRecord) -> float:
    return trial.goodput_tokens_per_s if trial.meets else 0.0


def _colour(trial: TrialRecord) -> str:
    if trial.failure is not None:
        return _FAILED
    return {"chosen": _CHOSEN, "baseline": _BASE}.get(trial.verdict, _OTHER)


def _label(trial: TrialRecord) -> str:
    settings = ", ".join(f"{name.rpartition('.')[2]}={value}" for name, value in trial.settings.items()) or "as it is"
    if trial.failure is not None:
        return f"{settings}: {trial.failure.value}"
    if not trial.meets:
        return f"{settings}: misses the goal (limits are {trial.nearness:.0%} of what {trial.concurrency} took)"
    return f"{settings}: {trial.goodput_tokens_per_s:.4g} at {trial.concurrency}"
