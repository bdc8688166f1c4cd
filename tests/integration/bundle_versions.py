"""Versions of a bundle for tests: the first from the real pipeline, the others made of it, good or bad on purpose."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from serve.artifacts.blobs import blob_key
from serve.artifacts.fingerprint import fingerprint
from serve.artifacts.manifest import GOLDEN, Manifest
from serve.artifacts.reference import BundleReference
from serve.artifacts.store import open_store

NAME, ALIAS = "tiny", "prod"
SPEC = {
    "name": NAME,
    "quantize": "int8_weight_only",
    "tune": {"search": "off", "prompt_tokens": 16, "output_tokens": 8, "trial_s": 1},
    "verify": {"texts": {"samples": 2, "max_tokens": 48}, "output_tokens": 16, "golden_samples": 2},
    "aliases": [ALIAS],
}
BUILD_LIMIT_S = 280.0


class BundleVersions:
    """A store in a directory, and the versions of one bundle in it.

    Args:
        directory: Empty.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.store = open_store(str(directory / "store"))

    @property
    def reference(self) -> str:
        """What a config says of it."""
        return str(BundleReference(self.store.url.removeprefix("file://"), NAME, ALIAS))

    @property
    def promoted(self) -> str:
        """Fingerprint that the alias points to."""
        return self.store.aliases(NAME)[ALIAS].fingerprint

    def build(self) -> Manifest:
        """Build the first version by `raytrt build`, with everything that belongs to it."""
        spec = self._directory / "build.yaml"
        spec.write_text(yaml.safe_dump(SPEC | {"store": self.store.url.removeprefix("file://")}))
        command = [str(Path(sys.executable).with_name("raytrt")), "build", str(spec), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_LIMIT_S, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        manifest = self.store.find_bundle(self.promoted)
        assert manifest is not None
        return manifest

    def derive(self, first: Manifest, label: str, change: Callable[[Path], None]) -> Manifest:
        """Publish another version, not promoted: the files of the first one, and what `change` does to them."""
        place = self._directory / label
        self.store.materialize(first.files, place)
        change(place)
        fields = first.model_dump(exclude={"files"}) | {"fingerprint": fingerprint([first.fingerprint, label])}
        manifest = self.store.publish_bundle(fields, place)
        self.store.add_version(NAME, manifest.fingerprint, label)
        shutil.rmtree(place)
        return manifest

    def promote(self, manifest: Manifest) -> None:
        """Point the alias to a version."""
        self.store.move_alias(NAME, ALIAS, manifest.fingerprint, reason="a test")

    def damage(self, manifest: Manifest, path: str) -> None:
        """Change one byte of a file in the store, behind its back."""
        entry = next(entry for entry in manifest.files if entry.path == path)
        blob = Path(self.store.url.removeprefix("file://")) / blob_key(entry.blake3)
        content = bytearray(blob.read_bytes())
        content[len(content) // 2] ^= 1
        blob.chmod(0o644)
        blob.write_bytes(content)


def other_settings(place: Path) -> None:
    """Tune the engine differently: the same answers, by another bundle."""
    path = place / "runtime.json"
    runtime = json.loads(path.read_text())
    runtime["engine"]["max_batch_size"] = 16
    path.write_text(json.dumps(runtime))


def own_file(place: Path) -> None:
    """Give it a file that no other version has, so that damaging it damages no other."""
    other_settings(place)
    with (place / GOLDEN).open("a") as golden:
        golden.write("\n" * 1000)


def babble(place: Path) -> None:
    """Mix up the weights: the engine starts, and says nothing that makes sense."""
    path = next((place / "model").glob("*.safetensors"))
    weights = load_file(path)
    generator = torch.Generator().manual_seed(0)
    mixed = {
        name: tensor[torch.randperm(tensor.shape[0], generator=generator)].contiguous() if tensor.dim() > 1 else tensor
        for name, tensor in weights.items()
    }
    save_file(mixed, path, metadata={"format": "pt"})
