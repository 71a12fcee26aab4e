"""Llama: the whole model, over packed rows, from Pegboard's blocks.

Parameters carry published names except two fusions that the blocks make: q, k, v rows in
`qkv_proj`, gate and up rows in `gate_up_proj`. Nothing here does either by hand, nor writes the
weight map: the blocks know their published names.

Source: Touvron et al. 2023, "Llama 2", section 2.2; Grattafiori et al. 2024, "The Llama 3 Herd of
    Models", section 3.2; transformers' LlamaForCausalLM is the reference in the tests.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pegboard import BuiltModel, ShardUnit
from pegboard_plugins.blocks.attention import CausalSelfAttention
from pegboard_plugins.blocks.decoder import DecoderLayer, DecoderLM
from pegboard_plugins.blocks.feed_forward import GatedFeedForward

if TYPE_CHECKING:
    from pegboard_llama.component import Llama, Llama3Scaling

__all__ = ["LlamaCausalLM", "StretchedRope", "build_llama"]


class LlamaCausalLM(DecoderLM):
    """Llama with its head; a `pegboard.contracts.TextModel`."""

    def __init__(self, config: Llama.Config) -> None:
        scaling = config.rope_scaling
        super().__init__(
            (_layer(config) for _ in range(config.num_hidden_layers)),
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            head_dim=config.head_dim,
            rope_theta=config.rope_theta,
            norm_eps=config.rms_norm_eps,
            initializer_range=config.initializer_range,
            tied=config.tie_word_embeddings,
            rope_rescale=None if scaling is None else StretchedRope(scaling),
        )


class StretchedRope:
    """Llama 3.1's frequencies: fast ones stay, slow ones are divided, those between are blended.

    Fast and slow are told by how often a frequency turns in the context that the model first had.
    """

    def __init__(self, scaling: Llama3Scaling) -> None:
        self.scaling = scaling

    def __call__(self, frequencies: Tensor) -> Tensor:
        """(H/2,) radians per position -> the same of a longer context."""
        scaling = self.scaling
        turns = frequencies * (scaling.original_max_position_embeddings / (2 * math.pi))
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return torch.lerp(frequencies / scaling.factor, frequencies, kept)


def build_llama(config: Llama.Config, hf_config: dict[str, Any]) -> BuiltModel:
    """The module on the current device and what the core must know of it."""
    module = LlamaCausalLM(config)
    layers = module.layer_paths()
    return BuiltModel(
        module=module,
        weight_map=module.weight_map(),
        shard_units=(*(ShardUnit(path) for path in layers), *module.head_units()),
        hf_config=hf_config,
        checkpoint_units=layers,
    )


def _layer(config: Llama.Config) -> DecoderLayer:
    attention = CausalSelfAttention(
        config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=config.head_dim,
        bias=config.attention_bias,
    )
    feed_forward = GatedFeedForward(
        config.hidden_size, config.intermediate_size, bias=config.mlp_bias
    )
    return DecoderLayer(config.hidden_size, attention, feed_forward, norm_eps=config.rms_norm_eps)
