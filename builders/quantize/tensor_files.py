"""Tensors of a checkpoint's files: read one at a time, and written in shards of bounded size. Needs PyTorch."""

import json
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from serve.errors import ConfigError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5_000_000_000
_METADATA = {"format": "pt"}


class TensorReader:
    """The tensors of a checkpoint, by name. Nothing is read before it is asked for; use it in a `with` block.

    Args:
        directory: With safetensors, or PyTorch's pickles: of these, only tensors are loaded, and no code is run.

    Raises:
        ConfigError: There are no weights, or a file is broken.
    """

    def __init__(self, directory: Path) -> None:
        self._open: dict[Path, Any] = {}
        self._file_of: dict[str, Path] = {}
        for path in _weight_files(directory):
            try:
                opened = self._open[path] = _open(path)
            except (OSError, SafetensorError, RuntimeError, UnpicklingError) as exc:
                raise ConfigError(f"source.location: {path} cannot be read ({exc}); fetch it again") from exc
            self._file_of |= dict.fromkeys(opened.keys(), path)
        self.names = tuple(sorted(self._file_of))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def tensor(self, name: str) -> torch.Tensor:
        """Read one, onto the CPU."""
        opened = self._open[self._file_of[name]]
        tensor: torch.Tensor = opened[name] if isinstance(opened, dict) else opened.get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one, without reading it."""
        opened = self._open[self._file_of[name]]
        return tuple(opened[name].shape if isinstance(opened, dict) else opened.get_slice(name).get_shape())


class TensorWriter:
    """Writes tensors as the library does: `model.safetensors`, or numbered shards and an index.

    The same tensors in the same order give the same bytes.

    Args:
        directory: Where to; it has no weights.
        shard_bytes: No file gets larger, unless one tensor is.
    """

    def __init__(self, directory: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._directory = directory
        self._shard_bytes = shard_bytes
        self._waiting: dict[str, torch.Tensor] = {}
        self._waiting_bytes = 0
        self._shards: list[tuple[str, ...]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write one, now or later."""
        size = tensor.nbytes
        if self._waiting and self._waiting_bytes + size > self._shard_bytes:
            self._write_shard()
        self._waiting[name] = tensor.contiguous()
        self._waiting_bytes += size
        self._total_bytes += size

    def finish(self) -> None:
        """Write the rest, give the files their names, and write the index."""
        self._write_shard()
        count = len(self._shards)
        if count == 1:
            self._part(0).rename(self._directory / SINGLE)
            return
        files = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        for number, file in enumerate(files):
            self._part(number).rename(self._directory / file)
        weight_map = {name: file for names, file in zip(self._shards, files, strict=True) for name in names}
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self._directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _write_shard(self) -> None:
        save_file(self._waiting, self._part(len(self._shards)), metadata=_METADATA)
        self._shards.append(tuple(self._waiting))
        self._waiting = {}
        self._waiting_bytes = 0

    def _part(self, number: int) -> Path:
        return self._directory / f"part-{number:05d}.safetensors"


def weight_bytes(directory: Path) -> int:
    """Return the size of the files that hold a checkpoint's weights."""
    return sum(path.stat().st_size for path in _weight_files(directory))


def _weight_files(directory: Path) -> list[Path]:
    return list(_listed(directory, INDEX, SINGLE)) or list(
        _listed(directory, "pytorch_model.bin.index.json", "pytorch_model.bin")
    ) or _no_weights(directory)  # fmt: skip


def _listed(directory: Path, index: str, single: str) -> Iterator[Path]:
    if (directory / index).is_file():
        files = sorted(set(json.loads((directory / index).read_bytes())["weight_map"].values()))
        yield from (directory / name for name in files)
    elif (directory / single).is_file():
        yield directory / single


def _no_weights(directory: Path) -> list[Path]:
    raise ConfigError(
        f"source.location: {directory} has neither {SINGLE} nor {INDEX}; give a checkpoint in Hugging Face's layout"
    )


def _open(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return safe_open(path, framework="pt")
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
