"""The compile step on the doubles of TensorRT-LLM: what it makes is what the engine adapter loads and serves."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from builders.context import StepContext, StepInput
from builders.errors import BuildFailed
from builders.steps import compile as compile_step
from serve.core.request import GenerateRequest, SamplingParams, pack_tokens
from serve.engines.trtllm.model_directory import read_model_directory
from serve.errors import ConfigError
from tests.contract.trtllm_host import HostedTrtllm
from tests.doubles.install import LineName, installed
from tests.unit.builders.compile.fp8_model import make_fp8
from tests.unit.builders.compile.steps import QUICKSTART, make_context, told

SMALL: dict[str, Any] = {"max_batch_size": 8, "max_num_tokens": 512, "context_tokens": 1024}
PROMPT = list(range(100, 140))


@pytest.fixture
def line_1_2() -> Iterator[None]:
    with installed("1.2.x"):
        yield


@pytest.fixture
def newest() -> Iterator[None]:
    with installed("newest"):
        yield


async def generate(engine: HostedTrtllm, count: int = 16) -> list[int]:
    """Start an engine, generate, and stop it."""
    try:
        await engine.start()
        request = GenerateRequest("r", "m", pack_tokens(PROMPT), SamplingParams(temperature=0.0, max_tokens=count))
        return [token async for delta in engine.generate(request) for token in delta.token_ids]
    finally:
        await engine.stop()


def served(line: LineName, context: StepContext, **options: Any) -> HostedTrtllm:
    """Return the engine of what a step made, with the settings of its runtime.json."""
    runtime = json.loads((context.output / "runtime.json").read_text())["engine"]
    return HostedTrtllm(line, {**runtime, **options.pop("settings", {})}, **options)


async def plain_tokens(model_dir: Path) -> list[int]:
    return await generate(HostedTrtllm("1.2.x", {"backend": "pytorch"}, model_dir=model_dir))


@pytest.fixture(scope="module")
def expected() -> list[int]:
    """What the quickstart model generates."""
    with installed("1.2.x"):
        return asyncio.run(plain_tokens(QUICKSTART))


@dataclass(frozen=True)
class Quantized:
    """The quickstart model in FP8, and what it generates."""

    step: StepInput
    tokens: list[int]


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    step = make_fp8(tmp_path_factory.mktemp("fp8") / "model", kv_cache=True)
    with installed("1.2.x"):
        return Quantized(step, asyncio.run(plain_tokens(step.directory)))


async def test_an_engine_is_built_saved_and_served(line_1_2: None, tmp_path: Path, expected: list[int]) -> None:
    said: list[tuple[float, str]] = []
    shared = tmp_path / "timings"
    context = told(make_context(tmp_path / "step", compile={**SMALL, "timing_cache": str(shared)}), said)
    result = compile_step.run(context)
    assert sorted(path.relative_to(context.output).as_posix() for path in context.output.rglob("*.*")) == [
        "caches/timing.cache",
        "model/config.json",
        "model/rank0.engine",
        "runtime.json",
    ]
    built = read_model_directory(context.output / "model").built
    assert built is not None
    assert (built.version, built.max_batch_size, built.max_num_tokens, built.max_seq_len) == ("1.2.1", 8, 512, 1024)
    assert result["sizes"] == {**SMALL, "max_input_tokens": 1024}
    assert result["decisions"]["PluginConfig"][0]["reason"]
    assert str(tmp_path) not in json.dumps([result["call"], result["command"], result["decisions"]])
    assert [message for _, message in said] == [
        "planned",
        "importing TensorRT-LLM",
        "building the engine",
        "saving the engine",
        "checked",
    ]
    engine = served("1.2.x", context, model_dir=context.output / "model")
    assert await generate(engine) == expected
    again = make_context(tmp_path / "again", compile={**SMALL, "timing_cache": str(shared)})
    compile_step.run(again)
    assert (again.output / "caches/timing.cache").read_text() == 2 * (
        context.output / "caches/timing.cache"
    ).read_text()  # it began with what the first one had measured


async def test_an_engine_of_two_ranks_is_served_by_two(line_1_2: None, tmp_path: Path, expected: list[int]) -> None:
    context = make_context(tmp_path / "step", compile=SMALL, parallel={"tensor": 2})
    assert compile_step.run(context)["ranks"] == 2
    model = context.output / "model"
    assert {path.name for path in model.glob("*.engine")} == {"rank0.engine", "rank1.engine"}
    two = served("1.2.x", context, model_dir=model, layout={"tensor": 2}, kind="mpi")
    assert await generate(two) == expected
    with pytest.raises(ConfigError, match=r"built for tensor=2.*configured are tensor=1"):
        await generate(served("1.2.x", context, model_dir=model))
    (model / "rank1.engine").unlink()
    with pytest.raises(ConfigError, match=r"lacks rank1\.engine"):
        read_model_directory(model)


@pytest.mark.parametrize("kind", ["tensorrt-engine", "trtllm-checkpoint"])
async def test_a_quantized_checkpoint_is_served_as_its_weights_are(
    line_1_2: None, tmp_path: Path, kind: str, fp8: Quantized
) -> None:
    quantize = {"recipe": "fp8", "kv_cache": "fp8"}
    context = make_context(tmp_path / "step", fp8.step, kind=kind, compile=SMALL, quantize=quantize)
    result = compile_step.run(context)
    if kind == "tensorrt-engine":
        chosen = {decision["name"]: decision["value"] for decision in result["decisions"]["PluginConfig"]}
        assert chosen["use_fp8_context_fmha"] is True
        built = json.loads((context.output / "model/config.json").read_text())
        assert built["pretrained_config"]["quantization"]["quant_algo"] == "FP8"
        assert await generate(served("1.2.x", context, model_dir=context.output / "model")) == fp8.tokens
    else:
        assert json.loads((context.output / "runtime.json").read_text())["engine"]["kv_cache"] == {"dtype": "fp8"}
        assert await generate(served("1.2.x", context, model_dir=fp8.step.directory)) == fp8.tokens


async def test_what_a_start_leaves_shortens_the_next_one(newest: None, tmp_path: Path) -> None:
    context = make_context(tmp_path / "bundle", kind="trtllm-checkpoint", compile=SMALL)
    result = compile_step.run(context)
    assert result["caches"].keys() == {"autotuner"}
    assert result["graph_batch_sizes"] == [1, 2, 3, 4, 5, 6, 7, 8]
    bundle = tmp_path / "served"
    (bundle / "model").mkdir(parents=True)
    for file in QUICKSTART.iterdir():
        (bundle / "model" / file.name).hardlink_to(file)
    (context.output / "caches").rename(bundle / "caches")
    kept = bundle / "caches/jit/autotuner/tactics.json"
    content = kept.read_text()
    kept.chmod(0o444)  # as the files of a bundle are
    engine = served("newest", context, model_dir=bundle / "model")
    try:
        await engine.start()
        await asyncio.to_thread(check_caches, engine, content, bundle)
    finally:
        await engine.stop()
    assert kept.read_text() == content


def check_caches(engine: HostedTrtllm, content: str, bundle: Path) -> None:
    """Look at the caches of a running engine: a copy, which it may write to."""
    variables = engine.ask("environ")
    place = Path(variables["TLLM_AUTOTUNER_CACHE_PATH"])
    assert place.read_text() == content
    assert not place.is_relative_to(bundle)
    assert place.stat().st_mode & 0o200
    assert Path(variables["TRITON_CACHE_DIR"]).is_dir()


def test_without_a_warm_start_only_settings_are_prepared(newest: None, tmp_path: Path) -> None:
    context = make_context(tmp_path, kind="trtllm-checkpoint", compile={**SMALL, "warm_start": False})
    result = compile_step.run(context)
    assert result["caches"] == {}
    assert result["notes"] == ["No caches are kept: compile.warm_start is false."]
    assert [path.name for path in context.output.iterdir()] == ["runtime.json"]


def test_where_tensorrt_llm_is_not_installed_only_settings_are_prepared(tmp_path: Path) -> None:
    result = compile_step.run(make_context(tmp_path, kind="trtllm-checkpoint", compile=SMALL))
    assert (result["line"], result["caches"]) == (None, {})
    assert "not installed" in result["notes"][0]


def test_an_engine_needs_tensorrt_llm(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs TensorRT-LLM, which is not installed"):
        compile_step.run(make_context(tmp_path))


def test_the_newest_line_refuses_engines(newest: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="builds no engines any more"):
        compile_step.run(make_context(tmp_path))


def test_too_few_gpus_are_told_as_the_library_does(
    line_1_2: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRTLLM_DOUBLE_GPUS", "1")
    with pytest.raises(ConfigError, match=r"target\.accelerator: .*Only 1 GPUs are available, but 2 are required"):
        compile_step.run(make_context(tmp_path, parallel={"tensor": 2}))


def test_a_build_that_takes_too_long_is_ended(line_1_2: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRTLLM_DOUBLE_BUILD_S", "600")
    context = make_context(tmp_path, compile=SMALL, target={"time_limit_s": 3.0})
    with pytest.raises(BuildFailed, match=r"not done after 3 s \(last seen: [\w -]+\); raise target\.time_limit_s"):
        compile_step.run(context)


def test_a_build_whose_process_dies_is_an_accident(
    line_1_2: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRTLLM_DOUBLE_BUILD_DIES", "1")
    with pytest.raises(RuntimeError, match=r"was killed by SIGKILL \(while building the engine\)"):
        compile_step.run(make_context(tmp_path, compile=SMALL))


def test_sizes_that_the_library_lowered_are_noticed(
    line_1_2: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRTLLM_DOUBLE_BUILD_TOKENS", "256")
    with pytest.raises(BuildFailed, match=r"the engine has max_num_tokens=256, not 512"):
        compile_step.run(make_context(tmp_path, compile=SMALL))
