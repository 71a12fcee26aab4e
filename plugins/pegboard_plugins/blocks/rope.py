"""Rotary position embedding, rotate-half layout.

Angles are computed from the position ids in every forward: no buffer that meta initialisation, a
cast to bfloat16 or `to_empty()` could spoil.

Source: Su et al. 2021, "RoFormer", section 3.2.2; halves instead of pairs as in transformers.

T tokens, N heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["apply_rope", "rope_cos_sin"]


def rope_cos_sin(
    position_ids_T: Tensor,
    *,
    head_dim: int,
    theta: float,
    dtype: torch.dtype,
    rescale: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's angles.

    Args:
        position_ids_T: (T,) int64.
        head_dim: H, even.
        theta: base of the frequencies.
        dtype: dtype of the result; the angles are float32 (float64 where `dtype` is).
        rescale: makes of the (H/2,) frequencies, in radians per position, those that are used: for
            models whose context was lengthened. None keeps them.

    Returns:
        cos_TH and sin_TH, without a graph.
    """
    with torch.no_grad():
        wide = torch.promote_types(dtype, torch.float32)
        exponents = (
            torch.arange(0, head_dim, 2, device=position_ids_T.device, dtype=wide) / head_dim
        )
        frequencies = 1.0 / theta**exponents
        if rescale is not None:
            frequencies = rescale(frequencies)
        angles = position_ids_T[:, None].to(wide) * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(states_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Rotate queries or keys by their token's angles; same shape and dtype."""
    first, second = states_TNH.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return states_TNH * cos_TH[:, None] + rotated * sin_TH[:, None]
