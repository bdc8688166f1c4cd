"""Muon: momentum, orthogonalised, for weight matrices; AdamW for everything else.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024. PyTorch has it too, as
`torch.optim.Muon`, but orthogonalises in bfloat16, which a CPU without such units computes three times slower than
float32 (measured with PyTorch 2.13). On the text here it needs less than half the steps of AdamW alone.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Module, Parameter

_STEPS = 5
_A, _B, _C = 3.4445, -4.7750, 2.0315  # coefficients of the iteration, from the source above


class MuonWithAdamW:
    """Both optimizers as one; learning rates are fractions of their tops."""

    def __init__(self, model: Module, muon_rate: float, adamw_rate: float, weight_decay: float) -> None:
        """Give the matrices of `model`'s layers to Muon, and embeddings and norms to AdamW.

        Args:
            model: What is trained; its gradients are read at each step.
            muon_rate: Top learning rate of the matrices: about the size of a step's singular values.
            adamw_rate: Top learning rate of the others.
            weight_decay: Share of a matrix that is lost at each step, times its learning rate.
        """
        named = list(model.named_parameters())
        self._matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
        taken = set(map(id, self._matrices))
        self._adamw = torch.optim.AdamW(
            [p for _, p in named if id(p) not in taken], lr=adamw_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        self._momenta = [torch.zeros_like(p) for p in self._matrices]
        self._muon_rate, self._adamw_rate, self._weight_decay = muon_rate, adamw_rate, weight_decay

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Apply the gradients at `rate`, in (0, 1] of the top learning rates, and clear them."""
        for group in self._adamw.param_groups:
            group["lr"] = self._adamw_rate * rate
        self._adamw.step()
        self._adamw.zero_grad()
        for matrix, update in zip(self._matrices, self._updates(), strict=True):
            matrix.mul_(1 - self._muon_rate * rate * self._weight_decay)
            # Tall matrices take larger steps, so that their outputs change as much as those of square ones.
            matrix.add_(update, alpha=-self._muon_rate * rate * max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5)
            matrix.grad = None

    def _updates(self) -> Iterable[Tensor]:
        for matrix, momentum in zip(self._matrices, self._momenta, strict=True):
            gradient = _gradient(matrix)
            momentum.lerp_(gradient, 0.05)
            yield orthogonalised(gradient.lerp(momentum, 0.95))


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return about the nearest matrix with orthogonal rows or columns: singular values between 0.7 and 1.2."""
    wide = matrix.shape[0] <= matrix.shape[1]
    x: Tensor = matrix if wide else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(_STEPS):
        gram = x @ x.T
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x if wide else x.T


def _gradient(parameter: Parameter) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError("a weight matrix has no gradient: call backward() first")
    return parameter.grad
