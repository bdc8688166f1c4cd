"""tune: the step of that name. The shell around the search: candidates in, trials run, files out.

Where the load test of the settings that were chosen covers all loads, it is the performance certificate.
"""

import logging
import math
import time
from dataclasses import dataclass, field
from typing import Any

from builders.context import StepContext, StepName
from builders.errors import BuildFailed
from builders.evaluate.candidate import Candidate, read_candidate, settings_of
from builders.evaluate.performance import goal_of, performance_report
from builders.settings.quantize import TextsSettings
from builders.texts.reader import read_texts
from builders.tune.plot import write_plot
from builders.tune.search import FailureKind, Finished, Point, SearchState, TryNext, conclude, decide, record
from builders.tune.space import KnobSpace, make_space
from builders.tune.trial import outcome_of
from builders.tune.trials import Trials, TrialSettings, described
from builders.tune.tuning_record import TrialRecord, TuningRecord
from serve.artifacts.manifest import PERFORMANCE, RUNTIME, BundleKind, BundleRuntime
from serve.engines.trtllm.model_directory import read_model_directory

_STEP = StepName.TUNE
_ALL_TEXTS = TextsSettings(samples=100, max_tokens=4096)  # for the load's prompts
logger = logging.getLogger(__name__)


def tune(context: StepContext) -> dict[str, Any]:
    """Search, and write what was found; see `builders.steps.tune`."""
    search = _Search(context, read_candidate(context, _STEP))
    finished = search.run()
    if finished.best is None:
        raise BuildFailed(_STEP.value, _nothing_ran([record for _, record in search.trials]))
    return _write(context, search, finished.best, finished.why)


@dataclass
class _Search:
    """The shell around `builders.tune.search`."""

    context: StepContext
    candidate: Candidate
    trials: list[tuple[Point, TrialRecord]] = field(default_factory=list)
    engine: str = ""

    def __post_init__(self) -> None:
        tune, place = self.context.spec.tune, self.candidate.place
        texts = read_texts(_ALL_TEXTS, {}, self.candidate.encoder, "evaluation")
        gpus = len(self.context.node.gpus)
        tokens = [text.tokens for text in texts]
        self.space = _space(self.context, self.candidate)
        self._runner = Trials(place, tune, tokens, self.context.scratch, gpus)
        self._state = SearchState(self.space.to_search(self._is_valid), tune.max_trials, repeats=tune.search == "full")
        self._began_s = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long the search has taken."""
        return time.monotonic() - self._began_s

    def run(self) -> Finished:
        """Run trials until the search is done, or its time is over."""
        tune = self.context.spec.tune
        while isinstance(step := decide(self._state), TryNext):
            left_s = tune.max_s - self.seconds
            if self.trials and left_s <= 0:
                return conclude(self._state, f"max_s={tune.max_s:g} are over")
            # The first one, with the settings as they are, has all the time it needs: something has to be served.
            self._try(step.point, left_s if self.trials else math.inf)
        return step

    def _try(self, point: Point, most_s: float) -> None:
        number, tune = len(self.trials) + 1, self.context.spec.tune
        section = self.space.settings(point)
        trial = TrialSettings(self.space.named(point), section, settings_of(self.context, _STEP, section))
        name = f"trial {number}, {_text(trial.named)}"
        self.context.progress(number - 1, tune.max_trials, name)
        result, told = self._runner.run(number, trial, most_s)
        if self.trials and result.failure is FailureKind.TIMED_OUT and self.seconds >= tune.max_s:
            # That the search's time is over says nothing of these settings: it concludes from what was there before.
            logger.info("%s: ended, as max_s=%g are over", name, tune.max_s)
            return
        outcome = outcome_of(result, goal_of(tune), getattr(trial.settings, "max_batch_size", None))
        self._state = record(self._state, point, outcome)
        self.engine = result.engine or self.engine
        self.trials.append((point, told))
        logger.info("%s: %s", name, described(told))
        self.context.progress(number, tune.max_trials, f"{name}: {described(told)}")

    def _is_valid(self, section: dict[str, Any]) -> bool:
        try:
            settings_of(self.context, _STEP, section)
        except BuildFailed:
            return False
        return True


def _space(context: StepContext, candidate: Candidate) -> KnobSpace:
    is_compiled = context.spec.kind is BundleKind.TENSORRT_ENGINE
    return make_space(
        candidate.place.settings,
        candidate.section,
        context.spec.engine,
        search=context.spec.tune.search,
        on_gpu=bool(context.node.gpus),
        built=read_model_directory(candidate.place.model_dir).built if is_compiled else None,
    )


def _write(context: StepContext, search: _Search, best: Point, why: str) -> dict[str, Any]:
    output, tune = context.output, context.spec.tune
    # Of settings that were measured twice, the second time is the one that they were not chosen for.
    chosen = [told for point, told in search.trials if point == best and told.failure is None][-1]
    section = {"kind": context.spec.kind.engine, **search.space.settings(best)}
    # Where the goal was missed, no number of requests is a good one.
    runtime = BundleRuntime(engine=section, replica_requests=chosen.concurrency if chosen.meets else None)
    (output / RUNTIME).write_text(runtime.model_dump_json(indent=2))
    if not chosen.meets:
        logger.warning(
            "No settings meet the goal, ttft_ms=%g and tpot_ms=%g: %s", tune.ttft_ms, tune.tpot_ms, described(chosen)
        )
    told = _tuning_record(context, search, chosen, why)
    (output / "tuning.json").write_text(told.model_dump_json(indent=2))
    if not write_plot(output / "tuning.png", told, f"{context.spec.name}, {search.engine}"):
        logger.warning("The search was not drawn: pip install matplotlib.")
    if any(point.concurrency == 1 for point in chosen.points):
        # Else the trial began where another one was best: verify makes the certificate, with the whole range.
        report = performance_report(search.engine, context.node, tune, chosen.points)
        (output / PERFORMANCE).parent.mkdir(exist_ok=True)
        (output / PERFORMANCE).write_text(report.model_dump_json(indent=2))
    return {
        "chosen": chosen.settings,
        "trials": len(search.trials),
        "why": why,
        "meets": chosen.meets,
        "goodput_tokens_per_s": chosen.goodput_tokens_per_s,
        "concurrency": chosen.concurrency,
    }


def _tuning_record(context: StepContext, search: _Search, chosen: TrialRecord, why: str) -> TuningRecord:
    tune, goal = context.spec.tune, goal_of(context.spec.tune)
    verdicts = {1: "baseline", chosen.number: "chosen"}
    trials = (told.model_copy(update={"verdict": verdicts.get(told.number, "")}) for _, told in search.trials)
    return TuningRecord(
        search=tune.search,
        prompt_tokens=tune.prompt_tokens,
        output_tokens=tune.output_tokens,
        ttft_limit_s=goal.ttft_s,
        tpot_limit_s=goal.tpot_s,
        percentile=goal.percentile,
        knobs={knob.name: list(knob.values) for knob in search.space.knobs},
        trials=tuple(trials),
        chosen=chosen.settings,
        why=why,
        seconds=search.seconds,
    )


def _nothing_ran(trials: list[TrialRecord]) -> str:
    told = "; ".join(f"{_text(trial.settings)}: {described(trial)}" for trial in trials)
    return (
        f"the engine ran with none of the settings that were tried ({told}). Give it more memory or more GPUs, "
        "quantize the model, or lower engine.context_tokens"
    )


def _text(named: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in named.items()) or "the settings as they are"
