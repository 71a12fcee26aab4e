"""Qwen3 dense: the whole model, over packed rows.

Parameters carry published names except two fusions: q, k, v rows in `qkv_proj`, gate and up rows in
`gate_up_proj`.

Source: Qwen3 technical report 2025, section 2; transformers' Qwen3ForCausalLM is the reference in
    the tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pegboard.contracts import BuiltModel, ShardUnit
from pegboard_plugins.blocks.attention import CausalSelfAttention
from pegboard_plugins.blocks.decoder import DecoderLayer, DecoderLM
from pegboard_plugins.blocks.feed_forward import GatedFeedForward

if TYPE_CHECKING:
    from pegboard_plugins.qwen3.component import Qwen3

__all__ = ["Qwen3CausalLM", "build_qwen3"]


class Qwen3CausalLM(DecoderLM):
    """Qwen3 with its head; a `pegboard.contracts.TextModel`."""

    def __init__(self, config: Qwen3.Config) -> None:
        super().__init__(
            (_layer(config) for _ in range(config.num_hidden_layers)),
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            head_dim=config.head_dim,
            rope_theta=config.rope_theta,
            norm_eps=config.rms_norm_eps,
            initializer_range=config.initializer_range,
            tied=config.tie_word_embeddings,
        )


def build_qwen3(config: Qwen3.Config, hf_config: dict[str, Any]) -> BuiltModel:
    """The module on the current device and what the core must know of it."""
    module = Qwen3CausalLM(config)
    layers = module.layer_paths()
    return BuiltModel(
        module=module,
        weight_map=module.weight_map(),
        shard_units=(*(ShardUnit(path) for path in layers), *module.head_units()),
        hf_config=hf_config,
        checkpoint_units=layers,
    )


def _layer(config: Qwen3.Config) -> DecoderLayer:
    attention = CausalSelfAttention(
        config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=config.head_dim,
        bias=config.attention_bias,
        qk_norm_eps=config.rms_norm_eps,
    )
    feed_forward = GatedFeedForward(config.hidden_size, config.intermediate_size)
    return DecoderLayer(config.hidden_size, attention, feed_forward, norm_eps=config.rms_norm_eps)
