"""Root-mean-square normalisation.

Statistics in float32 at least (float64 for a float64 input), result in the input's dtype.

Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
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
        return functional.rms_norm(
            hidden, (hidden.shape[-1],), self.weight.to(hidden.dtype), self.eps
        )

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"
