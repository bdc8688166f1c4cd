"""Plots of benchmark results, as PNG."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np


def save_histogram(path: Path, series: Mapping[str, list[float]]) -> None:
    """Draw one histogram a series below each other, on logarithmic milliseconds, with p50 and p99 marked."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(series), 1, figsize=(9, 2.3 * len(series)), sharex=True, squeeze=False)
    bins = np.logspace(-3, 3, 121)
    for axis, (name, values) in zip(axes[:, 0], series.items(), strict=True):
        clipped = np.clip(values, bins[0], bins[-1])
        axis.hist(clipped, bins=bins, color="#4c78a8")
        for fraction, style in ((50, "-"), (99, "--")):
            value = float(np.percentile(clipped, fraction))
            axis.axvline(value, color="#e45756", linestyle=style, label=f"p{fraction} {value:.2f} ms")
        axis.set_title(f"{name} (n = {len(values)})", fontsize=9, loc="left")
        axis.set_xscale("log")
        axis.set_ylabel("count")
        axis.legend(fontsize=8)
    axes[-1, 0].set_xlabel("ms")
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
