"""Qwen3 dense: the whole model, over packed rows.

Embed, decoder layers (attention and feed-forward, each normed before and added), norm, head.
Parameters carry published names except two fusions: q, k, v rows in `qkv_proj`, gate and up rows in
`gate_up_proj`.

Source: Qwen3 technical report 2025, section 2; transformers' Qwen3ForCausalLM is the reference in
    the tests.

T tokens, D hidden, V vocabulary, H head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pegboard.contracts import (
    Batch,
    BuiltModel,
    Loss,
    LossOutput,
    ModelOutput,
    ShardUnit,
    Targets,
)
from pegboard.weight_map import Entry, WeightMap, renamed
from pegboard_plugins.blocks.attention import CausalSelfAttention
from pegboard_plugins.blocks.feed_forward import GatedFeedForward
from pegboard_plugins.blocks.head import LMHead
from pegboard_plugins.blocks.norm import RMSNorm
from pegboard_plugins.blocks.rope import rope_cos_sin

if TYPE_CHECKING:
    from pegboard_plugins.qwen3.component import Qwen3

__all__ = ["Qwen3CausalLM", "Qwen3Decoder", "Qwen3Layer", "build_qwen3"]


class Qwen3Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: Qwen3.Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = CausalSelfAttention(
            config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=config.head_dim,
            bias=config.attention_bias,
            qk_norm_eps=config.rms_norm_eps,
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedFeedForward(config.hidden_size, config.intermediate_size)

    def forward(
        self, hidden_TD: Tensor, cos_TH: Tensor, sin_TH: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Tensor:
        """(T, D) -> (T, D)."""
        hidden_TD = hidden_TD + self.self_attn(
            self.input_layernorm(hidden_TD), cos_TH, sin_TH, cu_seqlens, max_seqlen
        )
        out_TD: Tensor = hidden_TD + self.mlp(self.post_attention_layernorm(hidden_TD))
        return out_TD

    def weight_entries(self, prefix: str) -> list[Entry]:
        """Entries of the layer; `prefix`, with its dot, is the same here and published."""
        entries = self.self_attn.weight_entries(prefix + "self_attn.", prefix + "self_attn.")
        entries += self.mlp.weight_entries(prefix + "mlp.", prefix + "mlp.")
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            entries.append(renamed(prefix + name, prefix + name, self.get_parameter(name).shape))
        return entries


class Qwen3Decoder(nn.Module):
    """What `model.` holds; has no forward of its own."""

    def __init__(self, config: Qwen3.Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Qwen3Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Qwen3CausalLM(nn.Module):
    """Qwen3 with its head; a `pegboard.contracts.TextModel`."""

    def __init__(self, config: Qwen3.Config) -> None:
        super().__init__()
        self.initializer_range = config.initializer_range
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        self.model = Qwen3Decoder(config)
        self.lm_head = LMHead(
            config.hidden_size, config.vocab_size, tied=config.tie_word_embeddings
        )

    def embed(self, input_ids_T: Tensor) -> Tensor:
        """(T,) ids -> (T, D)."""
        hidden_TD: Tensor = self.model.embed_tokens(input_ids_T)
        return hidden_TD

    def run_layers(self, hidden_TD: Tensor, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """All decoder layers, no final norm; a dense model has no auxiliary losses."""
        cos_TH, sin_TH = rope_cos_sin(
            batch.position_ids_T,
            head_dim=self.head_dim,
            theta=self.rope_theta,
            dtype=hidden_TD.dtype,
        )
        for layer in self.model.layers:
            hidden_TD = layer(hidden_TD, cos_TH, sin_TH, batch.cu_seqlens, batch.max_seqlen)
        return hidden_TD, {}

    def compute_loss(self, hidden_TD: Tensor, targets: Targets, loss: Loss) -> LossOutput:
        """Final norm, then the head with the loss inside."""
        out: LossOutput = self.lm_head(
            self.model.norm(hidden_TD), targets, loss, self._tied_weight()
        )
        return out

    def forward(self, batch: Batch, loss: Loss) -> ModelOutput:
        """Loss of one micro-batch, scaled by `batch.targets.scale`."""
        hidden_TD, _ = self.run_layers(self.embed(batch.input_ids_T), batch)
        out = self.compute_loss(hidden_TD, batch.targets, loss)
        return ModelOutput(out.loss, out.token_losses_K, {})

    def logits(self, batch: Batch) -> Tensor:
        """(T, V) logits of an unsharded model: for tests and comparisons, not for training."""
        hidden_TD, _ = self.run_layers(self.embed(batch.input_ids_T), batch)
        return self.lm_head.logits(self.model.norm(hidden_TD), self._tied_weight())

    def weight_map(self) -> WeightMap:
        """Names of Qwen3ForCausalLM."""
        entries = [_same_name(self, "model.embed_tokens.weight")]
        for index, layer in enumerate(self.model.layers):
            assert isinstance(layer, Qwen3Layer)
            entries += layer.weight_entries(f"model.layers.{index}.")
        entries.append(_same_name(self, "model.norm.weight"))
        if self.lm_head.weight is None:
            return WeightMap(tuple(entries), tied={"lm_head.weight": "model.embed_tokens.weight"})
        return WeightMap((*entries, _same_name(self, "lm_head.weight")))

    def _tied_weight(self) -> Tensor | None:
        return self.model.embed_tokens.weight if self.lm_head.weight is None else None


def build_qwen3(config: Qwen3.Config, hf_config: dict[str, Any]) -> BuiltModel:
    """The module on the current device and what the core must know of it."""
    module = Qwen3CausalLM(config)
    layers = tuple(f"model.layers.{index}" for index in range(config.num_hidden_layers))
    # A tied head reads the embedding, which the root holds: it can't be a unit of its own.
    head = () if config.tie_word_embeddings else (ShardUnit("lm_head", reshard=False),)
    return BuiltModel(
        module=module,
        weight_map=module.weight_map(),
        shard_units=(*(ShardUnit(path) for path in layers), *head),
        hf_config=hf_config,
        checkpoint_units=layers,
    )


def _same_name(module: nn.Module, name: str) -> Entry:
    return renamed(name, name, module.get_parameter(name).shape)
