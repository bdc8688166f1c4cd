"""check_source: what can be told of a source that this machine sees, before Ray is started or any node is asked.

The fetch step checks the same files again, where it runs; a source elsewhere is checked there for the first time.
"""

from pathlib import Path

from builders.inputs import BuildInputs
from builders.source.checkpoint import check_checkpoint
from builders.source.reading import local_directory
from serve.artifacts.manifest import BundleKind
from serve.engines.simulated.checkpoint import read_checkpoint
from serve.engines.transformers.head_check import check_heads
from serve.errors import ConfigError


def check_source(inputs: BuildInputs) -> None:
    """Check that a local checkpoint is whole, and that its layers can be cut as `parallel` has it.

    Raises:
        ConfigError: It is not, or they cannot; names the file or the numbers, and the remedy.
    """
    directory = local_directory(inputs.spec.source)
    if directory is None:
        return
    check_checkpoint(directory, tuple(inputs.source.files), inputs.source.where)
    tensor = inputs.spec.parallel.tensor
    if inputs.spec.kind is BundleKind.TRANSFORMERS_CHECKPOINT:
        check_heads(directory, tensor)
    elif "attention_dp" not in inputs.spec.engine:  # with it every rank has all heads
        _check_split(directory, tensor)


def _check_split(directory: Path, tensor: int) -> None:
    try:
        shape = read_checkpoint(directory, "").shape
    except ConfigError:
        return  # a family whose rules are unknown here; the library knows them
    if not shape.divides_over(tensor):
        raise ConfigError(
            f"parallel.tensor: {tensor} ranks cannot share the {shape.heads} attention and {shape.kv_heads} key-value "
            f"heads of {directory}; use a number that divides both, or a multiple of the latter that divides the former"
        )
