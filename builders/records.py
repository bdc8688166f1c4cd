"""What of a build is in the store already."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from builders.context import StepName
from builders.errors import GateRefused
from builders.graph import BuildGraph
from builders.home import log_file
from serve.artifacts.fingerprint import fingerprint
from serve.artifacts.port import ArtifactStore
from serve.artifacts.step_record import StepRecord

_AT_ONCE = 8  # requests to an object store


def find_records(store: ArtifactStore, graph: BuildGraph) -> Mapping[StepName, StepRecord]:
    """Return the records of the steps whose output is there."""
    steps = graph.steps[:-1]  # of the last one the bundle is the record
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = pool.map(lambda step: store.find_step(step.fingerprint), steps)
    return {step.name: record for step, record in zip(steps, found, strict=True) if record is not None}


def find_refusal(store: ArtifactStore, graph: BuildGraph) -> StepRecord | None:
    """Return what the gate said when it refused this candidate; None: it did not."""
    return store.find_step(refused_fingerprint(graph.node(StepName.VERIFY).fingerprint))


def output_fingerprint(step: str, result: Mapping[str, object]) -> str:
    """Return under which fingerprint a step's output is kept: its own, unless the gate refused it.

    Its own then stays free for another try.
    """
    return refused_fingerprint(step) if is_refusal(result) else step


def refused_fingerprint(step: str) -> str:
    """Return under which fingerprint the output of a step is kept that the gate refused."""
    return fingerprint({"refused": step})


def is_refusal(result: Mapping[str, object]) -> bool:
    """Whether a step's result says that the candidate is too bad."""
    return result.get("passed") is False


def refusal(store: ArtifactStore, graph: BuildGraph, record: StepRecord, when: str = "") -> GateRefused:
    """Return what the gate said as an error, with its reports in a directory of this machine.

    Args:
        store: Of the record.
        graph: The build.
        record: Of the step that refused.
        when: Added to the message.
    """
    reports = log_file(graph.label, record.step).with_name("refused")
    store.materialize(record.files, reports)
    reasons = "; ".join(str(reason) for reason in record.result.get("reasons", ())) or "it gives no reason"
    return GateRefused(record.step, f"the gate refused the candidate: {reasons}{when}", log=str(reports))


def check_refusal(store: ArtifactStore, graph: BuildGraph) -> None:
    """Check that the gate did not refuse this candidate before.

    Raises:
        GateRefused: It did.
    """
    record = find_refusal(store, graph)
    if record is not None and store.find_step(graph.node(StepName.VERIFY).fingerprint) is None:
        raise refusal(store, graph, record, f" (found {record.created}; --retry verifies again)")
