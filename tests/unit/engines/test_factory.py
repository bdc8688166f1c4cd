"""From settings to an engine."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from serve.config import BUILTIN_MODELS
from serve.core.request import GenerateRequest, SamplingParams, pack_tokens
from serve.engines.factory import _fit_to_model, make_engine
from serve.engines.simulated.settings import FixedLatencySettings, SimulatedSettings

QUICKSTART = BUILTIN_MODELS / "quickstart"


@pytest.mark.parametrize("settings", [{}, {"vocab_size": 1000, "token_range": [900, 999]}])
async def test_a_simulated_engine_speaks_the_models_tokens_unless_told_otherwise(settings: dict[str, object]) -> None:
    engine = make_engine(SimulatedSettings.model_validate({"speed": 0} | settings), QUICKSTART)
    await engine.start()
    request = GenerateRequest("r", "m", pack_tokens([300, 301]), SamplingParams(max_tokens=3000))
    tokens = [token async for delta in engine.generate(request) for token in delta.token_ids]
    await engine.stop()
    if settings:
        assert set(tokens) <= set(range(900, 1000))
    else:
        assert set(tokens).isdisjoint(_special_tokens(QUICKSTART))
        assert max(tokens) < engine.info.vocab_size < 10_000


def _special_tokens(model_dir: Path) -> set[int]:
    added = Tokenizer.from_file(str(model_dir / "tokenizer.json")).get_added_tokens_decoder()
    assert added
    return set(added)


def test_settings_made_in_python_keep_what_they_have() -> None:
    settings = SimulatedSettings(latency=FixedLatencySettings(decode_step_s=0.01), max_batch_size=3)
    fitted = _fit_to_model(settings, QUICKSTART)
    assert fitted.latency == settings.latency
    assert fitted.max_batch_size == 3
    assert fitted.vocab_size == json.loads((QUICKSTART / "config.json").read_text())["vocab_size"]
