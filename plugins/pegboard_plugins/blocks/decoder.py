"""A decoder-only language model over packed rows: what Qwen3-like models share.

Embed, decoder layers (attention and feed-forward, each normed before and added), norm, head. A
model passes its layers, and overrides `run_layers` where they return more than hidden states.

T tokens, D hidden, V vocabulary, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from torch import Tensor, nn

from pegboard.contracts import Batch, Loss, LossOutput, ModelOutput, ShardUnit, Targets
from pegboard.weight_map import Entry, WeightMap, renamed
from pegboard_plugins.blocks.attention import CausalSelfAttention
from pegboard_plugins.blocks.head import LMHead
from pegboard_plugins.blocks.norm import RMSNorm
from pegboard_plugins.blocks.rope import rope_cos_sin

__all__ = ["DecoderLM", "DecoderLayer", "MapsWeights"]


class MapsWeights(Protocol):
    """A module that knows the published names of its parameters."""

    def weight_entries(self, ours: str, published: str) -> list[Entry]:
        """Entries of all parameters; both prefixes with their dot."""
        ...


class DecoderLayer(nn.Module):
    """Attention and a feed-forward layer, each normed before and added.

    Args:
        hidden_size: D.
        attention: packed causal self-attention.
        feed_forward: (T, D) -> (T, D); also a `MapsWeights`.
        norm_eps: of both norms.
    """

    def __init__(
        self,
        hidden_size: int,
        attention: CausalSelfAttention,
        feed_forward: nn.Module,
        *,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(hidden_size, norm_eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(hidden_size, norm_eps)
        self.mlp = feed_forward

    def forward(
        self, hidden_TD: Tensor, cos_TH: Tensor, sin_TH: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Tensor:
        """(T, D) -> (T, D)."""
        hidden_TD = self.attend(hidden_TD, cos_TH, sin_TH, cu_seqlens, max_seqlen)
        out_TD: Tensor = hidden_TD + self.mlp(self.post_attention_layernorm(hidden_TD))
        return out_TD

    def attend(
        self, hidden_TD: Tensor, cos_TH: Tensor, sin_TH: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Tensor:
        """(T, D) -> (T, D): the first half of the layer."""
        normed_TD = self.input_layernorm(hidden_TD)
        out_TD: Tensor = hidden_TD + self.self_attn(
            normed_TD, cos_TH, sin_TH, cu_seqlens, max_seqlen
        )
        return out_TD

    def weight_entries(self, prefix: str) -> list[Entry]:
        """Entries of the layer; `prefix`, with its dot, is the same here and published."""
        entries = self.self_attn.weight_entries(prefix + "self_attn.", prefix + "self_attn.")
        feed_forward: MapsWeights = self.mlp  # type: ignore[assignment]
        entries += feed_forward.weight_entries(prefix + "mlp.", prefix + "mlp.")
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            entries.append(renamed(prefix + name, prefix + name, self.get_parameter(name).shape))
        return entries


class DecoderLM(nn.Module):
    """A decoder with its head; a `pegboard.contracts.TextModel`.

    Args:
        layers: in order.
        vocab_size: V.
        hidden_size: D.
        head_dim: H, of the rotary positions.
        rope_theta: their base.
        norm_eps: of the final norm.
        initializer_range: standard deviation of freshly drawn weights.
        tied: the head uses the embedding's weight.
        rope_rescale: what `rope_cos_sin` takes as `rescale`; None for plain rotary positions.
    """

    def __init__(
        self,
        layers: Iterable[DecoderLayer],
        *,
        vocab_size: int,
        hidden_size: int,
        head_dim: int,
        rope_theta: float,
        norm_eps: float,
        initializer_range: float,
        tied: bool,
        rope_rescale: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.initializer_range = initializer_range
        self.head_dim, self.rope_theta, self.rope_rescale = head_dim, rope_theta, rope_rescale
        self.model = _Decoder(layers, vocab_size, hidden_size, norm_eps)
        self.lm_head = LMHead(hidden_size, vocab_size, tied=tied)

    def embed(self, input_ids_T: Tensor) -> Tensor:
        """(T,) ids -> (T, D)."""
        hidden_TD: Tensor = self.model.embed_tokens(input_ids_T)
        return hidden_TD

    def run_layers(self, hidden_TD: Tensor, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """All decoder layers, no final norm; a dense model has no auxiliary losses."""
        cos_TH, sin_TH = self.rotary(batch, hidden_TD)
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
        """Loss of one micro-batch, scaled by `batch.targets.scale`, auxiliary losses added."""
        hidden_TD, auxiliary = self.run_layers(self.embed(batch.input_ids_T), batch)
        out = self.compute_loss(hidden_TD, batch.targets, loss)
        total = out.loss
        for value in auxiliary.values():
            total = total + value
        metrics = {name: value.detach() for name, value in auxiliary.items()}
        return ModelOutput(total, out.token_losses_K, metrics)

    def logits(self, batch: Batch) -> Tensor:
        """(T, V) logits of an unsharded model: for tests and comparisons, not for training."""
        hidden_TD, _ = self.run_layers(self.embed(batch.input_ids_T), batch)
        return self.lm_head.logits(self.model.norm(hidden_TD), self._tied_weight())

    def rotary(self, batch: Batch, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        """cos_TH and sin_TH of the batch's positions, dtype of the hidden states."""
        return rope_cos_sin(
            batch.position_ids_T,
            head_dim=self.head_dim,
            theta=self.rope_theta,
            dtype=hidden_TD.dtype,
            rescale=self.rope_rescale,
        )

    def weight_map(self) -> WeightMap:
        """Names of transformers' `...ForCausalLM`."""
        entries = [_same_name(self, "model.embed_tokens.weight")]
        for index, layer in enumerate(self.model.layers):
            assert isinstance(layer, DecoderLayer)
            entries += layer.weight_entries(f"model.layers.{index}.")
        entries.append(_same_name(self, "model.norm.weight"))
        if self.lm_head.weight is None:
            return WeightMap(tuple(entries), tied={"lm_head.weight": "model.embed_tokens.weight"})
        return WeightMap((*entries, _same_name(self, "lm_head.weight")))

    def layer_paths(self) -> tuple[str, ...]:
        """Module paths of the decoder layers, in order."""
        return tuple(f"model.layers.{index}" for index in range(len(self.model.layers)))

    def head_units(self) -> tuple[ShardUnit, ...]:
        """The head as a unit; a tied one reads the embedding, which the root holds, and is none."""
        return () if self.lm_head.weight is None else (ShardUnit("lm_head", reshard=False),)

    def _tied_weight(self) -> Tensor | None:
        return self.model.embed_tokens.weight if self.lm_head.weight is None else None


class _Decoder(nn.Module):
    """What `model.` holds; has no forward of its own."""

    def __init__(
        self, layers: Iterable[DecoderLayer], vocab_size: int, hidden_size: int, norm_eps: float
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(hidden_size, norm_eps)


def _same_name(module: nn.Module, name: str) -> Entry:
    return renamed(name, name, module.get_parameter(name).shape)
