"""The process of one step: makes the step's context, runs it, and turns however it ends into a value.

It may run in the engine's environment, so that nothing here needs a store, a hub or a toolchain.
"""

import faulthandler
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from builders.context import Step, StepContext, StepInput
from builders.errors import BuildFailed
from builders.graph import step_environment
from builders.progress import Reporter
from builders.spec import BuildSpec, parse_spec
from builders.step_log import read_tail, take_over_output
from builders.step_order import StagedStep, StepOrder, StepOutcome
from serve.artifacts.fingerprint import canonical_json
from serve.artifacts.node_facts import NodeFacts
from serve.artifacts.node_probe import probe_node
from serve.errors import ConfigError
from serve.workers.processes import GROUP_VARIABLE, GroupMark, kill_group, start_reaper

_KILL_LIMIT_S = 10.0
# How long a step that is over its time may take to stop what it has started.
STOP_LIMIT_S = 30.0


class OverTime(BaseException):
    """The step took too long. Passes through what takes any `Exception` for a failed attempt."""


def run_step(order: StepOrder, staged: StagedStep, find_board: Callable[[str], Any] | None = None) -> StepOutcome:
    """Run a step in this process, which prints into the step's log from now on, and is good for nothing else then.

    Args:
        order: What to do.
        staged: What is laid out for it.
        find_board: Finds the build's `ProgressBoard` by its name; None: progress is told to nobody.
    """
    take_over_output(staged.log)
    started_s = time.monotonic()
    reporter = Reporter(partial(find_board, order.board) if find_board is not None else _nobody, order.step.value)
    try:
        with no_orphans(order), time_limit(float(order.spec["target"]["time_limit_s"])):
            result = _run(order, staged, reporter)
        return StepOutcome("done", result, seconds=time.monotonic() - started_s)
    except OverTime as exc:
        return _ended("failed", str(exc), staged, started_s)
    except ConfigError as exc:
        return _ended("mistake", str(exc), staged, started_s)
    except BuildFailed as exc:
        return _ended("failed", exc.message, staged, started_s)
    except Exception as exc:
        # Whatever a library raises may be unknown to the driver's Python: it gets a text.
        traceback.print_exc()
        return _ended("accident", f"{type(exc).__name__}: {exc}".strip(), staged, started_s)
    finally:
        reporter.close()
        sys.stdout.flush()
        sys.stderr.flush()


def _run(order: StepOrder, staged: StagedStep, reporter: Reporter) -> Mapping[str, Any]:
    spec = parse_spec(dict(order.spec))
    node = probe_node(all_gpus=True)
    _check_environment(order, spec, node)
    if order.hide_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    visible = probe_node()
    inputs = {
        name: StepInput(str(record["fingerprint"]), staged.inputs[name], record["result"], float(record["seconds"]))
        for name, record in order.inputs.items()
    }
    context = StepContext(
        spec=spec,
        inputs=inputs,
        output=staged.output,
        scratch=staged.scratch,
        # Ranks of a worker group have GPUs that this process does not see.
        node=visible if visible.gpus or order.hide_gpus else node,
        candidate=staged.candidate,
        user_files=staged.user_files,
        progress=reporter,
    )
    step: Step = importlib.import_module(f"{order.package}.{order.step.value}").run
    result = step(context)
    checked: Mapping[str, Any] = json.loads(canonical_json(result))  # a TypeError here is a mistake of the step's code
    return checked


def _check_environment(order: StepOrder, spec: BuildSpec, node: NodeFacts) -> None:
    """Check that the step's fingerprint tells the truth about this process.

    Raises:
        BuildFailed: It has other hardware or libraries than the node that was asked when the build was planned.
    """
    found = json.loads(canonical_json(step_environment(spec, order.step, node)))
    planned = json.loads(canonical_json(dict(order.environment)))
    if found != planned:
        raise BuildFailed(
            order.step.value,
            f"node {os.uname().nodename} differs from the one that was asked at the start: it has {found}, "
            f"not {planned}; make the nodes of target.accelerator alike, or name one kind of them",
        )


@contextmanager
def no_orphans(order: StepOrder) -> Iterator[None]:
    """See to it that no process that the step starts outlives it, however this one ends."""
    mark = GroupMark.of_this_process(f"step-{order.step.value}-{order.fingerprint[:12]}")
    os.environ[GROUP_VARIABLE] = mark.to_text()
    reaper = start_reaper(mark)
    try:
        yield
    finally:
        kill_group(mark.group, _KILL_LIMIT_S)
        if reaper is not None:
            reaper.dismiss()


@contextmanager
def time_limit(limit_s: float) -> Iterator[None]:
    """Interrupt the block after its time; what then does not come to an end, in whatever library, is killed."""

    def interrupt(_signal: int, _frame: object) -> None:
        raise OverTime(f"it took longer than target.time_limit_s: {limit_s:g}, and was ended; raise that")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    # Writes into the log where each thread was; needs neither the interpreter's lock nor its main thread.
    faulthandler.dump_traceback_later(limit_s + STOP_LIMIT_S, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _nobody() -> None:
    return None


def _ended(end: Any, message: str, staged: StagedStep, started_s: float) -> StepOutcome:
    sys.stdout.flush()
    sys.stderr.flush()
    return StepOutcome(end, {}, message, time.monotonic() - started_s, read_tail(staged.log))
