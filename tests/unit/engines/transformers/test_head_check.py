"""Heads that cannot be shared are refused before anything starts."""

import json
from pathlib import Path

import pytest

from serve.config import parse_app_config
from serve.engines.transformers.head_check import check_heads
from serve.errors import ConfigError


def checkpoint(path: Path, **config: object) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").touch()
    return path


def test_uneven_heads_are_refused_with_their_numbers(tmp_path: Path) -> None:
    model = checkpoint(tmp_path, model_type="llama", num_attention_heads=8, num_key_value_heads=2)
    check_heads(model, 1)
    check_heads(model, 2)
    with pytest.raises(ConfigError, match=r"tensor=4 ranks: num_key_value_heads=2; use a number that divides"):
        check_heads(model, 4)


def test_models_that_give_each_rank_all_heads_are_left_alone(tmp_path: Path) -> None:
    check_heads(checkpoint(tmp_path, model_type="phi3", num_attention_heads=40, num_key_value_heads=10), 4)
    check_heads(checkpoint(tmp_path, model_type="nobody_knows", num_attention_heads=3), 2)


def test_the_files_of_a_model_are_checked_for_it_and_for_its_fallback(tmp_path: Path) -> None:
    model = checkpoint(tmp_path, model_type="llama", num_attention_heads=8, num_key_value_heads=2)
    own = {"id": "m", "model": str(model), "parallel": {"tensor": 4}}
    with pytest.raises(ConfigError, match=r"models\[m\].parallel.tensor: .*num_key_value_heads=2"):
        parse_app_config({"models": [own]}).models[0].check_files()
    other = own | {"engine": "trtllm", "parallel": {"tensor": 2, "pipeline": 2}, "fallback": "transformers"}
    with pytest.raises(ConfigError, match=r"models\[m\].fallback: .*tensor=4 ranks"):
        parse_app_config({"models": [other]}).models[0].check_files()
    parse_app_config({"models": [other | {"fallback": None}]}).models[0].check_files()
