"""Attention over packed rows inside transformers' models.

Where a config asks for nothing but causal attention, each sample is attended by itself (`packed`).
Windows, caps, sinks and biases are left to transformers' own `sdpa` and `eager`, which mask the
whole row by the position ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pegboard_plugins.blocks.attention import packed_attention

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["choose_attention"]

_NAME = "pegboard_packed"
_BEYOND_CAUSAL = ("sliding_window", "attention_chunk_size")
_BEYOND_SDPA = ("attn_logit_softcapping", "alibi")


def choose_attention(wanted: str, hf_config: Any) -> str:
    """transformers' name of the implementation to use; `packed` is made known to it."""
    if wanted == "auto" and any(getattr(hf_config, key, None) for key in _BEYOND_SDPA):
        return "eager"
    asks = [key for key in _BEYOND_CAUSAL if getattr(hf_config, key, None)]
    # Qwen2 and its like carry a window that another key turns off.
    if getattr(hf_config, "use_sliding_window", True) is False and "sliding_window" in asks:
        asks.remove("sliding_window")
    if wanted == "auto" and asks:
        return "sdpa"
    if wanted in ("sdpa", "eager"):
        return wanted
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    # The documented way to add an implementation; the name is ours, nothing existing changes.
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, _no_mask)
    return _NAME


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """(1, heads, T, H) each -> (1, T, heads, H)."""
    asked = [
        name
        for name in ("sliding_window", "softcap", "s_aux", "position_bias")
        if others.get(name) is not None
    ]
    if (
        asked
        or dropout
        or attention_mask is not None
        or getattr(module, "is_causal", True) is False
    ):
        what = ", ".join(asked) or ("dropout" if dropout else "a mask of its own")
        raise NotImplementedError(
            f"{type(module).__name__} asks for {what}, which packed attention does not do; set "
            'model.attention to "sdpa"'
        )
    if cu_seq_lens_q is None or max_length_q is None:
        raise NotImplementedError(
            f"{type(module).__name__} does not pass the samples' bounds on to attention; set "
            'model.attention to "sdpa"'
        )
    q_TNH, k_TKH, v_TKH = (states[0].transpose(0, 1) for states in (query, key, value))
    head_dim = q_TNH.shape[-1]
    if scaling is not None and scaling != head_dim**-0.5:
        q_TNH = q_TNH * (scaling * head_dim**0.5)
    return packed_attention(q_TNH, k_TKH, v_TKH, cu_seq_lens_q, max_length_q)[None], None


def _no_mask(*arguments: Any, **named: Any) -> None:
    """Samples are told apart by their bounds."""
    del arguments, named
