"""The Ray tasks of a step: lay out, run, store. Each can be done again: what it makes is found by its fingerprint.

They run one after the other in one reservation, so that they meet on one node. Only the middle one (`step_process`) may
be in the engine's environment, and has a process of its own. Who tries again is the driver, not Ray: it shows it, and
knows which failures are final.
"""

import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import ray

from builders.context import StepName
from builders.home import digest_database
from builders.records import output_fingerprint
from builders.staging import clear, stage, stage_beside
from builders.step_log import read_tail
from builders.step_order import StagedStep, StepOrder, StepOutcome
from builders.step_process import run_step
from builders.target_probe import probe_target
from serve.artifacts.digests import DigestCache
from serve.artifacts.node_facts import NodeFacts
from serve.artifacts.store import open_store
from serve.workers.engine_env import EngineEnv


@ray.remote(num_cpus=0, max_retries=0)  # type: ignore[untyped-decorator]
def stage_step(order: StepOrder) -> StagedStep:
    """Bring what a step needs to this node; see `stage`."""
    return stage(order, open_store(order.store))


@ray.remote(num_cpus=0, max_retries=0)  # type: ignore[untyped-decorator]
def stage_step_beside(order: StepOrder, staged: StagedStep) -> StagedStep:
    """Bring what a step needs to another node of it; see `stage_beside`."""
    return stage_beside(order, staged, open_store(order.store))


@ray.remote(max_calls=1, max_retries=0)  # type: ignore[untyped-decorator]
def compute_step(order: StepOrder, staged: StagedStep) -> StepOutcome:
    """Run a step in a process that ends afterwards; see `run_step`."""
    return run_step(order, staged, _find_board)


@ray.remote(num_cpus=0, max_retries=0)  # type: ignore[untyped-decorator]
def store_step(order: StepOrder, staged: StagedStep, outcome: StepOutcome) -> Mapping[str, Any]:
    """Put what a step made into the store, and remove it here; returns its record, or its manifest, as JSON."""
    store = open_store(order.store, DigestCache(digest_database()))
    if order.step is StepName.PUBLISH:
        assert staged.candidate is not None
        fields = {**outcome.result["manifest"], "fingerprint": order.fingerprint}
        fields["provenance"] = {**fields["provenance"], "replaces": order.replaces}
        stored: dict[str, Any] = store.publish_bundle(fields, staged.candidate).model_dump(mode="json")
    else:
        record = {
            "fingerprint": output_fingerprint(order.fingerprint, outcome.result),
            "step": order.step.value,
            "result": dict(outcome.result),
            "seconds": outcome.seconds,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "node": platform.node(),
        }
        stored = store.publish_step(record, staged.output).model_dump(mode="json")
        stored["result"] = dict(outcome.result)  # a refusal that was there before may have had other reasons
    clear(staged)
    return stored


@ray.remote(num_cpus=0, max_retries=0)  # type: ignore[untyped-decorator]
def clear_step(staged: StagedStep) -> tuple[str, ...]:
    """Remove what was laid out for a step that came to nothing; returns the end of its log."""
    tail = read_tail(staged.log)
    clear(staged)
    return tail


@ray.remote(num_cpus=0, max_retries=1)  # type: ignore[untyped-decorator]
def probe_there(env: EngineEnv | None) -> tuple[str, tuple[NodeFacts, NodeFacts]]:
    """Probe a node of the target; returns its release of raytrt, and what `probe_target` does."""
    return version("raytrt"), probe_target(env)


def _find_board(name: str) -> Any:
    try:
        return ray.get_actor(name)
    except ValueError:  # there is none, or not yet
        return None
