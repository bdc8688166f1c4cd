"""The texts that come with the package: what models are calibrated with, and judged by, unless a build names a file."""

from importlib.resources import files
from typing import Literal, get_args

from blake3 import blake3

Purpose = Literal["calibration", "evaluation"]


def package_file(purpose: Purpose) -> bytes:
    """Return the samples for a purpose, as JSON Lines."""
    return files("builders.texts").joinpath("data", f"{purpose}.jsonl").read_bytes()


def package_texts_digest() -> str:
    """Return the digest of them all: what depends on them depends on it."""
    digest = blake3()
    for purpose in get_args(Purpose):
        digest.update(package_file(purpose))
    return digest.hexdigest()
