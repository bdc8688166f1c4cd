"""StepRunner: one step on the cluster. Reserves, lays out, runs, stores; tries again after accidents.

Every wait can be cancelled, and a cancelled step leaves no process and no reservation.
"""

import asyncio
import contextlib
import platform
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import (
    OutOfMemoryError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
)
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from builders.errors import BuildFailed
from builders.graph import StepNode
from builders.resources import without_labels
from builders.settings.target import TargetSettings
from builders.staging import clear
from builders.step_order import StagedStep, StepOrder, StepOutcome
from builders.step_process import STOP_LIMIT_S
from builders.tasks import clear_step, compute_step, stage_step, stage_step_beside, store_step
from serve.core.placement import actor_options
from serve.core.resources import add_all, describe
from serve.errors import ConfigError, RayTRTError, StoreUnavailable
from serve.workers.engine_env import EngineEnv

_LOOK_S = 2.0  # a reservation that takes longer is told of
_PAUSE_S = 1.0  # before another try, times the tries so far
_CLEAR_LIMIT_S = 30.0
_START_LIMIT_S = 600.0  # an environment may have to be made

# Storage that was away may be back.
_PASSING = (StoreUnavailable,)


class Accident(Exception):
    """A try came to nothing, and another one may not: a process was killed, a node or the storage went away.

    Args:
        message: What happened.
        tail: The last lines that the step printed.
        log: Where it printed them.
    """

    def __init__(self, message: str, tail: tuple[str, ...] = (), log: str = "") -> None:
        super().__init__(message, tail, log)
        self.message = message
        self.tail = tail
        self.log = log


