import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from serve.engines.trtllm import signature_data
from serve.engines.trtllm.arguments import EnginePlan
from serve.engines.trtllm.call import ConstructorCall, make
from serve.engines.trtllm.construct import apply_environ, construct
from serve.engines.trtllm.line import Backend, Line
from serve.engines.trtllm.model_directory import ModelDirectory
from serve.engines.trtllm.signature_data import check_names, packaged
from serve.errors import ConfigError


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    size: int = Field(default=1, validation_alias=AliasChoices("size", "old_size"))


class TorchLlmArgs(BaseModel):
    model: str
    kv_cache_config: Inner | None = None
    brand_new: int = 0


class LLM:
    """Keeps its keywords."""

    def __init__(self, **kwargs: object) -> None:
        self.kwargs = kwargs


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with the classes above where TensorRT-LLM has its own."""
    classes: dict[str, dict[str, object]] = {
        "tensorrt_llm": {"LLM": LLM},
        "tensorrt_llm.llmapi": {"KvCacheConfig": Inner},
        "tensorrt_llm.llmapi.llm_args": {"TorchLlmArgs": TorchLlmArgs},
    }
    for name, content in classes.items():
        module = ModuleType(name)
        for key, value in content.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)


def call(**keywords: object) -> ConstructorCall:
    return ConstructorCall("tensorrt_llm:LLM", {"model": "/m", **keywords})


@pytest.mark.parametrize("line", list(Line))
def test_the_stored_signatures_name_their_sources(line: Line) -> None:
    stored = json.loads((Path(signature_data.__file__).parent / "signatures" / f"{line}.json").read_text())
    assert len(stored["sources"]) > 2
    assert stored["line"] == line
    assert packaged(line)["tensorrt_llm:LLM"]["model"]["default"] == "<required>"


def test_the_installed_classes_are_right_in_doubt(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    check_names(call(brand_new=1), Line.NEWEST, installed=True)
    assert "differs from what is known of TensorRT-LLM newest: new brand_new" in caplog.text
    with pytest.raises(ConfigError, match="has no keyword 'dtype'"):
        check_names(call(dtype="auto"), Line.NEWEST, installed=True)


def test_the_stored_ones_are_right_where_nothing_is_installed() -> None:
    check_names(call(dtype="auto"), Line.NEWEST)
    with pytest.raises(ConfigError, match="has no keyword 'brand_new'"):
        check_names(call(brand_new=1), Line.NEWEST)


def test_older_names_of_an_installed_field_count() -> None:
    inner = ConstructorCall("tensorrt_llm.llmapi:KvCacheConfig", {"old_size": 3})
    check_names(call(kv_cache_config=inner), Line.NEWEST, installed=True)


def test_a_call_is_made_from_the_inside_out() -> None:
    inner = ConstructorCall("tensorrt_llm.llmapi:KvCacheConfig", {"size": 3})
    made = make(call(kv_cache_config=inner, groups=[inner], off=None))
    assert made.kwargs == {"model": "/m", "kv_cache_config": Inner(size=3), "groups": [Inner(size=3)], "off": None}


def plan(**keywords: object) -> EnginePlan:
    environ = {"RAYTRT_TEST_SET": "1", "RAYTRT_TEST_GONE": None}
    return EnginePlan(Line.NEWEST, Backend.PYTORCH, ModelDirectory(Path("/m")), call(**keywords), environ)


def test_trap_7_1_5_the_environment_is_set_before_the_object_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYTRT_TEST_SET", "0")
    monkeypatch.setenv("RAYTRT_TEST_GONE", "1")
    assert construct(plan(brand_new=2)).kwargs["brand_new"] == 2
    assert os.environ["RAYTRT_TEST_SET"] == "1"
    assert "RAYTRT_TEST_GONE" not in os.environ


async def test_trap_7_2_10_nothing_is_constructed_in_a_thread_with_an_event_loop() -> None:
    with pytest.raises(RuntimeError, match=r"use asyncio\.to_thread"):
        construct(plan())


def test_variables_are_set_and_removed() -> None:
    environ = {"a": "1", "b": "2"}
    apply_environ({"a": None, "c": "3", "gone": None}, environ)
    assert environ == {"b": "2", "c": "3"}
