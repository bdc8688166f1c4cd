"""The performance certificate: which load a build asks for, and the report of what was measured. PURE."""

from collections.abc import Sequence

from builders.evaluate.ladder import Ladder
from builders.evaluate.load_point import Goal, best_point
from builders.evaluate.load_shape import LoadShape
from builders.evaluate.load_test import LoadPlan
from builders.settings.tune import TuneSettings
from serve.artifacts.certificates import LoadPoint, PerformanceReport
from serve.artifacts.node_facts import NodeFacts
from serve.engines.factory import AnyEngineSettings

_UNLIMITED = 256  # streams offered to an engine whose batch nobody has limited
_FACTORS = {"off": 2, "quick": 4, "full": 2}
_POINTS = {"off": 8, "quick": 5, "full": 7}


def goal_of(tune: TuneSettings) -> Goal:
    """Return what requests have to meet."""
    return Goal(tune.ttft_ms * 1e-3, tune.tpot_ms * 1e-3, tune.percentile)


def load_plan(tune: TuneSettings, engine: AnyEngineSettings, first: int = 1) -> LoadPlan:
    """Return the load test of a build.

    Args:
        tune: What it asks for.
        engine: Settings of the engine, whose batch no test exceeds: more streams would only wait.
        first: Concurrency to begin with.
    """
    most = getattr(engine, "max_batch_size", None) or _UNLIMITED
    return LoadPlan(
        shape=LoadShape(tune.prompt_tokens, tune.output_tokens),
        goal=goal_of(tune),
        ladder=Ladder(min(first, most), most, _FACTORS[tune.search], _POINTS[tune.search]),
        point_s=tune.trial_s,
        seed=tune.seed,
    )


def performance_report(
    engine: str, node: NodeFacts, tune: TuneSettings, points: Sequence[LoadPoint]
) -> PerformanceReport:
    """Return the certificate.

    Args:
        engine: Name and version.
        node: Where it was measured.
        tune: What was asked for.
        points: What was measured, at least one point.
    """
    goal = goal_of(tune)
    return PerformanceReport(
        engine=engine,
        node=node,
        prompt_tokens=tune.prompt_tokens,
        output_tokens=tune.output_tokens,
        ttft_limit_s=goal.ttft_s,
        tpot_limit_s=goal.tpot_s,
        percentile=goal.percentile,
        points=tuple(sorted(points, key=lambda point: point.concurrency)),
        best=best_point(points, goal),
    )
