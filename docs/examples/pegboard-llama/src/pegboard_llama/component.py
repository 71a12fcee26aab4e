"""Llama as a JSON file names it: fields spelled as in transformers, presets, config.json.

Light: nothing here imports torch. The module itself is in `modeling`, which `build` imports.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from pegboard import BuiltModel, ComponentConfig, ConfigError, ModelComponent, Problem
from pegboard_plugins.blocks.decoder_config import (
    DECODER_WEIGHT_FIELDS,
    DecoderConfig,
    check_heads,
    decoder_fields_from_hf,
    decoder_hf_config,
    rope_of,
)

if TYPE_CHECKING:
    from pegboard.run_config import RunConfig

__all__ = ["Llama", "Llama3Scaling"]


class Llama3Scaling(ComponentConfig):
    """How Llama 3.1 stretches its rotary positions over a longer context."""

    rope_type: Literal["llama3"] = Field("llama3", description="The only kind computed here.")
    factor: PositiveFloat = Field(description="Slow frequencies are divided by it.")
    low_freq_factor: PositiveFloat = Field(
        description="Frequencies that turn less often than this in the original context are slow."
    )
    high_freq_factor: PositiveFloat = Field(
        description="Frequencies that turn more often than this in the original context stay."
    )
    original_max_position_embeddings: PositiveInt = Field(
        description="The context before it was stretched, in tokens."
    )


def _llama3(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _preset(
    hidden: int, intermediate: int, layers: int, heads: int, *, tied: bool, factor: float
) -> Mapping[str, Any]:
    """A Llama 3.1 or 3.2; all of them have eight key/value heads."""
    return {
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
        "rope_scaling": _llama3(factor),
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": tied,
    }


class Llama(ModelComponent):
    """Llama decoder: Llama 2 to 3.2, SmolLM2 and others of their shape."""

    hf_model_types = ("llama",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smollm2-135m": {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "rope_theta": 100000.0,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
        "llama-3.2-1b": _preset(2048, 8192, 16, 32, tied=True, factor=32.0),
        "llama-3.2-3b": _preset(3072, 8192, 28, 24, tied=True, factor=32.0),
        "llama-3.1-8b": _preset(4096, 14336, 32, 32, tied=False, factor=8.0),
    }
    weight_fields = DECODER_WEIGHT_FIELDS | {"mlp_bias"}

    class Config(DecoderConfig):
        """Fields of a Llama config.json."""

        head_dim: PositiveInt = Field(
            default_factory=lambda data: data["hidden_size"] // data["num_attention_heads"],
            description="Width of a head, even; left out, hidden_size / num_attention_heads.",
            multiple_of=2,
        )
        rope_theta: PositiveFloat = Field(10000.0, description="Base of the rotary frequencies.")
        rope_scaling: Llama3Scaling | None = Field(
            None, description="How rotary positions are stretched; null for not at all."
        )
        max_position_embeddings: PositiveInt = Field(
            2048, description="Longest sequence the model is meant for, in tokens; exported as is."
        )
        mlp_bias: bool = Field(False, description="Biases in the feed-forward projections.")

    config: Config

    def check(self, run: RunConfig, path: tuple[str | int, ...]) -> Iterable[Problem]:
        del run
        config = self.config
        yield from check_heads(config, path)
        if config.hidden_size % config.num_attention_heads:
            message = (
                f"{config.num_attention_heads} heads do not divide hidden_size, "
                f"{config.hidden_size}; transformers opens no such Llama"
            )
            yield Problem((*path, "num_attention_heads"), message)
        scaling = config.rope_scaling
        if scaling is not None and scaling.high_freq_factor <= scaling.low_freq_factor:
            message = (
                f"{scaling.high_freq_factor} is not above low_freq_factor, "
                f"{scaling.low_freq_factor}"
            )
            yield Problem((*path, "rope_scaling", "high_freq_factor"), message)

    def build(self) -> BuiltModel:
        from pegboard_llama.modeling import build_llama

        return build_llama(self.config, self.hf_config())

    def hf_config(self) -> dict[str, Any]:
        """What `config.json` of an export says, less the dtype, which the saver knows."""
        said = decoder_hf_config(self.config, architecture="LlamaForCausalLM", model_type="llama")
        del said["use_sliding_window"], said["sliding_window"]  # Llama has no windows
        said["mlp_bias"] = self.config.mlp_bias
        scaling = self.config.rope_scaling
        if scaling is not None:
            # transformers 4 reads the first, 5 the second.
            said["rope_scaling"] = scaling.model_dump()
            said["rope_parameters"] = {
                "rope_theta": self.config.rope_theta,
                **scaling.model_dump(),
            }
        return said

    @classmethod
    def config_from_hf(cls, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON fields of an equal component.

        Raises:
            ConfigError: a key asks for something that this model does not compute, such as YaRN, or
                the scaling of its rotary positions lacks a key.
        """
        # What config.json leaves out means transformers' default, which is not always ours.
        defaults = {"num_key_value_heads": None, "max_position_embeddings": 2048, "mlp_bias": False}
        fields = decoder_fields_from_hf(hf_config, defaults, rope_types=("default", "llama3"))
        if hf_config.get("head_dim") is not None:
            fields["head_dim"] = hf_config["head_dim"]
        rope = rope_of(hf_config)
        if rope["rope_type"] == "llama3":
            names = Llama3Scaling.model_fields
            if missing := [name for name in names if name not in rope]:
                raise ConfigError(
                    f"config.json: rope_type 'llama3' without {' and '.join(missing)}; expected "
                    f"{', '.join(names)}"
                )
            fields["rope_scaling"] = {name: rope[name] for name in names}
        return fields
