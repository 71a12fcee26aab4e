"""Causal self-attention over a packed row of samples.

`packed_attention` never looks across a sample boundary and builds no mask: on CUDA the boundaries
go to the varlen kernel as `cu_seqlens`, elsewhere the row is split and every sample attended by
itself.

T tokens, D hidden, N query heads, K key/value heads, H head dim, S samples.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pegboard.weight_map import Entry, fused, renamed
from pegboard_plugins.blocks.norm import RMSNorm
from pegboard_plugins.blocks.rope import apply_rope

__all__ = ["CausalSelfAttention", "packed_attention"]


def packed_attention(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:
    """Causal attention inside each sample, scaled by `H ** -0.5`.

    Args:
        q_TNH: (T, N, H) queries.
        k_TKH: (T, K, H) keys; K divides N (grouped queries).
        v_TKH: (T, K, H) values.
        cu_seqlens: (S+1,) int32 from 0 to T, on the device of the queries.
        max_seqlen: longest sample, in tokens.

    Returns:
        (T, N, H), dtype of the queries. T = 0 gives an empty result with a graph.
    """
    if q_TNH.shape[0] == 0:
        return q_TNH + 0 * (k_TKH.sum() + v_TKH.sum())
    if q_TNH.is_cuda and q_TNH.dtype in (torch.bfloat16, torch.float16):
        varlen, options = _varlen_kernel()
        if varlen is not None:
            out_TNH: Tensor = varlen(
                q_TNH, k_TKH, v_TKH, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options
            )
            return out_TNH
    return _attention_by_sample(q_TNH, k_TKH, v_TKH, cu_seqlens)


class CausalSelfAttention(nn.Module):
    """Self-attention with rotary positions, grouped queries and one fused qkv projection.

    Args:
        hidden_size: D.
        num_heads: N query heads.
        num_kv_heads: K key/value heads, dividing N.
        head_dim: H.
        bias: biases in all projections.
        qk_norm_eps: eps of the RMSNorm over H of queries and keys; None for no such norm.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool = False,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.head_counts = [num_heads, num_kv_heads, num_kv_heads]
        self.qkv_proj = nn.Linear(hidden_size, (num_heads + 2 * num_kv_heads) * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)
        if qk_norm_eps is not None:
            self.q_norm: nn.Module = RMSNorm(head_dim, qk_norm_eps)
            self.k_norm: nn.Module = RMSNorm(head_dim, qk_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(
        self, hidden_TD: Tensor, cos_TH: Tensor, sin_TH: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Tensor:
        """(T, D) -> (T, D)."""
        num_tokens = hidden_TD.shape[0]
        qkv = self.qkv_proj(hidden_TD).unflatten(1, (-1, self.head_dim))
        q_TNH, k_TKH, v_TKH = torch.split(qkv, self.head_counts, dim=1)
        q_TNH = apply_rope(self.q_norm(q_TNH), cos_TH, sin_TH)
        k_TKH = apply_rope(self.k_norm(k_TKH), cos_TH, sin_TH)
        out_TNH = packed_attention(q_TNH, k_TKH, v_TKH, cu_seqlens, max_seqlen)
        out: Tensor = self.o_proj(out_TNH.reshape(num_tokens, self.num_heads * self.head_dim))
        return out

    def weight_entries(self, ours: str, published: str) -> list[Entry]:
        """Entries of all parameters, q, k, v apart; both prefixes with their dot."""
        q_rows, kv_rows = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        rows = (("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows))
        entries = []
        for name, parameter in self.named_parameters():
            if name.startswith("qkv_proj."):
                leaf = name.removeprefix("qkv_proj.")
                parts = [(f"{published}{part}.{leaf}", count) for part, count in rows]
                entries.append(fused(ours + name, parts, parameter.shape))
            else:
                entries.append(renamed(ours + name, published + name, parameter.shape))
        return entries


def _attention_by_sample(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cu_seqlens: Tensor) -> Tensor:
    # One split and one cat: slicing in the loop costs a full-size zero gradient per slice in
    # backward.
    lengths = cu_seqlens.diff().tolist()
    enable_gqa = q_TNH.shape[1] != k_TKH.shape[1]
    q, k, v = (
        torch.split(states.transpose(0, 1).unsqueeze(0), lengths, dim=2)
        for states in (q_TNH, k_TKH, v_TKH)
    )
    out = [
        functional.scaled_dot_product_attention(
            q_one, k_one, v_one, is_causal=True, enable_gqa=enable_gqa
        )
        for q_one, k_one, v_one, length in zip(q, k, v, lengths, strict=True)
        if length
    ]
    return torch.cat(out, dim=2).squeeze(0).transpose(0, 1)


@cache
def _varlen_kernel() -> tuple[Any, dict[str, Any]]:
    """torch's varlen attention and what makes it causal and grouped; None where it is missing.

    NOTE: the arguments differ between torch releases (2.11 takes grouped heads without being told).
    """
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return None, {}
    kernel = getattr(varlen, "varlen_attn", None)
    if kernel is None:
        return None, {}
    known = inspect.signature(kernel).parameters
    options: dict[str, Any] = {}
    if "window_size" in known:
        options["window_size"] = (-1, 0)
    elif "is_causal" in known:
        options["is_causal"] = True
    else:
        return None, {}
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    return kernel, options
