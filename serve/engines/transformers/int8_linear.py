"""Int8Linear: a linear layer whose weight stays in 8 bits in memory, with a scale for each output.

Which kernel computes it is decided by device and type of the input, never by the batch: a sequence gets the same tokens
whatever it shares a step with.

    CPU, bfloat16    PyTorch's kernel for int8 weights: in decoding twice as fast as a 16-bit layer, as it reads half
    CPU, otherwise   the weight is made whole in pieces that stay in the processor's cache. PyTorch's kernel is right
                     for these types, too, but 10 times slower than a plain layer (2.13, AVX-512)
    GPU              the weight is made whole for the product: half the memory of 16 bits, and three to five times the
                     time. PyTorch's kernel takes longer still, 100 times as long for 256 rows (2.11, H100)
"""

import torch
from torch import nn

_PIECE = 1 << 19  # weights made whole at a time: 2 MiB in float32
_HAS_KERNEL = hasattr(torch, "_weight_int8pack_mm")


class Scratch:
    """Where pieces of weights are made whole; one for all layers of a model, which compute one after the other."""

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None

    def rows(self, count: int, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Return (count, size) of memory on the CPU, with anything in it."""
        if self._buffer is None or self._buffer.numel() < count * size or self._buffer.dtype is not dtype:
            with torch.inference_mode(False):  # else only inference could write to it
                self._buffer = torch.empty(max(count * size, _PIECE), dtype=dtype)
        return self._buffer[: count * size].view(count, size)


class Int8Linear(nn.Module):
    """In the place of a linear layer.

    Args:
        like: The layer, on any device; its bias is taken over, and its weight is not.
        scratch: Of the model.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    kernel_scale: torch.Tensor

    def __init__(self, like: nn.Linear, scratch: Scratch) -> None:
        super().__init__()
        self.in_features, self.out_features = like.in_features, like.out_features
        self.bias = like.bias
        self._scratch = scratch
        # Not among the tensors that the library loads: it would convert them to the model's type.
        for name in ("weight", "scale", "kernel_scale"):
            self.register_buffer(name, None, persistent=False)

    def fill(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        """Set the weight: int8 (outputs, inputs), and its scales, float32 (outputs,)."""
        self.weight, self.scale = weight, scale.float()
        self.kernel_scale = scale.to(torch.bfloat16)
        self.out_features, self.in_features = weight.shape

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute (..., inputs) -> (..., outputs)."""
        output = self.multiply(hidden)
        return output if self.bias is None else output + self.bias

    def multiply(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute without the bias."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        if hidden.device.type != "cpu":
            product = self._on_gpu(flat)
        elif hidden.dtype is torch.bfloat16 and _HAS_KERNEL:
            product = torch._weight_int8pack_mm(flat.contiguous(), self.weight, self.kernel_scale)
        else:
            product = self._in_pieces(flat)
        return product.view(*hidden.shape[:-1], -1)

    def _on_gpu(self, flat: torch.Tensor) -> torch.Tensor:
        scale = self.scale.to(flat.dtype)
        if flat.dtype is torch.float16:  # whose range products of whole numbers would exceed
            return flat @ torch.mul(self.weight, scale[:, None]).t()
        # Whole numbers up to 127 are exact in any type; scaling outputs takes one pass over the weight less.
        return (flat @ self.weight.to(flat.dtype).t()).mul_(scale)

    def _in_pieces(self, flat: torch.Tensor) -> torch.Tensor:
        count = max(1, _PIECE // self.in_features)
        pieces = []
        for start in range(0, self.out_features, count):
            weight = self.weight[start : start + count]
            whole = self._scratch.rows(len(weight), self.in_features, flat.dtype).copy_(weight)
            pieces.append(flat @ whole.t())
        product = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
        return product.mul_(self.scale.to(flat.dtype))
