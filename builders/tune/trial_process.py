"""The process of a trial: `python -m builders.tune.trial_process ORDER RESULT`.

Whatever happens to the engine, happens to this process alone: running out of memory, a crash in a library, a hang.
"""

import asyncio
import ctypes
import json
import signal
import sys
import time
from pathlib import Path

from builders.evaluate.engines import EnginePlace, running
from builders.evaluate.load_test import load_test
from builders.evaluate.performance import load_plan
from builders.settings.tune import TuneSettings
from builders.tune.search import FailureKind
from builders.tune.trial import TrialOrder, TrialResult, failure_of_text
from serve.core.placement import PlacementPlan
from serve.engines.factory import AnyEngineSettings
from serve.engines.transformers.settings import TransformersSettings
from serve.engines.trtllm.settings import TrtllmSettings
from serve.errors import BundleMismatch, ConfigError, RequestError
from serve.logs import configure_logging

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


async def run_trial(place: EnginePlace, tune: TuneSettings, first: int, ring: list[int]) -> TrialResult:
    """Start an engine, measure it, and stop it; whatever it raises becomes a result.

    Args:
        place: The engine.
        tune: The load.
        first: Concurrency to begin with.
        ring: Token ids of texts.
    """
    started_s = time.monotonic()
    try:
        async with running(place) as engine:
            start_s = time.monotonic() - started_s
            points = await load_test(engine, load_plan(tune, place.settings, first), ring)
            return TrialResult(points=points, engine=engine.info.engine, start_s=start_s)
    except (ConfigError, BundleMismatch, RequestError) as exc:
        kind = failure_of_text(str(exc))
        refused = FailureKind.REFUSED if kind is FailureKind.CRASHED else kind
        return TrialResult(failure=refused, reason=str(exc))
    except Exception as exc:  # of any library: it is the answer
        text = f"{type(exc).__name__}: {exc}"
        return TrialResult(failure=failure_of_text(text), reason=text)


def main() -> None:
    """Run one trial."""
    if sys.platform == "linux":  # what started this process reads its result: without it, there is nobody to tell
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    configure_logging()
    order = TrialOrder.model_validate_json(Path(sys.argv[1]).read_bytes())
    target = Path(sys.argv[2])
    plan = PlacementPlan(order.layout, order.launcher, (), "STRICT_PACK", (order.layout.world_size,), {}, {})
    place = EnginePlace(_settings(order), order.model_dir, plan)
    ring = json.loads(order.ring.read_bytes())
    result = asyncio.run(run_trial(place, TuneSettings.model_validate(order.tune), order.first, ring))
    part = target.with_suffix(".part")
    part.write_text(result.model_dump_json())
    part.rename(target)


def _settings(order: TrialOrder) -> AnyEngineSettings:
    if order.kind == "transformers":
        return TransformersSettings.model_validate(order.section)
    settings = TrtllmSettings.model_validate(order.section)
    return settings.model_copy(update={"backend": order.backend}) if order.backend is not None else settings


if __name__ == "__main__":
    main()
