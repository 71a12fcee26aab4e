"""Qwen3-MoE, as a JSON file names it: fields spelled as in transformers, presets, config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from pegboard.component import ModelComponent, Problem
from pegboard_plugins.blocks.decoder_config import (
    DECODER_WEIGHT_FIELDS,
    DecoderConfig,
    check_heads,
    decoder_fields_from_hf,
    decoder_hf_config,
)

if TYPE_CHECKING:
    from pegboard.contracts import BuiltModel
    from pegboard.run_config import RunConfig

__all__ = ["Qwen3MoE"]


def _preset(
    hidden: int, intermediate: int, moe: int, layers: int, heads: int, *, theta: float, length: int
) -> Mapping[str, Any]:
    return {
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "moe_intermediate_size": moe,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "rope_theta": theta,
        "max_position_embeddings": length,
        "rms_norm_eps": 1e-6,
    }


class Qwen3MoE(ModelComponent):
    """Qwen3-MoE decoder, 30B-A3B and 235B-A22B: each token passes a few of many experts."""

    known_as = ("qwen3_moe", "Qwen3MoeForCausalLM", "Qwen3MoEConfig")
    hf_model_types = ("qwen3_moe",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "qwen3-30b-a3b": _preset(2048, 6144, 768, 48, 32, theta=1e6, length=40960),
        "qwen3-30b-a3b-2507": _preset(2048, 6144, 768, 48, 32, theta=1e7, length=262144),
        "qwen3-235b-a22b": _preset(4096, 12288, 1536, 94, 64, theta=1e6, length=40960),
        "qwen3-235b-a22b-2507": _preset(4096, 12288, 1536, 94, 64, theta=5e6, length=262144),
    }
    weight_fields = DECODER_WEIGHT_FIELDS | {
        "moe_intermediate_size",
        "num_experts",
        "decoder_sparse_step",
        "mlp_only_layers",
    }

    class Config(DecoderConfig):
        """Fields of a Qwen3-MoE config.json, and how the load of the experts is evened out."""

        moe_intermediate_size: PositiveInt = Field(description="Width inside an expert.")
        num_experts: PositiveInt = Field(description="Experts of a sparse layer.")
        num_experts_per_tok: PositiveInt = Field(description="Experts that each token passes.")
        norm_topk_prob: bool = Field(
            True, description="Divide the weights of a token's experts by their sum."
        )
        decoder_sparse_step: PositiveInt = Field(
            1, description="Every so many layers one is sparse: layers n - 1, 2n - 1, ..."
        )
        mlp_only_layers: tuple[NonNegativeInt, ...] = Field(
            (), description="Layers that are dense (of intermediate_size) in any case, from 0."
        )
        router_aux_loss_coef: NonNegativeFloat = Field(
            0.001,
            description=(
                "Weight of the balancing loss, which is 1 per sparse layer at perfect balance; "
                "summed over layers. 0 turns it off."
            ),
        )
        router_z_loss_coef: NonNegativeFloat = Field(
            0.0,
            description=(
                "Weight of the z-loss, the squared log of the router's normaliser; a mean over "
                "tokens, summed over layers."
            ),
        )
        balancing: Literal["lagged", "two_pass", "per_sequence", "hf_pooled", "per_micro_batch"] = (
            Field(
                "lagged",
                description=(
                    "Whose load the balancing loss uses: the step before (lagged; free), this step "
                    "(two_pass: one more forward pass where gradients are accumulated), each "
                    "sample's own (per_sequence). These do not depend on ranks or accumulation. "
                    "hf_pooled copies transformers, pooled over layers, where perfect balance is "
                    "num_experts_per_tok; it and per_micro_batch change with ranks and accumulation."
                ),
            )
        )
        freeze_router: bool = Field(
            False,
            description="Keep the routers as they were loaded; turns the auxiliary losses off.",
        )

        def is_sparse(self, layer: int) -> bool:
            """Whether a layer, from 0, has experts."""
            dense = layer in self.mlp_only_layers
            return not dense and (layer + 1) % self.decoder_sparse_step == 0

    config: Config

    def check(self, run: RunConfig, path: tuple[str | int, ...]) -> Iterable[Problem]:
        del run
        config = self.config
        yield from check_heads(config, path)
        if config.num_experts_per_tok > config.num_experts:
            message = f"{config.num_experts_per_tok} of num_experts, {config.num_experts}"
            yield Problem((*path, "num_experts_per_tok"), message)
        for index, layer in enumerate(config.mlp_only_layers):
            if layer >= config.num_hidden_layers:
                message = f"no layer {layer}: num_hidden_layers is {config.num_hidden_layers}"
                yield Problem((*path, "mlp_only_layers", index), message)

    def num_experts(self) -> int:
        """Experts of a sparse layer; 0 where every layer is dense."""
        layers = range(self.config.num_hidden_layers)
        return self.config.num_experts if any(map(self.config.is_sparse, layers)) else 0

    def build(self) -> BuiltModel:
        from pegboard_plugins.qwen3_moe.modeling import build_qwen3_moe

        return build_qwen3_moe(self.config, self.hf_config())

    def hf_config(self) -> dict[str, Any]:
        """What `config.json` of an export says, less the dtype, which the saver knows."""
        config = self.config
        said = {
            **decoder_hf_config(config, architecture="Qwen3MoeForCausalLM", model_type="qwen3_moe"),
            "moe_intermediate_size": config.moe_intermediate_size,
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "norm_topk_prob": config.norm_topk_prob,
            "decoder_sparse_step": config.decoder_sparse_step,
            "mlp_only_layers": list(config.mlp_only_layers),
            "output_router_logits": False,
            "router_aux_loss_coef": config.router_aux_loss_coef,
        }
        if config.router_z_loss_coef:  # not a key of transformers' Qwen3MoeConfig
            said["router_z_loss_coef"] = config.router_z_loss_coef
        return said

    @classmethod
    def config_from_hf(cls, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON fields of an equal component.

        Raises:
            ConfigError: a key asks for something that this model does not compute, such as YaRN.
        """
        heads = hf_config.get("num_attention_heads", 32)
        fields = decoder_fields_from_hf(
            hf_config,
            {
                "num_key_value_heads": 4,
                "head_dim": hf_config.get("hidden_size", 2048) // heads,
                "moe_intermediate_size": 768,
                "num_experts_per_tok": 8,
                "norm_topk_prob": False,
                "decoder_sparse_step": 1,
                "router_aux_loss_coef": 0.001,
                "router_z_loss_coef": 0.0,
            },
        )
        # transformers 5 may write the second spelling.
        fields["num_experts"] = hf_config.get(
            "num_experts", hf_config.get("num_local_experts", 128)
        )
        fields["mlp_only_layers"] = list(hf_config.get("mlp_only_layers") or ())
        return fields
