"""Settings that contradict each other are refused by name and value; importing them loads no GPU library."""

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from serve.engines.transformers.settings import TransformersSettings


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kv_cache_tokens": 1000, "kv_cache_bytes": 5000}, ["kv_cache_tokens=1000", "kv_cache_bytes=5000"]),
        ({"kv_cache_tokens": 63}, ["kv_cache_tokens=63", "tokens_per_block=32"]),
        ({"max_num_tokens": 64, "max_batch_size": 64}, ["max_num_tokens=64", "max_batch_size=64"]),
        ({"device": "cpu", "attention": "flash_attention_2"}, ["attention='flash_attention_2'", "'cpu'"]),
        ({"tokens_per_block": 3}, ["tokens_per_block"]),
        ({"block_size": 32}, ["block_size"]),
    ],
)
def test_wishes_that_cannot_be_had(values: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ValidationError) as raised:
        TransformersSettings(**values)
    assert all(part in str(raised.value) for part in said)


def test_every_setting_says_what_it_is() -> None:
    fields = TransformersSettings.model_fields
    assert all(field.description for name, field in fields.items() if name != "kind")


def test_importing_the_settings_is_cheap() -> None:
    code = "import sys, serve.engines.transformers.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
