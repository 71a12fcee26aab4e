"""Fields that Qwen3-like decoders share, and what config.json says of them. Light: no torch.

A model's component derives its `Config` from `DecoderConfig` and adds its own keys to
`decoder_hf_config` and `decoder_fields_from_hf`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from pegboard.component import ComponentConfig, Problem
from pegboard.errors import ConfigError

__all__ = [
    "DECODER_WEIGHT_FIELDS",
    "DecoderConfig",
    "check_heads",
    "decoder_fields_from_hf",
    "decoder_hf_config",
    "rope_of",
]

DECODER_WEIGHT_FIELDS = frozenset(
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
"""Fields that shape weights."""


class DecoderConfig(ComponentConfig):
    """Fields spelled as in transformers."""

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
    tie_word_embeddings: bool = Field(False, description="The head uses the embedding's weight.")
    attention_bias: bool = Field(False, description="Biases in the attention projections.")
    initializer_range: PositiveFloat = Field(
        0.02, description="Standard deviation of freshly drawn weights."
    )
    resize_embeddings: bool = Field(
        False,
        description="Load a smaller vocabulary's weights; the rows added are drawn fresh.",
    )


def check_heads(config: DecoderConfig, path: tuple[str | int, ...]) -> Iterable[Problem]:
    """A problem if the key/value heads do not divide the query heads."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if kv_heads is not None and heads % kv_heads:
        message = f"{kv_heads} key/value heads do not divide num_attention_heads, {heads}"
        yield Problem((*path, "num_key_value_heads"), message)


def decoder_hf_config(
    config: DecoderConfig, *, architecture: str, model_type: str
) -> dict[str, Any]:
    """What `config.json` of an export says, less the dtype, which the saver knows."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
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


def decoder_fields_from_hf(
    hf_config: Mapping[str, Any],
    defaults: Mapping[str, Any],
    *,
    rope_types: Collection[str] = ("default",),
) -> dict[str, Any]:
    """The shared fields of an equal component.

    Args:
        defaults: what a key that config.json leaves out means to transformers, where it is not the
            same for all decoders.
        rope_types: kinds of rotary positions that the model computes; what `rope_of` says beside
            the base is for the model to read.

    Raises:
        ConfigError: a key asks for something that is not computed, such as YaRN.
    """
    _refuse_unsupported(hf_config, rope_types)
    needed = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    fields = {name: hf_config[name] for name in needed if name in hf_config}
    all_defaults = {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "initializer_range": 0.02,
        **defaults,
    }
    fields.update({name: hf_config.get(name, default) for name, default in all_defaults.items()})
    fields["rope_theta"] = rope_of(hf_config).get("rope_theta", 10000.0)
    return fields


def rope_of(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of rotary positions in either spelling, transformers' 4 or 5: `rope_type`,
    `rope_theta` if it is there, and the keys of that type."""
    said = {**(hf_config.get("rope_scaling") or {}), **(hf_config.get("rope_parameters") or {})}
    if "rope_theta" in hf_config:
        said.setdefault("rope_theta", hf_config["rope_theta"])
    kind = said.pop("type", "default")
    said.setdefault("rope_type", kind)
    return said


def _refuse_unsupported(hf_config: Mapping[str, Any], rope_types: Collection[str]) -> None:
    for key in ("rope_parameters", "rope_scaling"):
        rope = hf_config.get(key) or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope and rope_type not in rope_types:
            raise ConfigError(
                f"config.json: {key}: rope_type {rope_type!r} is not supported, only "
                f"{' and '.join(map(repr, rope_types))}; remove {key} to train without it"
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
