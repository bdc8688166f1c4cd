"""TrtllmEngine passes the conformance suite on the TensorRT-LLM that is installed. Never run yet: see README.md."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from serve.engines.protocol import Engine
from serve.engines.trtllm.line import Line, detect
from serve.engines.trtllm.model_directory import DirectoryKind, read_model_directory
from tests.contract.conftest import probe  # noqa: F401  # a fixture
from tests.contract.engine_conformance import EngineConformance
from tests.contract.engine_conformance_case import EngineCase, EngineLimits
from tests.contract.trtllm_host import HostedTrtllm
from tests.gpu.conftest import MODEL_VARIABLE


@pytest.fixture(scope="module")
def engine_case() -> EngineCase:
    model = read_model_directory(Path(os.environ[MODEL_VARIABLE]))
    tensor = int(os.environ.get("RAYTRT_GPU_TENSOR", "1"))
    is_checkpoint = model.kind is DirectoryKind.HUGGING_FACE
    settings: dict[str, Any] = {"stop_timeout_s": 60.0}
    if is_checkpoint:  # a quick start matters more here than speed
        settings |= {
            "max_batch_size": 16,
            "context_tokens": 2048,
            "autotuner": False,
            "cuda_graphs": {"enabled": False},
        }
        if detect().line is Line.V1_2:
            settings["sampler"] = "trtllm"

    def make_engine(limits: EngineLimits | None = None) -> HostedTrtllm:
        limits = limits or EngineLimits()
        cache = {"max_tokens": 32 * (limits.total_blocks or 1024), "event_interval_s": 0.02}
        return HostedTrtllm(
            None,
            {**settings, **limits.queue, "kv_cache": cache},
            model_dir=model.path,
            layout={"tensor": tensor},
            kind="in_process" if tensor == 1 else "mpi",
        )

    async def kill(engine: Engine) -> None:
        assert isinstance(engine, HostedTrtllm)
        engine.signal(signal.SIGKILL)

    def cache_content(engine: Engine) -> frozenset[int]:
        assert isinstance(engine, HostedTrtllm)
        return frozenset(engine.ask("told"))  # the library does not show its own table

    return EngineCase(
        make_engine=make_engine,
        token_ids=range(1000, 2000),
        # What a TensorRT engine was not built for is refused by name.
        refuses=frozenset() if is_checkpoint else frozenset({"logprobs", "prompt_logprobs"}),
        partial_reuse=True,
        kill=kill,
        cache_content=cache_content,
        deadline_s=600.0,
        max_stall_s=5.0,
    )


class TestTrtllmEngine(EngineConformance):
    pass
