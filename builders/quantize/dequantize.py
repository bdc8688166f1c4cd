"""From the tensors of a quantized layer to the weight that they stand for. PURE; needs PyTorch.

Layouts of the unified checkpoint, read off ModelOpt's exports:

    FP8, int8   weight (outputs, inputs); weight_scale: one, or one for each output
    AWQ         weight: uint8 (outputs / 2, inputs), the even output in the low bits; weight_scale: (outputs, groups)
    NVFP4       weight: uint8 (outputs, inputs / 2), the even input in the low bits; weight_scale: FP8 (outputs,
                groups of 16); weight_scale_2: one
    all         pre_quant_scale: (inputs,), by which the layer's input is multiplied
"""

from collections.abc import Mapping

import torch

from builders.errors import BuildFailed

# The values of four bits, two of them the exponent; the highest bit is the sign.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def effective_weight(layer: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return what a layer multiplies its input with, float32, (outputs, inputs).

    Args:
        layer: Its name, for messages.
        tensors: Its own, by the last part of their names.

    Raises:
        BuildFailed: They fit no layout, or a scale is not finite or not positive.
    """
    weight, scale = tensors["weight"], tensors["weight_scale"].float()
    _check_scales(layer, tensors)
    second = tensors.get("weight_scale_2")
    if second is not None:
        values = _unpack_e2m1(weight)
        found = _scale_groups(layer, values, scale * second.float())
    elif weight.dtype == torch.uint8:
        found = _scale_groups(layer, _unpack_int4(weight), scale)
    elif weight.dtype in (torch.int8, torch.float8_e4m3fn):
        if scale.numel() not in (1, weight.shape[0]):
            raise _misshapen(layer, weight, scale)
        found = weight.float() * scale.reshape(-1, 1)
    else:
        raise BuildFailed("quantize", f"{layer}.weight is {weight.dtype}, which no layout has; report this")
    smooth = tensors.get("pre_quant_scale")
    return found if smooth is None else found * smooth.float()


def _check_scales(layer: str, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if name.endswith("scale") or name == "weight_scale_2":
            value = tensor.float()
            # A group of zeros has the scale zero, in NVFP4.
            good = torch.isfinite(value) & (value >= 0 if name == "weight_scale" else value > 0)
            if not good.all():
                raise BuildFailed(
                    "quantize",
                    f"{layer}.{name} has {int((~good).sum())} values that are no scales (not finite, or not positive); "
                    "calibrate with other texts, or exclude the layer",
                )


def _unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    low, high = packed & 0x0F, packed >> 4
    values = torch.stack((low, high), dim=1).reshape(-1, packed.shape[1]).float()
    return torch.where(values > 7, values - 16, values)


def _unpack_e2m1(packed: torch.Tensor) -> torch.Tensor:
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=packed.device)
    codes = torch.stack((packed & 0x0F, packed >> 4), dim=2).reshape(packed.shape[0], -1)
    return table[codes.int()]


def _scale_groups(layer: str, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    outputs, inputs = values.shape
    if scale.dim() != 2 or scale.shape[0] != outputs or inputs % scale.shape[1]:
        raise _misshapen(layer, values, scale)
    return (values.reshape(outputs, scale.shape[1], -1) * scale[:, :, None]).reshape(outputs, inputs)


def _misshapen(layer: str, weight: torch.Tensor, scale: torch.Tensor) -> BuildFailed:
    return BuildFailed(
        "quantize",
        f"{layer}: a scale of {tuple(scale.shape)} does not fit a weight of {tuple(weight.shape)}; report this",
    )
