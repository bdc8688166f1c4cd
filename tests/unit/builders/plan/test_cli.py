"""`raytrt plan`: what is printed, and the exit status."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from builders.plan.cli import add_arguments, make_request, run
from builders.spec import read_spec
from serve.errors import ConfigError

GOAL = "--ttft-ms 200 --tpot-ms 50 --rate 30 --input-tokens 1000 --output-tokens 200"


def parse(line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(line.split())


def planned(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = run(parse(line))
    return status, capsys.readouterr().out


def as_json(line: str, capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(planned(f"{line} --json", capsys)[1])


def test_a_table_and_the_chosen_one(capsys: pytest.CaptureFixture[str]) -> None:
    status, out = planned(f"llama-3.1-8b --gpu h100=2.5,l40s=1 --gpus 8 {GOAL}", capsys)
    assert status == 0
    assert "llama-3.1-8b, 8.03e9 weights; 1000 + 200 tokens, 30 requests/s, TTFT p95 <= 200 ms" in out
    assert "objective: lowest_cost" in out
    assert "$/1M tokens" in out
    assert "chosen: 1 x TP1 on H100 80GB SXM, weights fp8: 1 GPU, $2.50/h; max_batch_size 192" in out
    assert "Memory of each" not in out
    assert max(map(len, out.splitlines())) < 250


def test_the_arithmetic_is_shown_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    out = planned(f"llama-3.1-8b --gpu h100 {GOAL} --explain", capsys)[1]
    for title in ("Model", "Memory of each H100 80GB SXM, TP1", "Keys and values", "Steps", "Load", "Replicas"):
        assert title in out
    assert "32 layers x 8 x (128 + 128) x 2 (bf16)" in out


def test_json_has_the_goal_the_candidates_and_the_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    plan = as_json(f"llama-3.1-8b --gpu h100=2 {GOAL} --top 2", capsys)
    assert (plan["feasible"], plan["parameters"], plan["objective"]) == (True, 8030261248, "fewest_gpus")
    assert plan["goal"]["rate_per_s"] == 30
    first, second = plan["candidates"]
    assert (first["gpu"], first["quantize"]["recipe"], first["parallel"]["tensor"]) == ("h100", "fp8", 1)
    assert first["output_tokens_per_s"] == pytest.approx(6000, rel=1e-3)
    assert first["dollars_per_1m_output_tokens"] == pytest.approx(2 / (6000 * 3600) * 1e6, rel=1e-3)
    assert second["ttft_ms"] <= 200
    assert plan["explained"]["Keys and values"][0]["result"] == "131,072"


def test_a_refusal_is_status_1_and_says_what_would_help(capsys: pytest.CaptureFixture[str]) -> None:
    line = "llama-3.1-8b --gpu h100 --gpus 1 --rate 500 --ttft-ms 200"
    status, out = planned(line, capsys)
    assert status == 1
    assert "There is no plan for llama-3.1-8b" in out
    assert "Each of these makes it possible:" in out
    assert "--gpus " in out
    refusal = as_json(line, capsys)
    assert refusal["feasible"] is False
    assert any(remedy["goal"]["max_gpus"] > 1 for remedy in refusal["remedies"])


def test_files_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "plan"
    out = planned(f"llama-3.1-8b --gpu h100 {GOAL} --write {directory} --name chat --store s3://b --source /m", capsys)[
        1
    ]
    assert "chosen:" in out
    spec = read_spec(directory / "build.yaml")
    assert (spec.name, spec.store, spec.source.location) == ("chat", "s3://b", "/m")
    assert (directory / "deployment.yaml").read_text().startswith("# Serves what build.yaml publishes.")


def test_finalists_are_simulated_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    line = "llama-3.1-8b --gpu h100 --rate 20 --input-tokens 200 --output-tokens 50 --ttft-ms 200 --tpot-ms 50 --top 1"
    plan = as_json(f"{line} --simulate", capsys)
    found = plan["candidates"][0]["simulated"]
    assert found["met"] >= 0.95
    assert found["tpot_ms"] == pytest.approx(plan["candidates"][0]["tpot_ms"], rel=0.3)


def test_a_machine_without_gpus_plans_for_its_cores(capsys: pytest.CaptureFixture[str]) -> None:
    out = planned("builtin:quickstart --gpu cpu --rate 1 --input-tokens 100 --output-tokens 50", capsys)[1]
    assert "quickstart, 3.9e6 weights" in out
    assert "on CPU core, weights as they are (bf16): 1 CPU core" in out


def test_goals_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "goal.yaml"
    path.write_text("{ttft_ms: 300, rate_per_s: 7, objective: lowest_latency}")
    request = make_request(parse(f"llama-3.1-8b --gpu h100 --goal {path} --ttft-ms 250"))
    assert (request.goal.ttft_ms, request.goal.rate_per_s, request.objective) == (250.0, 7.0, "lowest_latency")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("llama-3.1-8b --gpu h100 --quantize fp9", "there is no recipe 'fp9'; there are none, int8_weight_only"),
        ("llama-3.1-8b --gpu h100 --weights fp8", "--weights is for --shape"),
        ("llama-3.1-8b --gpu cpu --kind tensorrt-engine", "--kind=tensorrt-engine needs a GPU"),
        ("llama-3.1-8b --gpu h100 --rate 0", "rate_per_s"),
        ("llama-3.1-8b --gpu h100 --objective best", "objective: .*'lowest_cost'"),
    ],
)
def test_mistakes_are_named(line: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_request(parse(line))


def test_a_shape_stands_in_for_an_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    shape = "layers=32,hidden=4096,heads=32,kv_heads=8,head_dim=128,intermediate=14336,vocab=128256"
    plan = as_json(f"rocket --shape {shape} --weights fp8 --gpu h100 --rate 5", capsys)
    assert plan["model"] == "rocket"
    assert {candidate["quantize"]["recipe"] for candidate in plan["candidates"]} == {"none"}
