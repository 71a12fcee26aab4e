"""Qwen3 dense, as a JSON file names it: fields spelled as in transformers, presets, config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

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
    weight_fields = DECODER_WEIGHT_FIELDS

    class Config(DecoderConfig):
        """Fields of a Qwen3 config.json."""

    config: Config

    def check(self, run: RunConfig, path: tuple[str | int, ...]) -> Iterable[Problem]:
        del run
        return check_heads(self.config, path)

    def build(self) -> BuiltModel:
        from pegboard_plugins.qwen3.modeling import build_qwen3

        return build_qwen3(self.config, self.hf_config())

    def hf_config(self) -> dict[str, Any]:
        """What `config.json` of an export says, less the dtype, which the saver knows."""
        return decoder_hf_config(self.config, architecture="Qwen3ForCausalLM", model_type="qwen3")

    @classmethod
    def config_from_hf(cls, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON fields of an equal component.

        Raises:
            ConfigError: a key asks for something that this model does not compute, such as YaRN.
        """
        # What config.json leaves out means transformers' default, which differs from ours in places.
        return decoder_fields_from_hf(hf_config, {"num_key_value_heads": 32, "head_dim": 128})
