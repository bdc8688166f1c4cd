"""run_study: one workload through several policies and fleet sizes, one process for each core."""

import signal
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context

from serve.engines.simulated.settings import SimulatedSettings
from sim.options import SimOptions
from sim.outcome import Outcome
from sim.policies import Candidate
from sim.progress import Progress
from sim.simulator import simulate
from sim.workload import SimRequest


@dataclass(frozen=True)
class Case:
    """One simulation to do.

    Attributes:
        candidate: The policy.
        replicas: How many.
    """

    candidate: Candidate
    replicas: int

    @property
    def label(self) -> str:
        """For progress and plots."""
        return f"{self.candidate.label} x{self.replicas}"


@dataclass(frozen=True)
class Result:
    """One simulation done; `wall_s`: how long it took."""

    case: Case
    outcome: Outcome
    wall_s: float


def run_study(
    requests: Sequence[SimRequest],
    engine: SimulatedSettings,
    cases: Sequence[Case],
    options: SimOptions,
    *,
    jobs: int = 1,
    progress: Progress,
) -> list[Result]:
    """Simulate every case; the results are in the order of the cases, and do not depend on `jobs`.

    Args:
        requests: The workload.
        engine: Of every replica.
        cases: What to simulate.
        options: The same for all.
        jobs: Processes.
        progress: Is told.
    """
    if jobs == 1 or len(cases) < 2:
        return [_run_one(requests, engine, case, options, progress) for case in cases]
    shared = (requests, engine, options)
    with ProcessPoolExecutor(min(jobs, len(cases)), get_context("spawn"), _set_shared, shared) as processes:
        progress.finished(0, len(cases))
        futures = [processes.submit(_run_shared, case) for case in cases]
        for done, future in enumerate(as_completed(futures), 1):
            progress.finished(done, len(cases), future.result().case.label)
        return [future.result() for future in futures]


def _run_one(
    requests: Sequence[SimRequest], engine: SimulatedSettings, case: Case, options: SimOptions, progress: Progress
) -> Result:
    progress.started(case.label, len(requests))
    began_s = time.perf_counter()
    outcome = simulate(requests, [engine] * case.replicas, case.candidate.make(), options, progress.advanced)
    return Result(case, outcome, time.perf_counter() - began_s)


# In a worker process: what all its cases have in common, sent once and not with each of them.
_shared: list[tuple[Sequence[SimRequest], SimulatedSettings, SimOptions]] = []


def _set_shared(requests: Sequence[SimRequest], engine: SimulatedSettings, options: SimOptions) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all processes; these have nothing to say about it
    _shared.append((requests, engine, options))


def _run_shared(case: Case) -> Result:
    requests, engine, options = _shared[0]
    return _run_one(requests, engine, case, options, Progress(None))
