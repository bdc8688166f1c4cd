"""From settings to an engine."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from serve.config import BUILTIN_MODELS
from serve.core.request import GenerateRequest, SamplingParams, pack_tokens
from serve.engines.factory import make_engine
from serve.engines.simulated.settings import SimulatedSettings

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
