"""The tokenizer that an LLM loads, unless told not to."""

import json
from pathlib import Path
from typing import Any


class TransformersTokenizer:
    """`tokenizers` behind the few methods that the library uses."""

    def __init__(self, directory: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        config: dict[str, Any] = {}
        for name in ("config.json", "generation_config.json"):
            file = directory / name
            if file.is_file():
                config |= json.loads(file.read_text())
        end = config.get("eos_token_id")
        self.eos_token_id: int | None = end[0] if isinstance(end, list) else end
        self.pad_token_id: int | None = config.get("pad_token_id")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text
