"""Small bundles in a real store, of which nothing is loaded."""

import json
from pathlib import Path
from typing import Any

from serve.artifacts.fingerprint import fingerprint
from serve.artifacts.manifest import Manifest
from serve.artifacts.store import Store, open_store

NAME, ALIAS = "tiny", "prod"


class Bundles:
    """A store in a directory.

    Args:
        directory: Empty.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.path = directory / "store"
        self.store: Store = open_store(str(self.path))

    @property
    def reference(self) -> str:
        """By the alias."""
        return f"{self.path}/{NAME}@{ALIAS}"

    def publish(
        self,
        label: str,
        *,
        runtime: dict[str, Any] | None = None,
        tokenizer: str = "{}",
        config: dict[str, Any] | None = None,
        promote: bool = True,
        **fields: Any,
    ) -> Manifest:
        """Publish a version; `fields` go into its manifest."""
        place = self._directory / label
        files = {
            "model/config.json": json.dumps({"label": label}),
            "tokenizer/tokenizer.json": tokenizer,
            "tokenizer/config.json": json.dumps({"max_position_embeddings": 64, "label": label} | (config or {})),
            "runtime.json": json.dumps(runtime or {}),
        }
        files |= {f"model/rank{rank}.engine": "" for rank in range(fields.pop("ranks", 0))}
        for path, content in files.items():
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            (place / path).write_text(content)
        manifest = self.store.publish_bundle(
            {
                "fingerprint": fingerprint(label),
                "name": NAME,
                "kind": "transformers-checkpoint",
                "model": {"source": "builtin:quickstart", "digest": "0" * 64, "architecture": "LlamaForCausalLM"},
                "provenance": {"created": "2026-01-01T00:00:00Z", "raytrt": "0.1"},
            }
            | fields,
            place,
        )
        self.store.add_version(NAME, manifest.fingerprint, label)
        if promote:
            self.store.move_alias(NAME, ALIAS, manifest.fingerprint, reason=label)
        return manifest
