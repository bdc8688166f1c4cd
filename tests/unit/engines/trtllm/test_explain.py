import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serve.core.parallel import ParallelLayout
from serve.engines.trtllm import explain as explain_module
from serve.engines.trtllm.explain import explain, main
from serve.engines.trtllm.line import Line
from serve.engines.trtllm.settings import TrtllmSettings
from serve.errors import ConfigError

MODEL = {
    "id": "llama",
    "model": "/models/llama",
    "engine": {"kind": "trtllm", "speculation": {"kind": "ngram"}},
    "parallel": {"tensor": 2, "pipeline": 2, "gpus_per_node": 2},
}


@pytest.mark.parametrize("line", list(Line))
def test_the_explanation_is_a_python_program(line: Line) -> None:
    text = explain(MODEL, line)
    tree = ast.parse(text)
    (assignment,) = [
        node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "llm"
    ]
    assert isinstance(assignment.value, ast.Call)
    names = {keyword.arg for keyword in assignment.value.keywords}
    assert {"model", "tensor_parallel_size", "ray_placement_config", "speculative_config"} <= names
    imported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    called = {
        node.func.id for node in ast.walk(assignment.value) if isinstance(node, ast.Call) and hasattr(node.func, "id")
    }
    assert called == imported


@pytest.mark.parametrize(
    "config",
    [
        MODEL,
        {"models": [MODEL]},
        {"applications": [{"import_path": "serve.app:build_app", "args": {"models": [MODEL]}}]},
    ],
)
def test_a_model_is_found_at_every_level_of_a_config(config: dict[str, Any]) -> None:
    assert explain(config) == explain(MODEL)
    assert "placement_bundle_indices=[[0, 0, 1, 1]]" in explain(config)


def test_settings_and_a_layout_are_enough() -> None:
    text = explain(TrtllmSettings(), layout=ParallelLayout(tensor=4))
    assert text == explain({"kind": "trtllm"}, layout=ParallelLayout(tensor=4))
    assert text.count("tensor_parallel_size=4") == len(Line)
    assert "orchestrator: mpi" in text


def test_both_spellings_of_the_import_work() -> None:
    assert explain_module({"kind": "trtllm"}) == explain({"kind": "trtllm"})  # type: ignore[operator]


def test_a_line_that_refuses_says_why_and_the_other_is_explained() -> None:
    text = explain({"kind": "trtllm", "backend": "tensorrt"})
    assert "from tensorrt_llm._tensorrt_engine import LLM" in text
    assert "# engine on TensorRT-LLM newest is refused:\n#   engine.backend: " in text


def test_the_environment_is_shown() -> None:
    text = explain({"kind": "trtllm", "environment": {"NCCL_DEBUG": "INFO"}}, "1.2.x")
    assert "os.environ['NCCL_DEBUG'] = 'INFO'" in text
    assert "os.environ['TLLM_WORKER_USE_SINGLE_PROCESS'] = '1'" in text


def test_mistakes_are_told_with_their_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.engine\.kv_cache\.dtype"):
        explain(MODEL | {"engine": {"kind": "trtllm", "kv_cache": {"dtype": "int3"}}})
    with pytest.raises(ConfigError, match=r"line '1\.1' is unknown; use 1\.2\.x or newest"):
        explain(MODEL, "1.1")
    with pytest.raises(ConfigError, match="nothing to explain"):
        explain({"models": [{"id": "small", "engine": "transformers"}]})
    with pytest.raises(ConfigError, match="No such file"):
        explain(tmp_path / "none.yaml")


def test_the_command_prints_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("models: [{id: llama, engine: trtllm}]\n")
    assert main([str(config), "--line", "newest"]) == 0
    assert capsys.readouterr().out.startswith("# llama on TensorRT-LLM newest\n")
    config.write_text("[")
    assert main([str(config)]) == 1


def test_trap_7_1_1_nothing_here_imports_tensorrt_llm_or_torch() -> None:
    program = (
        "import sys; from serve.engines.trtllm.explain import explain; explain({'kind': 'trtllm'});"
        "print([m for m in ('tensorrt_llm', 'torch', 'mpi4py', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
