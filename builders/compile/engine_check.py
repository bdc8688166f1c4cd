"""Check a built engine's directory against what was to be built."""

from pathlib import Path

from builders.compile.decisions import Subject
from builders.errors import BuildFailed
from serve.engines.trtllm.built_engine import check_built
from serve.engines.trtllm.model_directory import BuiltEngine, DirectoryKind, read_model_directory
from serve.engines.trtllm.settings import TrtllmSettings
from serve.errors import BundleMismatch, ConfigError

_MANAGED = "rank{}_managed_weights.safetensors"


def check_engine(directory: Path, subject: Subject, version: str, settings: TrtllmSettings) -> None:
    """Check that every rank has its file, and that the engine is the one that was asked for.

    Args:
        directory: Of the engine.
        subject: What was to be built.
        version: Of TensorRT-LLM that built it.
        settings: That it will be served with.

    Raises:
        BuildFailed: It is not.
    """
    try:
        found = read_model_directory(directory)
        if found.kind is not DirectoryKind.ENGINE or found.built is None:
            raise BuildFailed("compile", f"TensorRT-LLM wrote a {found.kind}, not an engine; report this")
        _check_sizes(found.built, subject)
        check_built(settings, subject.layout, found.built, version)
    except (ConfigError, BundleMismatch) as exc:
        raise BuildFailed("compile", f"the engine is not the one that was asked for: {exc}") from exc
    for rank in range(subject.layout.world_size):
        names = [f"rank{rank}.engine"]
        names += [_MANAGED.format(rank)] if subject.settings.build.fast else []
        for name in names:
            path = directory / name
            if not path.is_file() or not path.stat().st_size:
                raise BuildFailed("compile", f"{name} is missing or empty; is the disk full?")


def _check_sizes(built: BuiltEngine, subject: Subject) -> None:
    sizes = subject.sizes
    for name, got, asked in (
        ("max_batch_size", built.max_batch_size, sizes.max_batch_size),
        ("max_num_tokens", built.max_num_tokens, sizes.max_num_tokens),
        ("max_seq_len", built.max_seq_len, sizes.context_tokens),
    ):
        if got != asked:
            raise BuildFailed(
                "compile",
                f"the engine has {name}={got}, not {asked}: TensorRT-LLM lowered it, maybe for want of memory; lower "
                "compile's sizes",
            )
