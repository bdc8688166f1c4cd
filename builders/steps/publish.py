"""Publish: the manifest of a candidate that passed. Storing both is the runner's part: steps know no store."""

import json
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from builders.context import StepContext, StepName
from builders.requirements import requirements
from serve.artifacts.certificates import AccuracyReport, PerformanceReport
from serve.artifacts.manifest import (
    ACCURACY,
    MODEL,
    PERFORMANCE,
    CertificateSummary,
    ModelOrigin,
    Provenance,
    Quantization,
)

CODE_VERSION = 1
_QUANTIZATION = "hf_quant_config.json"


def run(context: StepContext) -> dict[str, Any]:
    """Write the manifest's fields.

    Returns:
        `manifest`: the fields of `Manifest` without `fingerprint` and `files`.
    """
    assert context.candidate is not None, "the runner assembles a candidate for this step"
    spec, fetched = context.spec, context.inputs[StepName.FETCH]
    model = ModelOrigin(
        source=str(fetched.result["source"]),
        revision=fetched.result.get("revision"),
        digest=str(fetched.result["digest"]),
        architecture=str(fetched.result["architecture"]),
        parameters=int(fetched.result.get("parameters", 0)),
    )
    quantization = _quantization(context, context.candidate)
    provenance = Provenance(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        raytrt=version("raytrt"),
        steps={name.value: step.fingerprint for name, step in context.inputs.items()},
        seconds={name.value: step.seconds for name, step in context.inputs.items()},
        spec=spec.model_dump(mode="json", exclude_defaults=True),
    )
    manifest = {
        "name": spec.name,
        "kind": spec.kind.value,
        "model": model.model_dump(mode="json"),
        "quantization": quantization.model_dump(mode="json"),
        "parallel": spec.parallel.model_dump(mode="json"),
        "requires": requirements(spec, quantization, context.node).model_dump(mode="json"),
        "provenance": provenance.model_dump(mode="json"),
        "certificates": summarize(context.candidate).model_dump(mode="json"),
    }
    return {"manifest": manifest}


def summarize(candidate: Path) -> CertificateSummary:
    """Return the figures of a bundle's certificates that lists show."""
    accuracy = candidate / ACCURACY
    performance = candidate / PERFORMANCE
    found: dict[str, float | None] = {}
    if accuracy.is_file():
        report = AccuracyReport.model_validate_json(accuracy.read_bytes())
        found["accuracy_drop"] = max((task.drop.value for task in report.tasks), default=None)
        found["greedy_agreement"] = report.greedy_agreement.value if report.greedy_agreement else None
        found["perplexity_ratio"] = report.perplexity_ratio.value if report.perplexity_ratio else None
    if performance.is_file():
        best = PerformanceReport.model_validate_json(performance.read_bytes()).best
        found["output_tokens_per_s"] = best.goodput_tokens_per_s
        found["ttft_p95_s"], found["tpot_p95_s"] = best.ttft_p95_s, best.tpot_p95_s
    return CertificateSummary.model_validate(found)


def _quantization(context: StepContext, candidate: Path) -> Quantization:
    """Read how the weights are kept: where the build quantized them, or as they came."""
    made = context.inputs.get(StepName.QUANTIZE)
    file = (made.directory if made is not None else candidate / MODEL) / _QUANTIZATION
    section = json.loads(file.read_bytes()).get("quantization", {}) if file.is_file() else {}
    return Quantization(
        recipe=context.spec.quantize.recipe,
        algorithm=section.get("quant_algo"),
        kv_cache_algorithm=section.get("kv_cache_quant_algo"),
    )
