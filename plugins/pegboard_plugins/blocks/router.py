"""Routers: which experts a token passes, and with what weight. All math in float32.

Two behind one seam, `forward(hidden_TD) -> Routing`: softmax over all experts then the best K, and
sigmoid scores whose choice (not weight) is corrected by a bias that follows the load.

Source: Shazeer et al. 2017, section 2 (top-k gating); Wang et al. 2024, "Auxiliary-Loss-Free Load
    Balancing" (the bias).

T tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["BiasedSigmoidRouter", "Router", "Routing", "SoftmaxRouter"]


class Routing(NamedTuple):
    """What a router decided. Floats are float32 (float64 for float64 hidden states)."""

    expert_ids_TK: Tensor
    """(T, K) int64, the best first."""
    weights_TK: Tensor
    """(T, K) what each chosen expert's result is multiplied by."""
    scores_TE: Tensor
    """(T, E) shares of the experts, 1 in all per token: what the balancing loss pushes."""
    logits_TE: Tensor
    """(T, E) before any normalisation."""


class Router(Protocol):
    """A router's forward."""

    def __call__(self, hidden_TD: Tensor) -> Routing: ...


class SoftmaxRouter(nn.Module):
    """Softmax over all experts, then the K largest.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: K.
        norm_topk_prob: divide the K weights by their sum.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, norm_topk_prob: bool
    ) -> None:
        super().__init__()
        self.top_k, self.norm_topk_prob = top_k, norm_topk_prob
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(self, hidden_TD: Tensor) -> Routing:
        """(T, D) -> Routing."""
        logits_TE = _wide_linear(hidden_TD, self.weight)
        scores_TE = logits_TE.softmax(-1)
        weights_TK, expert_ids_TK = scores_TE.topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return Routing(expert_ids_TK, weights_TK, scores_TE, logits_TE)

    def extra_repr(self) -> str:
        experts, hidden = self.weight.shape
        return f"{hidden} -> {self.top_k} of {experts}, norm_topk_prob={self.norm_topk_prob}"


class BiasedSigmoidRouter(nn.Module):
    """Sigmoid scores; K are chosen by score plus bias and weighted by score alone.

    After each optimizer step the bias of an expert with more than its share of the load goes down
    by `bias_update_speed`, of one with less up: balance without a loss. The bias is a persistent
    buffer, saved with the run's state.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: K.
        norm_topk_prob: divide the K weights by their sum.
        scaling_factor: multiplies the weights at last.
        bias_update_speed: per optimizer step; 0 keeps the bias.
    """

    e_score_correction_bias: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        norm_topk_prob: bool,
        scaling_factor: float = 1.0,
        bias_update_speed: float = 1e-3,
    ) -> None:
        super().__init__()
        self.top_k, self.norm_topk_prob = top_k, norm_topk_prob
        self.scaling_factor, self.bias_update_speed = scaling_factor, bias_update_speed
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        bias_E = torch.zeros(num_experts, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias_E)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Weight normal(0, 0.02), bias 0."""
        nn.init.normal_(self.weight, 0.0, 0.02, generator=generator)
        nn.init.zeros_(self.e_score_correction_bias)

    def forward(self, hidden_TD: Tensor) -> Routing:
        """(T, D) -> Routing."""
        logits_TE = _wide_linear(hidden_TD, self.weight)
        sigmoid_TE = logits_TE.sigmoid()
        with torch.no_grad():
            biased_TE = sigmoid_TE + self.e_score_correction_bias
            expert_ids_TK = biased_TE.topk(self.top_k, dim=-1).indices
        weights_TK = sigmoid_TE.gather(-1, expert_ids_TK)
        if self.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        scores_TE = sigmoid_TE / (sigmoid_TE.sum(-1, keepdim=True) + 1e-20)
        return Routing(expert_ids_TK, weights_TK * self.scaling_factor, scores_TE, logits_TE)

    def follow_load(self, load_E: Tensor) -> None:
        """Move the bias once, by the whole step's load (any scale), equal on all ranks."""
        with torch.no_grad():
            below_E = torch.sign(load_E.mean() - load_E).to(self.e_score_correction_bias.dtype)
            self.e_score_correction_bias.add_(below_E, alpha=self.bias_update_speed)

    def extra_repr(self) -> str:
        experts, hidden = self.weight.shape
        return f"{hidden} -> {self.top_k} of {experts}, bias speed {self.bias_update_speed}"


def _wide_linear(hidden_TD: Tensor, weight_ED: Tensor) -> Tensor:
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    out_TE: Tensor = _WideLinear.apply(hidden_TD, weight_ED, wide)  # type: ignore[no-untyped-call]
    return out_TE


class _WideLinear(torch.autograd.Function):
    """A linear layer computed in `wide` that keeps the input as it came, not a wide copy."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_ED: Tensor, wide: torch.dtype) -> Tensor:
        ctx.save_for_backward(hidden_TD, weight_ED)
        return nn.functional.linear(hidden_TD.to(wide), weight_ED.to(wide))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden_TD, weight_ED = ctx.saved_tensors
        hidden_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            hidden_grad = (grad_TE @ weight_ED.to(grad_TE.dtype)).to(hidden_TD.dtype)
        if ctx.needs_input_grad[1]:
            weight_grad = (grad_TE.t() @ hidden_TD.to(grad_TE.dtype)).to(weight_ED.dtype)
        return hidden_grad, weight_grad, None
