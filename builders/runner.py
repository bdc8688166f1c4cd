"""BuildRunner: all steps of a build, each as soon as what it needs is there, and each made once in the whole store."""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from builders.context import StepName
from builders.display import BuildDisplay, duration
from builders.errors import BuildFailed
from builders.graph import BuildGraph, StepNode, StepState
from builders.locking import locked
from builders.progress import ProgressBoard
from builders.records import check_refusal, find_records, is_refusal, refusal
from builders.step_order import STEPS, StepOrder
from builders.step_runner import StepRunner
from builders.step_table import files_of, visible_spec
from serve.artifacts.manifest import Manifest
from serve.artifacts.port import ArtifactStore
from serve.artifacts.step_record import StepRecord

_LOOK_S = 0.25
_SHORT_S = 5.0  # a build that ends sooner shows its steps, and not how far each is
_board_actor = ray.remote(num_cpus=0)(ProgressBoard)


@dataclass(frozen=True)
class BuildRunner:
    """Runs what is still to be done of a build, on the Ray cluster that this process is connected to.

    Attributes:
        graph: The build.
        user_files: Content of the files that the specification names.
        store: Where outputs go.
        display: Told what is done.
        retry: Ask the gate again, though it refused before.
        replaces: Why this is built instead of something else; None: it is what was asked for.
        package: Of the steps' modules.
    """

    graph: BuildGraph
    user_files: Mapping[str, bytes]
    store: ArtifactStore
    display: BuildDisplay
    retry: bool = False
    replaces: str | None = None
    package: str = STEPS

    async def run(self) -> tuple[Manifest, bool]:
        """Run the build; returns the manifest of its bundle, and whether it was made just now.

        One process builds a bundle at a time: others wait, and find it when their turn comes.

        Raises:
            BuildFailed: A step failed for good. Others that ran are ended; what was finished is kept.
            GateRefused: The candidate is too bad.
        """
        told: set[str] = set()

        def wait(other: str) -> None:
            if other not in told:
                told.add(other)
                self.display.say(f"waiting for {other}, which makes this bundle")

        async with locked(self.store, f"build {self.graph.fingerprint}", self._holder, wait):
            records = dict(await asyncio.to_thread(find_records, self.store, self.graph))
            published = await asyncio.to_thread(self.store.find_whole_bundle, self.graph.fingerprint)
            states = self.graph.states({record.fingerprint for record in records.values()}, published is not None)
            if states.get(StepName.VERIFY) is StepState.RUN and not self.retry:
                await asyncio.to_thread(check_refusal, self.store, self.graph)
            self._show(states)
            if published is not None:
                return published, False
            return await self._run_steps(states, records), True

    async def _run_steps(self, states: Mapping[StepName, StepState], records: dict[StepName, StepRecord]) -> Manifest:
        ended = {step.name: asyncio.Event() for step in self.graph.steps}
        manifests: list[Manifest] = []

        async def make(step: StepNode) -> None:
            for other in self._before(step):
                await ended[other].wait()
            if states[step.name] is StepState.RUN:
                made = await self._make(step, records)
                if isinstance(made, Manifest):
                    manifests.append(made)
                else:
                    records[step.name] = made
            ended[step.name].set()

        watching = asyncio.create_task(self._watch())
        try:
            async with asyncio.TaskGroup() as group:
                for step in self.graph.steps:
                    group.create_task(make(step))
        except ExceptionGroup as failures:
            raise _first(failures) from None
        finally:
            watching.cancel()
        return manifests[0]

    def _before(self, step: StepNode) -> Sequence[StepName]:
        """Return the steps that have to end first."""
        if step.name is StepName.TUNE:  # what is measured shares its machine with nothing of this build
            names = [other.name for other in self.graph.steps]
            return names[: names.index(step.name)]
        return step.needs

    async def _make(self, step: StepNode, records: Mapping[StepName, StepRecord]) -> StepRecord | Manifest:
        def wait(other: str) -> None:
            self.display.working(step.name, f"waiting for {other}")

        async with locked(self.store, f"step {step.fingerprint}", self._holder, wait):
            found = await asyncio.to_thread(self._find, step)
            if found is not None:
                self.display.ended(step.name, "cached", "made by another build")
                return found
            runner = StepRunner(step, self.graph.spec.target, lambda what: self.display.working(step.name, what))
            try:
                answer = await runner.run(self._order(step, records))
            except BuildFailed as exc:
                self.display.ended(step.name, "failed", exc.message)
                raise
        if step.name is StepName.PUBLISH:
            self.display.ended(step.name, "done")
            return Manifest.model_validate(answer)
        record = StepRecord.model_validate(answer)
        if is_refusal(record.result):
            self.display.ended(step.name, "refused")
            raise await asyncio.to_thread(refusal, self.store, self.graph, record)
        self.display.ended(step.name, "done", duration(record.seconds))
        return record

    def _find(self, step: StepNode) -> StepRecord | Manifest | None:
        if step.name is StepName.PUBLISH:
            return self.store.find_whole_bundle(step.fingerprint)
        return self.store.find_step(step.fingerprint)

    def _order(self, step: StepNode, records: Mapping[StepName, StepRecord]) -> StepOrder:
        spec = self.graph.spec
        return StepOrder(
            build=self.graph.label,
            step=step.name,
            fingerprint=step.fingerprint,
            spec=visible_spec(spec, step.name).model_dump(mode="json"),
            environment=step.environment,
            store=self.store.url,
            inputs={need: records[need].model_dump(mode="json") for need in step.needs},
            user_files={name: self.user_files[name] for name in files_of(spec, step.name)},
            replaces=self.replaces,
            package=self.package,
            board=self._board,
            hide_gpus=not any(bundle.get("GPU") for bundle in step.resources.bundles),
        )

    async def _watch(self) -> None:
        await asyncio.sleep(_SHORT_S)
        board = _start_board(self._board)
        try:
            with contextlib.suppress(RayError):  # only a board
                while True:
                    for name, progress in (await board.read.remote()).items():
                        self.display.progress(StepName(name), progress)
                    await asyncio.sleep(_LOOK_S)
        finally:
            ray.kill(board)

    def _show(self, states: Mapping[StepName, StepState]) -> None:
        self.display.plan([name for name, state in states.items() if state is not StepState.NOT_NEEDED])
        for name, state in states.items():
            if state is StepState.CACHED:
                self.display.ended(name, "cached")

    @property
    def _board(self) -> str:
        return f"progress of {self.graph.fingerprint}"

    @property
    def _holder(self) -> str:
        return f"the build of {self.graph.spec.name}"


def _first(failures: ExceptionGroup[Exception]) -> Exception:
    """Return why a build ended: a step that failed, before what went wrong with the cluster or the store."""
    causes = sorted(failures.exceptions, key=lambda exc: not isinstance(exc, BuildFailed))
    return _first(causes[0]) if isinstance(causes[0], ExceptionGroup) else causes[0]


def _start_board(name: str) -> Any:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return _board_actor.options(name=name, scheduling_strategy=here).remote()
