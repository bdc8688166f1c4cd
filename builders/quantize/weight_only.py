"""int8_weight_only: a checkpoint's linear layers in 8 bits, tensor by tensor, in the unified layout. Needs PyTorch.

Not with ModelOpt, whose export has the same tensors bit by bit (a test compares them): no texts are needed here, so the
model need not be made, nor held in memory, and a laptop need not install ModelOpt.
"""

from collections.abc import Callable, Collection
from pathlib import Path

import torch

from builders.errors import BuildFailed
from builders.quantize.tensor_files import TensorReader, TensorWriter

_MAX = 127


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight to 8 bits, symmetrically.

    Args:
        weight: (outputs, inputs), finite.

    Returns:
        int8 of the same shape, and a float32 scale for each row, (outputs,): their product is near the weight. A row
        of zeros has the scale 1.
    """
    scale = weight.abs().amax(dim=1).float() / _MAX
    scale[scale == 0] = 1.0
    return (weight.float() / scale[:, None]).round().clamp(-_MAX, _MAX).to(torch.int8), scale


def write_weight_only(
    reader: TensorReader, layers: Collection[str], target: Path, progress: Callable[[int, int, str], None]
) -> None:
    """Write all tensors of a checkpoint, with the weights of some layers in 8 bits.

    Args:
        reader: The source.
        layers: Whose weights are quantized.
        target: Directory for the files.
        progress: Told after each tensor.

    Raises:
        BuildFailed: A weight is not finite.
    """
    writer = TensorWriter(target)
    chosen = {f"{layer}.weight" for layer in layers}
    for done, name in enumerate(reader.names, 1):
        tensor = reader.tensor(name)
        if name in chosen:
            if not torch.isfinite(tensor).all():
                raise BuildFailed("quantize", f"{name} of the source has values that are not finite; fetch it again")
            weight, scale = quantize_rows(tensor)
            writer.add(name, weight)
            writer.add(f"{name}_scale", scale)
        else:
            writer.add(name, tensor)
        progress(done, len(reader.names), name)
    writer.finish()
