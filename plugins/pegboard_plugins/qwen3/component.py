"""Qwen3 dense, as a JSON file names it: fields spelled as in transformers, presets, config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from pegboard.component import ComponentConfig, ModelComponent, Problem
from pegboard.errors import ConfigError

if TYPE_CHECKING:
    from pegboard.contracts import BuiltModel
    from pegboard.run_config import RunConfig

__all__ = ["Qwen3"]


def _preset(
    hidden: int, intermediate: int, layers: int, heads: int, *, tied: bool
) -> Mapping[str, Any]:
    return {
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
    }


class Qwen3(ModelComponent):
    """Qwen3 dense decoder, 0.6B to 32B: grouped, normed queries and keys; SwiGLU."""

    hf_model_types = ("qwen3",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "qwen3-0.6b": _preset(1024, 3072, 28, 16, tied=True),
        "qwen3-1.7b": _preset(2048, 6144, 28, 16, tied=True),
        "qwen3-4b": _preset(2560, 9728, 36, 32, tied=True),
        "qwen3-8b": _preset(4096, 12288, 36, 32, tied=False),
        "qwen3-14b": _preset(5120, 17408, 40, 40, tied=False),
        "qwen3-32b": _preset(5120, 25600, 64, 64, tied=False),
    }
    weight_fields = frozenset(
        {
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "tie_word_embeddings",
            "attention_bias",
        }
    )

    class Config(ComponentConfig):
        """Fields of a Qwen3 config.json."""

        vocab_size: PositiveInt = Field(description="Rows of the embedding.")
        hidden_size: PositiveInt = Field(description="Width of the hidden states.")
        intermediate_size: PositiveInt = Field(description="Width inside the feed-forward layers.")
        num_hidden_layers: PositiveInt = Field(description="Number of decoder layers.")
        num_attention_heads: PositiveInt = Field(description="Query heads.")
        num_key_value_heads: PositiveInt | None = Field(
            None, description="Key and value heads, dividing the query heads; null for as many."
        )
        head_dim: PositiveInt = Field(128, description="Width of a head, even.", multiple_of=2)
        hidden_act: Literal["silu"] = Field("silu", description="Activation of the gate.")
        rms_norm_eps: PositiveFloat = Field(1e-6, description="Added to the mean square in norms.")
        rope_theta: PositiveFloat = Field(1000000.0, description="Base of the rotary frequencies.")
        max_position_embeddings: PositiveInt = Field(
            40960, description="Longest sequence the model is meant for, in tokens; exported as is."
        )
        tie_word_embeddings: bool = Field(
            False, description="The head uses the embedding's weight."
        )
        attention_bias: bool = Field(False, description="Biases in the attention projections.")
        initializer_range: PositiveFloat = Field(
            0.02, description="Standard deviation of freshly drawn weights."
        )
        resize_embeddings: bool = Field(
            False,
            description="Load a smaller vocabulary's weights; the rows added are drawn fresh.",
        )

    config: Config

    def check(self, run: RunConfig, path: tuple[str | int, ...]) -> Iterable[Problem]:
        del run
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        if kv_heads is not None and heads % kv_heads:
            message = f"{kv_heads} key/value heads do not divide num_attention_heads, {heads}"
            yield Problem((*path, "num_key_value_heads"), message)

    def build(self) -> BuiltModel:
        from pegboard_plugins.qwen3.modeling import build_qwen3

        return build_qwen3(self.config, self.hf_config())

    def hf_config(self) -> dict[str, Any]:
        """What `config.json` of an export says, less the dtype, which the saver knows."""
        config = self.config
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads or config.num_attention_heads,
            "head_dim": config.head_dim,
            "hidden_act": config.hidden_act,
            "rms_norm_eps": config.rms_norm_eps,
            # transformers 4 reads the first spelling, 5 the second.
            "rope_theta": config.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
            "max_position_embeddings": config.max_position_embeddings,
            "tie_word_embeddings": config.tie_word_embeddings,
            "attention_bias": config.attention_bias,
            "attention_dropout": 0.0,
            "initializer_range": config.initializer_range,
            "use_cache": True,
            "use_sliding_window": False,
            "sliding_window": None,
        }

    @classmethod
    def config_from_hf(cls, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON fields of an equal component.

        Raises:
            ConfigError: a key asks for something that this model does not compute, such as YaRN.
        """
        _refuse_unsupported(hf_config)
        fields = {
            name: hf_config[name]
            for name in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
            )
            if name in hf_config
        }
        # What config.json leaves out means transformers' default, which differs from ours in
        # places.
        defaults = {
            "num_key_value_heads": 32,
            "head_dim": 128,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "initializer_range": 0.02,
        }
        fields.update({name: hf_config.get(name, default) for name, default in defaults.items()})
        rope = hf_config.get("rope_parameters") or {}
        fields["rope_theta"] = rope.get("rope_theta", hf_config.get("rope_theta", 10000.0))
        return fields


def _refuse_unsupported(hf_config: Mapping[str, Any]) -> None:
    for key in ("rope_parameters", "rope_scaling"):
        rope = hf_config.get(key) or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise ConfigError(
                f"config.json: {key}: rope_type {rope_type!r} is not supported, only 'default'; "
                f"remove {key} to train without it"
            )
        partial = rope.get("partial_rotary_factor", 1.0)
        if partial != 1.0:
            raise ConfigError(
                f"config.json: {key}.partial_rotary_factor {partial} is not supported, only 1.0"
            )
    layer_types = hf_config.get("layer_types") or ()
    if hf_config.get("use_sliding_window") or any(kind != "full_attention" for kind in layer_types):
        raise ConfigError(
            "config.json: use_sliding_window: sliding-window attention is not supported, only full"
        )
    if hf_config.get("hidden_act", "silu") != "silu":
        raise ConfigError(
            f"config.json: hidden_act {hf_config['hidden_act']!r} is not supported, only 'silu'"
        )
    if hf_config.get("attention_dropout"):
        raise ConfigError(
            f"config.json: attention_dropout {hf_config['attention_dropout']} is not supported, "
            "only 0"
        )
    if hf_config.get("quantization_config"):
        raise ConfigError(
            "config.json: quantization_config: quantized weights can't train; load the originals"
        )
