"""Qwen3-MoE: the whole model, over packed rows.

A Qwen3 whose feed-forward layers are, all or some, a router and experts. Parameters carry published
names except the fusions of Qwen3 and the experts, which are stacked: `experts.gate_up_proj` and
`experts.down_proj`. Each sparse layer returns sums over its routing beside the hidden states; the
auxiliary losses are made of them once, at the end of the layers.

Source: Qwen3 technical report 2025, section 2; transformers' Qwen3MoeForCausalLM is the reference
    in the tests.

T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pegboard.contracts import Batch, BuiltModel, ShardUnit
from pegboard_plugins.blocks.attention import CausalSelfAttention
from pegboard_plugins.blocks.balancing import ExpertBalance
from pegboard_plugins.blocks.decoder import DecoderLayer, DecoderLM
from pegboard_plugins.blocks.experts import Experts
from pegboard_plugins.blocks.feed_forward import GatedFeedForward
from pegboard_plugins.blocks.router import SoftmaxRouter
from pegboard_plugins.blocks.sparse_feed_forward import SparseDecoderLayer, SparseFeedForward

if TYPE_CHECKING:
    from pegboard_plugins.qwen3_moe.component import Qwen3MoE

__all__ = ["Qwen3MoECausalLM", "build_qwen3_moe"]


class Qwen3MoECausalLM(DecoderLM):
    """Qwen3-MoE with its head; a `pegboard.contracts.TextModel`."""

    def __init__(self, config: Qwen3MoE.Config) -> None:
        layers = range(config.num_hidden_layers)
        super().__init__(
            (_layer(config, index) for index in layers),
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            head_dim=config.head_dim,
            rope_theta=config.rope_theta,
            norm_eps=config.rms_norm_eps,
            initializer_range=config.initializer_range,
            tied=config.tie_word_embeddings,
        )
        trains, sparse = not config.freeze_router, [i for i in layers if config.is_sparse(i)]
        self.balance = (
            ExpertBalance(
                [f"layer_{index}" for index in sparse],
                config.num_experts,
                config.num_experts_per_tok,
                mode=config.balancing,
                balancing_coef=config.router_aux_loss_coef if trains else 0.0,
                z_coef=config.router_z_loss_coef if trains else 0.0,
            )
            if sparse
            else None
        )

    def run_layers(self, hidden_TD: Tensor, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """All decoder layers, no final norm; and the auxiliary losses."""
        cos_TH, sin_TH = self.rotary(batch, hidden_TD)
        sums = []
        for layer in self.model.layers:
            inputs = (hidden_TD, cos_TH, sin_TH, batch.cu_seqlens, batch.max_seqlen)
            if isinstance(layer, SparseDecoderLayer):
                hidden_TD, of_layer = layer(*inputs, batch.num_tokens)
                sums.append(of_layer)
            else:
                hidden_TD = layer(*inputs)
        return hidden_TD, {} if self.balance is None else self.balance(sums, batch)


def build_qwen3_moe(config: Qwen3MoE.Config, hf_config: dict[str, Any]) -> BuiltModel:
    """The module on the current device and what the core must know of it."""
    module = Qwen3MoECausalLM(config)
    layers = module.layer_paths()
    units: list[ShardUnit] = []
    expert_axis: dict[str, int] = {}
    routers = []
    for index, path in enumerate(layers):
        if config.is_sparse(index):
            # A small unit that keeps its weight in float32 and is not gathered again for backward.
            units.append(ShardUnit(f"{path}.mlp.gate", param_dtype="float32", reshard=False))
            units.append(ShardUnit(f"{path}.mlp.experts", mesh="expert"))
            routers.append(f"{path}.mlp.gate.")
            for name in ("gate_up_proj", "down_proj"):
                expert_axis[f"{path}.mlp.experts.{name}"] = 0
        units.append(ShardUnit(path))
    return BuiltModel(
        module=module,
        weight_map=module.weight_map(),
        shard_units=(*units, *module.head_units()),
        hf_config=hf_config,
        checkpoint_units=layers,
        expert_axis=expert_axis,
        freeze_groups={"router": tuple(routers)} if routers else {},
        frozen=tuple(routers) if config.freeze_router else (),
    )


def _layer(config: Qwen3MoE.Config, index: int) -> DecoderLayer:
    attention = CausalSelfAttention(
        config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=config.head_dim,
        bias=config.attention_bias,
        qk_norm_eps=config.rms_norm_eps,
    )
    if not config.is_sparse(index):
        dense = GatedFeedForward(config.hidden_size, config.intermediate_size)
        return DecoderLayer(config.hidden_size, attention, dense, norm_eps=config.rms_norm_eps)
    router = SoftmaxRouter(
        config.hidden_size,
        config.num_experts,
        config.num_experts_per_tok,
        norm_topk_prob=config.norm_topk_prob,
    )
    experts = Experts(config.hidden_size, config.moe_intermediate_size, config.num_experts)
    return SparseDecoderLayer(
        config.hidden_size,
        attention,
        SparseFeedForward(router, experts),
        norm_eps=config.rms_norm_eps,
        sums_per_sequence=config.balancing == "per_sequence",
    )
