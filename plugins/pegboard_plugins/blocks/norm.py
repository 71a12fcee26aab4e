"""Root-mean-square normalisation.

Statistics in float32 at least (float64 for a float64 input), result in the input's dtype.

Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dim.

    Args:
        dim: length of the last dim.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Weight 1; draws nothing."""
        del generator
        nn.init.ones_(self.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., dim) -> same shape and dtype."""
        weight = self.weight.to(hidden.dtype)
        if hidden.device.type == "cpu":
            out: Tensor = _LeanRMSNorm.apply(hidden, weight, self.eps)  # type: ignore[no-untyped-call]
            return out
        return functional.rms_norm(hidden, (hidden.shape[-1],), weight, self.eps)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class _LeanRMSNorm(torch.autograd.Function):
    """The same numbers where torch has no fused kernel: there its rms_norm keeps copies of the input for backward,
    here only the input and one number per row are kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = scale.square_().div_(hidden.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        out: Tensor = (wide * scale).mul_(weight).to(hidden.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight, scale = ctx.saved_tensors
        wide, normed = gradient.to(scale.dtype), hidden * scale
        product = wide * normed
        weight_gradient = hidden_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = product.flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            mean = (product @ weight.to(scale.dtype)).div_(-hidden.shape[-1]).unsqueeze(-1)
            inner = (wide * weight).addcmul_(normed, mean).mul_(scale)
            hidden_gradient = inner.to(hidden.dtype)
        return hidden_gradient, weight_gradient, None
