"""verify: the step of that name. The candidate beside its reference, and whether it may be published.

The candidate is loaded by the adapter that will serve it, with the settings that it will be served with, and is given
the very tokens that the reference was given. A refused candidate is no error here: the result says so, with all its
reports.
"""

import asyncio
import json
import logging
import shutil
from collections.abc import Sequence
from typing import Any

from builders.context import StepContext, StepName
from builders.evaluate.candidate import Candidate, read_candidate
from builders.evaluate.comparison import Comparison, compare
from builders.evaluate.engines import running
from builders.evaluate.gate import GateVerdict, decide
from builders.evaluate.golden import choose_golden
from builders.evaluate.load_test import load_test
from builders.evaluate.outputs import ModelOutputs, load_outputs
from builders.evaluate.performance import load_plan, performance_report
from builders.evaluate.recording import Recording, record
from builders.evaluate.report_text import to_markdown
from builders.texts.reader import TextSample
from serve.artifacts.certificates import AccuracyReport, GoldenSample
from serve.artifacts.manifest import ACCURACY, CERTIFICATES, GOLDEN, PERFORMANCE
from serve.engines.protocol import Engine

_STEP = StepName.VERIFY
logger = logging.getLogger(__name__)


def verify(context: StepContext) -> dict[str, Any]:
    """Measure, compare, decide; see `builders.steps.verify`."""
    candidate = read_candidate(context, _STEP)
    reference = load_outputs(context.inputs[StepName.REFERENCE].directory)
    (context.output / CERTIFICATES).mkdir()
    report, golden = asyncio.run(_certify(context, candidate, reference))
    (context.output / ACCURACY).write_text(report.model_dump_json(indent=2))
    (context.output / CERTIFICATES / "accuracy.md").write_text(to_markdown(report), encoding="utf-8")
    (context.output / GOLDEN).write_text("".join(f"{sample.model_dump_json()}\n" for sample in golden))
    return {
        "passed": report.passed,
        "reasons": list(report.reasons),
        "hints": [check.hint for check in report.checks if check.hint],
        "notes": list(report.notes),
        "golden_samples": len(golden),
        "report": report.model_dump(mode="json", exclude={"checks", "notes", "reasons", "passed"}),
    }


async def _certify(
    context: StepContext, candidate: Candidate, reference: ModelOutputs
) -> tuple[AccuracyReport, tuple[GoldenSample, ...]]:
    settings = context.spec.verify
    texts = [TextSample("", text.tokens, text.prompt_tokens) for text in reference.texts]
    recording = Recording(texts, reference.questions, settings.output_tokens, candidate.encoder)
    async with running(candidate.place) as engine:
        outputs = await record(engine, _describe(engine, context), recording, context.progress)
        comparison = compare(reference, outputs)
        report = _report(
            reference, outputs, comparison, decide(comparison, settings.gate, context.spec.quantize.recipe)
        )
        stops = candidate.encoder.stop_token_ids
        golden = await choose_golden(engine, outputs.texts, stops, settings.golden_samples)
        if not _copy_performance(context) and report.passed:
            await _certify_performance(context, candidate, engine, [text.tokens for text in texts])
    if len(golden) < settings.golden_samples:
        logger.warning(
            "%d of %d golden samples: the engine does not repeat more of its answers exactly.",
            len(golden),
            settings.golden_samples,
        )
    return report, golden


def _copy_performance(context: StepContext) -> bool:
    """Take over what tune has measured; returns whether it has."""
    tuned = context.inputs.get(StepName.TUNE)
    if tuned is None or not (tuned.directory / PERFORMANCE).is_file():
        return False
    shutil.copyfile(tuned.directory / PERFORMANCE, context.output / PERFORMANCE)
    return True


async def _certify_performance(
    context: StepContext, candidate: Candidate, engine: Engine, texts: Sequence[Sequence[int]]
) -> None:
    tune = context.spec.tune
    ring = [token for text in texts for token in text]
    points = await load_test(engine, load_plan(tune, candidate.place.settings), ring)
    report = performance_report(engine.info.engine, context.node, tune, points)
    (context.output / PERFORMANCE).write_text(report.model_dump_json(indent=2))


def _describe(engine: Engine, context: StepContext) -> str:
    return f"{context.spec.name}, {_precision(context)}, by {engine.info.engine} on {engine.info.device}"


def _precision(context: StepContext) -> str:
    """Return how the weights are kept, as quantizers write it beside them."""
    if StepName.QUANTIZE not in context.inputs:
        return "unquantized"
    path = context.inputs[StepName.QUANTIZE].directory / "hf_quant_config.json"
    section = json.loads(path.read_bytes()).get("quantization", {}) if path.is_file() else {}
    return str(section.get("quant_algo") or "quantized")


def _report(
    reference: ModelOutputs, outputs: ModelOutputs, comparison: Comparison, verdict: GateVerdict
) -> AccuracyReport:
    return AccuracyReport(
        reference=reference.model,
        candidate=outputs.model,
        texts=comparison.texts,
        tokens=comparison.tokens,
        greedy_agreement=comparison.greedy_agreement,
        same_outputs=comparison.same_outputs,
        kl_divergence=comparison.kl_divergence,
        reference_perplexity=comparison.reference_perplexity,
        candidate_perplexity=comparison.candidate_perplexity,
        perplexity_ratio=comparison.perplexity_ratio,
        tasks=comparison.tasks,
        passed=verdict.passed,
        reasons=verdict.reasons,
        checks=verdict.checks,
        notes=comparison.notes,
    )
