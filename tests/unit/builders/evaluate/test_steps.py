"""Reference, tune and verify with the real transformers engine and the quickstart model."""

import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from builders.context import StepContext, StepInput, StepName
from builders.errors import BuildFailed
from builders.spec import BuildSpec, parse_spec
from builders.steps import reference, tune, verify
from serve.artifacts.certificates import AccuracyReport, GoldenSample, PerformanceReport
from serve.artifacts.manifest import ACCURACY, GOLDEN, PERFORMANCE, BundleRuntime
from serve.artifacts.node_facts import NodeFacts

QUICKSTART = Path(__file__).resolve().parents[4] / "serve" / "models" / "quickstart"
NODE = NodeFacts(machine="x86_64")
Damage = Callable[[torch.Tensor], torch.Tensor]


def spec(**parts: Any) -> BuildSpec:
    load = {"prompt_tokens": 32, "output_tokens": 8, "trial_s": 0.2, "ttft_ms": 60_000, "tpot_ms": 60_000}
    return parse_spec(
        {
            "name": "quickstart",
            "engine": {"device": "cpu", "num_threads": 1, "warm_up": False},
            "verify": {
                "texts": {"samples": 24, "max_tokens": 96, "seed": 1},
                "output_tokens": 12,
                "tasks": [{"name": "letters", "file": "letters.jsonl", "metric": "multiple_choice"}],
                "golden_samples": 2,
            },
            "tune": {"search": "quick", "max_trials": 9, "max_s": 1000, **load},
            **parts,
        }
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("steps")


def context(root: Path, name: str, inputs: Mapping[StepName, Path], candidate: Path | None = None) -> StepContext:
    output, scratch = root / name / "output", root / name / "scratch"
    for directory in (output, scratch):
        directory.mkdir(parents=True)
    question = {"prompt": "The time to first token is called", "choices": ["TTFT", "TPOT"], "answer": "A"}
    letters = root / name / "letters.jsonl"
    letters.write_text(f"{json.dumps(question)}\n")
    return StepContext(
        spec=spec(),
        inputs={step: StepInput(64 * "0", directory) for step, directory in inputs.items()},
        output=output,
        scratch=scratch,
        node=NODE,
        candidate=candidate,
        user_files={"letters.jsonl": letters},
    )


@pytest.fixture(scope="module")
def recorded(root: Path) -> Path:
    """The reference's output."""
    given = context(root, "reference", {StepName.FETCH: QUICKSTART})
    result = reference.run(given)
    assert (result["texts"], result["questions"], result["notes"]) == (24, 1, [])
    assert result["model"].startswith("builtin:quickstart, unquantized, by transformers ")
    return given.output


def make_candidate(root: Path, name: str, damage: Damage) -> Path:
    """Lay out a candidate whose matrices went through eight bits, and through `damage` of their scales."""
    directory = root / f"{name}-candidate"
    shutil.copytree(QUICKSTART, directory / "model")
    shutil.copytree(QUICKSTART, directory / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
    weights = load_file(QUICKSTART / "model.safetensors")
    for key, weight in weights.items():
        if weight.dim() == 2 and "embed" not in key:
            scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
            weights[key] = ((weight.float() / scale).round() * damage(scale)).to(weight.dtype)
    (directory / "model" / "model.safetensors").unlink()
    save_file(weights, directory / "model" / "model.safetensors", metadata={"format": "pt"})
    (directory / "runtime.json").write_text(BundleRuntime(engine={"kind": "transformers"}).model_dump_json())
    return directory


def verified(root: Path, name: str, recorded: Path, damage: Damage) -> tuple[dict[str, Any], Path]:
    candidate = make_candidate(root, name, damage)
    given = context(root, name, {StepName.FETCH: QUICKSTART, StepName.REFERENCE: recorded}, candidate)
    return verify.run(given), given.output


def test_honest_quantization_passes_and_gets_all_its_certificates(root: Path, recorded: Path) -> None:
    result, output = verified(root, "honest", recorded, lambda scale: scale)
    assert (result["passed"], result["reasons"]) == (True, [])
    report = AccuracyReport.model_validate_json((output / ACCURACY).read_bytes())
    assert report.passed
    assert [task.name for task in report.tasks] == ["next token", "letters"]
    assert report.kl_divergence is not None
    assert report.greedy_agreement is not None
    assert 0 < report.kl_divergence.value < 0.01
    assert report.greedy_agreement.value > 0.95
    golden = [GoldenSample.model_validate_json(line) for line in (output / GOLDEN).read_text().splitlines()]
    assert len(golden) == 2
    performance = PerformanceReport.model_validate_json((output / PERFORMANCE).read_bytes())
    assert performance.best in performance.points
    assert "# Accuracy: passed" in (output / "certificates" / "accuracy.md").read_text()


@pytest.mark.parametrize(("noise", "reason"), [(0.1, "KL divergence is "), (0.5, "accuracy drop, next token is ")])
def test_damaged_scales_are_refused_with_all_reports_kept(
    root: Path, recorded: Path, noise: float, reason: str
) -> None:
    torch.manual_seed(0)
    result, output = verified(root, f"damaged-{noise}", recorded, lambda s: s * (1 + noise * torch.randn_like(s)))
    assert not result["passed"]
    assert any(said.startswith(reason) for said in result["reasons"])
    report = AccuracyReport.model_validate_json((output / ACCURACY).read_bytes())
    assert (report.passed, list(report.reasons)) == (False, result["reasons"])
    assert "# Accuracy: REFUSED" in (output / "certificates" / "accuracy.md").read_text()
    assert not (output / PERFORMANCE).exists()  # nobody will serve it


def test_a_model_that_computes_no_numbers_is_refused(root: Path, recorded: Path) -> None:
    result, _ = verified(root, "broken", recorded, lambda scale: scale * float("nan"))
    assert not result["passed"]


def test_tuning_writes_settings_certificate_and_the_whole_search(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search's time is over in its second trial, of which nothing is known then."""
    clock = itertools.chain([0.0, 0.0, 999.8], itertools.repeat(1000.0))
    monkeypatch.setattr("builders.tune.tuning.time", SimpleNamespace(monotonic=lambda: next(clock)))
    candidate = make_candidate(root, "tuned", lambda scale: scale)
    given = context(root, "tune", {StepName.FETCH: QUICKSTART}, candidate)
    result = tune.run(given)
    assert result["chosen"] == {"max_batch_size": 16, "max_num_tokens": 256}
    assert (result["trials"], result["why"]) == (1, "max_s=1000 are over")
    runtime = BundleRuntime.model_validate_json((given.output / "runtime.json").read_bytes())
    fixed = {"kind": "transformers", "device": "cpu", "num_threads": 1, "warm_up": False}
    assert runtime.engine == {**fixed, **result["chosen"]}
    assert runtime.replica_requests == (result["concurrency"] if result["meets"] else None)
    record = json.loads((given.output / "tuning.json").read_bytes())
    assert [trial["verdict"] for trial in record["trials"]] == ["chosen"]
    assert (given.output / "tuning.png").stat().st_size > 10_000
    performance = PerformanceReport.model_validate_json((given.output / PERFORMANCE).read_bytes())
    assert performance.best.concurrency == result["concurrency"]


def test_a_candidate_with_settings_that_exclude_each_other_is_refused(root: Path) -> None:
    candidate = make_candidate(root, "wrong", lambda scale: scale)
    wrong = BundleRuntime(engine={"kind": "transformers", "max_num_tokens": 8, "max_batch_size": 64})
    (candidate / "runtime.json").write_text(wrong.model_dump_json())
    with pytest.raises(BuildFailed, match=r"runtime\.json: engine: max_num_tokens=8 must exceed max_batch_size=64"):
        tune.run(context(root, "wrong", {StepName.FETCH: QUICKSTART}, candidate))


def test_a_step_without_a_candidate_says_so(root: Path) -> None:
    with pytest.raises(BuildFailed, match="there is no candidate"):
        tune.run(context(root, "nothing", {StepName.FETCH: QUICKSTART}))
