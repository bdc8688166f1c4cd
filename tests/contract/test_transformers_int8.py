"""The transformers engine with weights in 8 bits: streams as the suite wants them, and the numbers that they stand for.

What else the suite has does not touch the weights, and is tested with whole ones. How they are split over tensor ranks
is in tests/unit/engines/transformers/test_int8.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3MoeConfig
from transformers.utils import logging as library_logging

from serve.core.request import GenerateRequest, SamplingParams, pack_tokens
from serve.engines.transformers.engine import TransformersEngine
from serve.engines.transformers.settings import TransformersSettings
from tests.contract.engine_conformance_case import GREEDY, EngineCase, EngineLimits, EngineProbe
from tests.contract.engine_conformance_streams import StreamConformance
from tests.unit.engines.transformers.int8_model import make_int8, make_whole
from tests.unit.engines.transformers.tiny_model import TINY, VOCAB_SIZE, make_tiny_model

SIZES: dict[str, Any] = {"device": "cpu", "num_threads": 1, "tokens_per_block": 8, "kv_cache_tokens": 8192}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    library_logging.disable_progress_bar()
    return make_int8(make_tiny_model(tmp_path_factory.mktemp("tiny")), tmp_path_factory.mktemp("int8"))


@pytest.fixture(scope="module")
def engine_case(checkpoint: Path) -> EngineCase:
    def make_engine(limits: EngineLimits | None = None) -> TransformersEngine:
        given: dict[str, Any] = (limits or EngineLimits()).queue
        return TransformersEngine(checkpoint, TransformersSettings(**{**SIZES, **given}))

    return EngineCase(make_engine=make_engine, token_ids=range(VOCAB_SIZE))


@pytest.mark.asyncio(loop_scope="module")
class TestTransformersInt8(StreamConformance):
    async def test_logprobs_are_those_of_the_whole_weights(
        self, probe: EngineProbe, checkpoint: Path, tmp_path: Path
    ) -> None:
        plain = AutoModelForCausalLM.from_pretrained(make_whole(checkpoint, tmp_path), dtype=torch.float32)
        prompt = probe.prompt(70, "int8 logprobs")
        result = await probe.run(prompt, max_tokens=12, logprobs=4, **GREEDY)
        with torch.no_grad():
            rows = plain(torch.tensor([[*prompt, *result.token_ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert result.logprobs is not None
        for row, entry in zip(rows, result.logprobs, strict=True):
            assert entry is not None
            assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
            assert [token for token, _ in entry.top] == row.topk(4).indices.tolist()


OTHER_MODELS: dict[str, Any] = {
    "biases": Qwen2Config(**TINY),
    "experts": Qwen3MoeConfig(**TINY, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=16),
}


@pytest.mark.parametrize("kind", OTHER_MODELS)
async def test_other_models(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(OTHER_MODELS[kind])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "source")
    int8 = make_int8(tmp_path / "source", tmp_path / "int8")
    plain = AutoModelForCausalLM.from_pretrained(make_whole(int8, tmp_path / "whole"), dtype=torch.float32)
    engine = TransformersEngine(int8, TransformersSettings(**SIZES, warm_up=False))
    await engine.start()
    prompt = torch.arange(3, 60) % VOCAB_SIZE
    request = GenerateRequest(kind, "m", pack_tokens(prompt.tolist()), SamplingParams(temperature=0.0, max_tokens=20))
    tokens = [token async for delta in engine.generate(request) for token in delta.token_ids]
    await engine.stop()
    with torch.no_grad():
        logits = plain(torch.tensor([[*prompt.tolist(), *tokens]])).logits[0, len(prompt) - 1 : -1]
    assert tokens == logits.argmax(-1).tolist()
