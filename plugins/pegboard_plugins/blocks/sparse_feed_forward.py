"""A sparse feed-forward layer: a router and its experts, and the decoder layer around them.

T tokens, D hidden, H head dim, S samples.
"""

from __future__ import annotations

from torch import Tensor, nn

from pegboard.weight_map import Entry, renamed
from pegboard_plugins.blocks.attention import CausalSelfAttention
from pegboard_plugins.blocks.balancing import RouterSums, sum_routing
from pegboard_plugins.blocks.decoder import DecoderLayer
from pegboard_plugins.blocks.experts import Experts
from pegboard_plugins.blocks.router import Routing

__all__ = ["SparseDecoderLayer", "SparseFeedForward"]


class SparseFeedForward(nn.Module):
    """Each token passes the experts that the router chose for it.

    Args:
        router: (T, D) -> Routing, such as `SoftmaxRouter`.
        experts: all of them.
    """

    def __init__(self, router: nn.Module, experts: Experts) -> None:
        super().__init__()
        self.gate = router
        self.experts = experts

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Routing]:
        """(T, D) -> (T, D), and the routing for whoever counts it."""
        routing: Routing = self.gate(hidden_TD)
        out_TD: Tensor = self.experts(hidden_TD, routing.expert_ids_TK, routing.weights_TK)
        return out_TD, routing

    def weight_entries(self, ours: str, published: str) -> list[Entry]:
        """Entries of router and experts; both prefixes with their dot."""
        entries = [
            renamed(f"{ours}gate.{name}", f"{published}gate.{name}", parameter.shape)
            for name, parameter in self.gate.named_parameters()
        ]
        return entries + self.experts.weight_entries(f"{ours}experts.", f"{published}experts.")


class SparseDecoderLayer(DecoderLayer):
    """A decoder layer whose feed-forward layer is sparse.

    Args:
        hidden_size: D.
        attention: packed causal self-attention.
        feed_forward: router and experts.
        norm_eps: of both norms.
        sums_per_sequence: also sum the balancing loss of each sample.
    """

    def __init__(
        self,
        hidden_size: int,
        attention: CausalSelfAttention,
        feed_forward: SparseFeedForward,
        *,
        norm_eps: float,
        sums_per_sequence: bool,
    ) -> None:
        super().__init__(hidden_size, attention, feed_forward, norm_eps=norm_eps)
        self.sums_per_sequence = sums_per_sequence

    def forward(  # type: ignore[override]
        self,
        hidden_TD: Tensor,
        cos_TH: Tensor,
        sin_TH: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        num_tokens: int,
    ) -> tuple[Tensor, RouterSums]:
        """(T, D) -> (T, D), and sums over the first `num_tokens`, the real ones."""
        hidden_TD = self.attend(hidden_TD, cos_TH, sin_TH, cu_seqlens, max_seqlen)
        out_TD, routing = self.mlp(self.post_attention_layernorm(hidden_TD))
        sums = sum_routing(routing, num_tokens, cu_seqlens, per_sequence=self.sums_per_sequence)
        return hidden_TD + out_TD, sums