class StepRunner:
    """Runs one step of a build.

    Args:
        node: The step.
        target: Where, how long, how often.
        tell: Told what is being done.
    """

    def __init__(self, node: StepNode, target: TargetSettings, tell: Callable[[str], None]) -> None:
        self._node = node
        self._target = target
        self._tell = tell

    async def run(self, order: StepOrder) -> Mapping[str, Any]:
        """Run it; returns its record, or of `publish` the manifest, as JSON.

        Raises:
            BuildFailed: It failed, or had as many accidents as `target.max_retries` allows.
        """
        tries = self._target.max_retries + 1
        for number in range(1, tries + 1):
            try:
                return await self._try(order)
            except Accident as exc:
                if number == tries:
                    again = f" (tried {tries} times)" if tries > 1 else ""
                    raise BuildFailed(order.step.value, exc.message + again, exc.tail, exc.log) from exc
                self._tell(f"{exc.message}; try {number + 1} of {tries}")
                await asyncio.sleep(_PAUSE_S * number)
        raise AssertionError("the last try returns or raises")

    async def _try(self, order: StepOrder) -> Mapping[str, Any]:
        reserved = placement_group([dict(bundle) for bundle in self._bundles()], self._node.resources.strategy)
        try:
            await self._until_reserved(reserved)
            self._tell("preparing")
            order = replace(order, attempt=uuid.uuid4().hex[:8])
            places = self._places(reserved)
            staged = await self._stage(order, places)
            return await self._work(order, staged, places)
        finally:
            remove_placement_group(reserved)  # kills what runs in it

    def _places(self, reserved: PlacementGroup) -> list[PlacementGroupSchedulingStrategy]:
        """Return a place on each node of the step; its process runs in the first."""
        nodes = reserved.bundle_count if self._node.resources.strategy == "STRICT_SPREAD" else 1
        return [PlacementGroupSchedulingStrategy(reserved, index) for index in range(nodes)]

    async def _stage(self, order: StepOrder, places: Sequence[Any]) -> StagedStep:
        """Lay out on every node: ranks there look for the model at the path of the first."""
        staged: StagedStep = await self._ask(stage_step.options(scheduling_strategy=places[0]).remote(order))
        others = (stage_step_beside.options(scheduling_strategy=place) for place in places[1:])
        await asyncio.gather(*(self._ask(task.remote(order, staged)) for task in others))
        return staged

    async def _work(self, order: StepOrder, staged: StagedStep, places: Sequence[Any]) -> Mapping[str, Any]:
        try:
            outcome = await self._compute(order, staged, places[0])
            self._tell("storing")
            store = store_step.options(scheduling_strategy=places[0])
            stored: Mapping[str, Any] = await self._ask(store.remote(order, staged, outcome))
        except Accident as exc:
            tail = await self._clear(staged, places)
            raise Accident(exc.message, exc.tail or tail, _where(staged)) from exc
        except BuildFailed as exc:
            tail = await self._clear(staged, places)
            raise BuildFailed(exc.step, exc.message, exc.tail or tail, _where(staged), exc.mistake) from exc
        except asyncio.CancelledError:
            if staged.host == platform.node():  # elsewhere the next try of this step does it
                clear(staged)
            raise
        await self._clear(staged, places[1:])
        return stored

    def _bundles(self) -> list[Mapping[str, float]]:
        # A bundle of nothing is refused.
        return [bundle if any(bundle.values()) else {"CPU": 0.001} for bundle in self._node.resources.bundles]

    async def _until_reserved(self, reserved: PlacementGroup) -> None:
        # Not `ready()`, which starts a process only to say so.
        while not await asyncio.to_thread(reserved.wait, _LOOK_S):
            self._tell(f"waiting for {describe(without_labels(add_all(self._bundles())))}")

    async def _compute(self, order: StepOrder, staged: StagedStep, place: Any) -> StepOutcome:
        env = self._target.engine_env if self._node.resources.engine_env else None
        # Without an environment of its own the process is one that Ray keeps ready, and that ends with this call.
        environment = {"runtime_env": env.to_runtime_env({})} if env is not None else {}
        call = compute_step.options(
            **actor_options(self._node.resources.process),
            **environment,
            scheduling_strategy=place,
            name=f"raytrt build {order.build} {order.step.value}",
        ).remote(order, staged)
        self._tell("running")
        # The process ends itself in time; the limit here is for one that does not begin, or cannot say that it ended.
        limit_s = self._target.time_limit_s + STOP_LIMIT_S
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(limit_s + _START_LIMIT_S):
                outcome: StepOutcome = await self._ask(call, env)
        except (TimeoutError, Accident) as exc:
            if isinstance(exc, Accident) and time.monotonic() - began_s < limit_s:
                raise
            message = f"it did not end within target.time_limit_s: {self._target.time_limit_s:g}, and was killed"
            raise BuildFailed(order.step.value, message) from exc
        finally:
            ray.cancel(call, force=True)  # of a process that has ended nothing is left to cancel
        match outcome.end:
            case "done":
                return outcome
            case "accident":
                raise Accident(outcome.message, outcome.tail)
        raise BuildFailed(order.step.value, outcome.message, outcome.tail, mistake=outcome.end == "mistake")

    async def _ask(self, call: Any, env: EngineEnv | None = None) -> Any:
        """Wait for a task; its errors become ours."""
        try:
            return await call
        except RayTaskError as exc:
            raise self._translate(exc) from exc
        except RuntimeEnvSetupError as exc:
            where = f"target.engine_env.{env.place}" if env is not None else "the step's process"
            raise BuildFailed(
                self._node.name.value, f"{where} cannot be set up: {_first_line(exc)}", mistake=True
            ) from exc
        except OutOfMemoryError as exc:
            raise Accident("its node ran out of memory; target.memory_bytes reserves what it needs") from exc
        except RayError as exc:
            raise Accident(f"its process ended: {_first_line(exc)}") from exc

    def _translate(self, exc: RayTaskError) -> Exception:
        cause = exc.cause
        step = self._node.name.value
        if isinstance(cause, BuildFailed):
            return BuildFailed(step, cause.message, mistake=cause.mistake)
        if isinstance(cause, RayTRTError) and not isinstance(cause, _PASSING):
            return BuildFailed(step, str(cause), mistake=isinstance(cause, ConfigError))
        return Accident(f"{type(cause).__name__}: {cause}")

    async def _clear(self, staged: StagedStep, places: Sequence[Any]) -> tuple[str, ...]:
        """Remove what was laid out; returns the end of the step's log, if the first of the nodes still answers."""
        tails: list[tuple[str, ...]] = []
        with contextlib.suppress(RayError, TimeoutError):
            async with asyncio.timeout(_CLEAR_LIMIT_S):
                for place in places:
                    tails.append(await clear_step.options(scheduling_strategy=place).remote(staged))  # noqa: PERF401
        return tails[0] if tails else ()


def _where(staged: StagedStep) -> str:
    return str(staged.log) if staged.host == platform.node() else f"{staged.host}:{staged.log}"


def _first_line(exc: BaseException) -> str:
    lines = [line for line in str(exc).strip().splitlines() if line.strip()]
    return lines[0][:300] if lines else type(exc).__name__
