"""Check a quantized checkpoint against its source: nothing is lost, scales are sane, weights are near the originals.

What rounding costs is measured later, on texts; this finds an export that is broken. Needs PyTorch.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from builders.errors import BuildFailed
from builders.quantize.dequantize import effective_weight
from builders.quantize.tensor_files import TensorReader

# Rounding to 4 bits makes about 0.1; a layout that is read wrongly makes 1 and more.
MAX_RELATIVE_ERROR = 0.5
_OF_LAYER = ("weight", "weight_scale", "weight_scale_2", "pre_quant_scale", "input_scale")
_KV_SCALES = ("k_scale", "v_scale")
# Buffers that some old checkpoints have, and that are computed.
_COMPUTED = (".rotary_emb.inv_freq", ".masked_bias")


@dataclass(frozen=True)
class ExportReport:
    """What a checked export is like.

    Attributes:
        errors: Of each quantized layer: norm of the weight's change over norm of the weight.
        kv_scales: How many scales of keys and values there are.
    """

    errors: dict[str, float]
    kv_scales: int

    @property
    def worst(self) -> tuple[str, float]:
        """The layer that changed most, and by how much."""
        return max(self.errors.items(), key=lambda item: item[1])

    @property
    def mean(self) -> float:
        """Mean over layers."""
        return math.fsum(self.errors.values()) / len(self.errors)


def check_export(
    source: TensorReader, export: TensorReader, device: torch.device, progress: Callable[[int, int, str], None]
) -> ExportReport:
    """Load an export back, and compare every layer.

    Args:
        source: The unquantized checkpoint.
        export: What was made of it.
        device: Where to compute.
        progress: Told after each layer.

    Raises:
        BuildFailed: A tensor is missing, has another shape or a scale that is none, or a weight is far from its
            original; or nothing was quantized at all.
    """
    layers = [name.removesuffix(".weight_scale") for name in export.names if name.endswith(".weight_scale")]
    if not layers:
        raise BuildFailed("quantize", "no layer was quantized; look at quantize.exclude")
    _check_complete(source, export)
    errors = {}
    for done, layer in enumerate(layers, 1):
        errors[layer] = _layer_error(source, export, layer, device)
        progress(done, len(layers), layer)
    kv_scales = [name for name in export.names if name.endswith(_KV_SCALES)]
    for name in kv_scales:
        value = float(export.tensor(name))
        if not (math.isfinite(value) and value > 0):
            raise BuildFailed("quantize", f"{name} is {value}, which is no scale; calibrate with other texts")
    report = ExportReport(errors, len(kv_scales))
    layer, error = report.worst
    if error > MAX_RELATIVE_ERROR:
        raise BuildFailed(
            "quantize",
            f"{layer} differs from its original by {error:.0%}, more than rounding can explain; exclude it "
            "(quantize.exclude), and report this",
        )
    return report


def _check_complete(source: TensorReader, export: TensorReader) -> None:
    """Everything of the source is there; of weights that are tied, once."""
    missing = [name for name in source.names if name not in export and not name.endswith(_COMPUTED)]
    lost = [name for name in missing if not _is_tied(source, export, name)]
    if lost:
        raise BuildFailed(
            "quantize",
            f"{len(lost)} tensors of the source are not in the export: {', '.join(lost[:4])}; the recipe does not know "
            "this kind of model: use none",
        )


def _is_tied(source: TensorReader, export: TensorReader, name: str) -> bool:
    """Whether a tensor is left out because another one that is there has its values."""
    shape = source.shape(name)
    others = [other for other in source.names if other in export and source.shape(other) == shape]
    return any(torch.equal(source.tensor(name), source.tensor(other)) for other in others if "embed" in other)


def _layer_error(source: TensorReader, export: TensorReader, layer: str, device: torch.device) -> float:
    names = {part: f"{layer}.{part}" for part in _OF_LAYER}
    tensors = {part: export.tensor(name).to(device) for part, name in names.items() if name in export}
    if f"{layer}.weight" not in source:
        raise BuildFailed("quantize", f"{layer} is quantized, but the source has no such layer; report this")
    original = source.tensor(f"{layer}.weight").to(device).float()
    found = effective_weight(layer, tensors)
    if found.shape != original.shape:
        raise BuildFailed(
            "quantize", f"{layer}.weight stands for {tuple(found.shape)}, but the source has {tuple(original.shape)}"
        )
    return min(relative_error(found * factor, original) for factor in _foldings(source, export, layer, found))


def relative_error(found: torch.Tensor, original: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of the original; not finite is infinite."""
    error = float((found - original).norm() / original.norm().clamp_min(torch.finfo(torch.float32).tiny))
    return error if math.isfinite(error) else math.inf


def _foldings(
    source: TensorReader, export: TensorReader, layer: str, found: torch.Tensor
) -> Iterator[torch.Tensor | float]:
    """Yield what a layer's inputs may have been multiplied with: AWQ lets the norm before it do so.

    Which norm comes before a layer, its name does not tell; of those in its block that changed, the right one makes
    the weight fit, and the others do not.
    """
    yield 1.0
    block = ".".join(layer.split(".")[:-2])
    for name in export.names:
        is_norm = name.startswith(f"{block}.") and name.endswith(".weight") and "norm" in name.rpartition(".")[0]
        if is_norm and source.shape(name) == (found.shape[1],):
            new, old = (reader.tensor(name).to(found.device).float() for reader in (export, source))
            if not torch.equal(new, old):
                yield new / old
                yield (1 + new) / (1 + old)  # Gemma's norms add one
