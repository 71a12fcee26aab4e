"""The gated feed-forward layer with one fused gate and up projection.

Source: Shazeer 2020, "GLU Variants Improve Transformer" (SwiGLU).

T tokens, D hidden, F feed-forward.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from pegboard.weight_map import Entry, fused, renamed

__all__ = ["GatedFeedForward"]


class GatedFeedForward(nn.Module):
    """`down(silu(gate(x)) * up(x))`.

    Args:
        hidden_size: D.
        intermediate_size: F.
        bias: biases in all projections.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.intermediate_size = intermediate_size
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        gate_TF, up_TF = self.gate_up_proj(hidden_TD).chunk(2, dim=-1)
        out_TD: Tensor = self.down_proj(functional.silu(gate_TF) * up_TF)
        return out_TD

    def weight_entries(self, ours: str, published: str) -> list[Entry]:
        """Entries for gate_proj, up_proj, down_proj; both prefixes with their dot."""
        entries = []
        for name, parameter in self.named_parameters():
            if name.startswith("gate_up_proj."):
                leaf = name.removeprefix("gate_up_proj.")
                parts = [
                    (f"{published}{part}.{leaf}", self.intermediate_size)
                    for part in ("gate_proj", "up_proj")
                ]
                entries.append(fused(ours + name, parts, parameter.shape))
            else:
                entries.append(renamed(ours + name, published + name, parameter.shape))
        return entries
