"""Tests of this folder need a GPU, TensorRT-LLM and a model; elsewhere they are skipped, with the reason."""

import importlib.util
import os
from pathlib import Path

import pytest

MODEL_VARIABLE = "RAYTRT_GPU_MODEL"


def missing() -> str | None:
    """Return why the tests cannot run here; None if they can."""
    if not os.environ.get(MODEL_VARIABLE):
        return f"{MODEL_VARIABLE} is not set: run `make test-gpu MODEL=/path/to/checkpoint`"
    if importlib.util.find_spec("tensorrt_llm") is None:
        return "TensorRT-LLM is not installed"
    if not Path(os.environ[MODEL_VARIABLE], "config.json").is_file():
        return f"{os.environ[MODEL_VARIABLE]} has no config.json"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run."""
    reason = missing()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.timeout(3600))
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
