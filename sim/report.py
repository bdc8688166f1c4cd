"""Report: what `raytrt simulate` prints, as text or JSON."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from serve.engines.simulated.settings import RooflineSettings
from sim.bootstrap import Difference
from sim.deployment import SimDeployment
from sim.measured import Measured
from sim.metrics import Summary
from sim.recommend import Comparison, Recommendation
from sim.slo import Slo
from sim.table import format_table
from sim.workload import Workload


@dataclass(frozen=True)
class Report:
    """Results of one command.

    Attributes:
        workload, deployment, slo: What was simulated.
        summaries: A row of the table each.
        measured: What a request log says of the real run.
        advice: For each fleet size, if it was asked for.
    """

    workload: Workload
    deployment: SimDeployment
    slo: Slo
    summaries: tuple[Summary, ...]
    measured: Measured | None
    advice: tuple[Recommendation, ...]

    @property
    def title(self) -> str:
        """One line that says what was simulated."""
        engine, workload = self.deployment.engine, self.workload
        latency = engine.latency
        what = "fixed rates"
        if isinstance(latency, RooflineSettings):
            model = latency.model if isinstance(latency.model, str) else f"{latency.shape.layers} layers"
            what = f"{model} {latency.weights} on {latency.tensor_parallel} x {latency.datasheet.name}"
        blocks = engine.make_limits().total_blocks
        return (
            f"{workload.name}: {len(workload.requests)} requests in {workload.duration_s:.0f} s; {what}, "
            f"{blocks} KV blocks of {engine.tokens_per_block} tokens"
        )

    def text(self) -> str:
        """Return it for a terminal."""
        parts = [
            f"{self.title}; SLO: TTFT <= {self.slo.ttft_ms:g} ms, TPOT <= {self.slo.tpot_ms:g} ms",
            format_table(self.summaries),
        ]
        if self.measured is not None:
            parts.append(self._measured_text(self.measured))
        parts += [_advice_text(recommendation) for recommendation in self.advice]
        return "\n\n".join(parts)

    def json(self) -> str:
        """Return it for programs; what is undefined is null."""
        document = {
            "workload": {
                "name": self.workload.name,
                "requests": len(self.workload.requests),
                "duration_s": self.workload.duration_s,
                "tokens_per_block": self.workload.tokens_per_block,
            },
            "engine": self.deployment.engine.model_dump(mode="json"),
            "gpus_per_replica": self.deployment.gpus_per_replica,
            "slo": self.slo.model_dump(),
            "results": [asdict(summary) for summary in self.summaries],
            "measured": None if self.measured is None else asdict(self.measured),
            "recommendations": [_advice_json(recommendation) for recommendation in self.advice],
        }
        return json.dumps(_defined(document))

    def _measured_text(self, measured: Measured) -> str:
        lines = [
            f"measured, {measured.requests} requests: TTFT p50 {1e3 * measured.ttft_s.p50:.0f} ms, "
            f"p90 {1e3 * measured.ttft_s.p90:.0f} ms; TPOT p50 {1e3 * measured.tpot_s.p50:.1f} ms, "
            f"p90 {1e3 * measured.tpot_s.p90:.1f} ms"
        ]
        lines += [
            f"  {summary.policy} x{summary.replicas}, simulated / measured: TTFT p50 "
            f"{summary.ttft_s.p50 / measured.ttft_s.p50:.2f}, p90 {summary.ttft_s.p90 / measured.ttft_s.p90:.2f}; "
            f"TPOT p50 {summary.tpot_s.p50 / measured.tpot_s.p50:.2f}, "
            f"p90 {summary.tpot_s.p90 / measured.tpot_s.p90:.2f}"
            for summary in self.summaries
        ]
        return "\n".join(lines)


def _advice_text(recommendation: Recommendation) -> str:
    number = recommendation.replicas
    lines = [f"recommended for {number} replica{'' if number == 1 else 's'}:", f"  {recommendation.config_line}"]
    lines += [f"  {_comparison_text(comparison)}" for comparison in recommendation.comparisons]
    if recommendation.equals:
        lines.append(f"  may be as good on this workload: {', '.join(recommendation.equals)}")
    return "\n".join(lines)


def _comparison_text(comparison: Comparison) -> str:
    return (
        f"against {comparison.against}: goodput {_interval(comparison.goodput_per_s, 1.0, '/s', 3)}; "
        f"TTFT p90 {_interval(comparison.ttft_p90_s, 1e3, ' ms', 0)}"
    )


def _interval(difference: Difference, scale: float, unit: str, digits: int) -> str:
    value, low, high = (scale * number for number in (difference.value, difference.low, difference.high))
    noise = ", within noise" if difference.is_noise else ""
    return f"{value:+.{digits}f}{unit} [{low:+.{digits}f}, {high:+.{digits}f}]{noise}"


def _advice_json(recommendation: Recommendation) -> dict[str, Any]:
    return {
        "replicas": recommendation.replicas,
        "policy": recommendation.candidate.label,
        "config_line": recommendation.config_line,
        "comparisons": [
            {**asdict(comparison), "within_noise": comparison.is_noise} for comparison in recommendation.comparisons
        ],
        "may_be_as_good": list(recommendation.equals),
    }


def _defined(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _defined(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_defined(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
