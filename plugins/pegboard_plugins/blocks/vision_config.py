"""What a vision-language model of tower, projector and any text model says of itself, without torch.

A plugin derives a component from `VisionLanguageComponent` and adds its names: presets, `model_type`,
published prefixes. Fields are spelled as in transformers, except that `text_config` holds a whole
registered model.

Source: Chen et al. 2024, "How Far Are We to GPT-4V?" (InternVL 1.5), section 3: tiles of 448 pixels,
    pixel shuffle to 256 tokens a tile; transformers' internvl classes are the reference in the tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from pegboard.component import ComponentConfig, ModelComponent, Problem
from pegboard.component_field import ComponentOf
from pegboard.contracts import ImageTokens
from pegboard.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from pegboard.contracts import BuiltModel
    from pegboard.run_config import RunConfig

__all__ = ["ProjectorConfig", "PublishedNames", "VisionConfig", "VisionLanguageComponent"]

_Color = tuple[float, float, float]
_SHAPING = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "norm_type",
    "attention_bias",
    "use_qk_norm",
)


class VisionConfig(ComponentConfig):
    """The vision tower; defaults are InternViT-300M."""

    hidden_size: PositiveInt = Field(default=1024, description="Width of the hidden states.")
    intermediate_size: PositiveInt = Field(
        default=4096, description="Width inside the feed-forward layers."
    )
    num_hidden_layers: PositiveInt = Field(default=24, description="Number of layers.")
    num_attention_heads: PositiveInt = Field(
        default=16, description="Attention heads; they divide hidden_size."
    )
    image_size: PositiveInt = Field(
        default=448,
        description="Side of a tile that the position embeddings are made for, in pixels.",
    )
    patch_size: PositiveInt = Field(default=14, description="Side of a patch, in pixels.")
    norm_type: Literal["layer_norm", "rms_norm"] = Field(
        default="layer_norm", description="Kind of the two norms of a layer."
    )
    layer_norm_eps: PositiveFloat = Field(
        default=1e-6, description="Added to the variance in norms."
    )
    attention_bias: bool = Field(default=True, description="Biases in the q, k, v projections.")
    use_qk_norm: bool = Field(
        default=False,
        description="RMSNorm over all of a query and of a key, before heads are split.",
    )
    layer_scale_init_value: float = Field(
        default=0.1, description="Fresh value of the factors on both branches of a layer."
    )
    drop_path_rate: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Chance that the last layer's branches skip a tile; rises evenly from 0.",
    )
    initializer_range: PositiveFloat = Field(
        default=0.02, description="Standard deviation of freshly drawn weights."
    )


class ProjectorConfig(ComponentConfig):
    """From the tower's patches to rows of the text model."""

    downsample_ratio: float = Field(
        default=0.5,
        gt=0.0,
        le=1.0,
        description="Rows of the input per patch of a side, 1 / a whole number: 0.5 joins 2 x 2 "
        "patches.",
    )


class PublishedNames:
    """How published tensors are called: what stands before each part's names.

    Args:
        vision: before the tower's, with its dot.
        projector: before the projector's, with its dot.
        text: before the text model's, where that says `model.`.
        head: before the text model's other names.
    """

    def __init__(self, *, vision: str, projector: str, text: str, head: str) -> None:
        self.vision, self.projector = vision, projector
        self._text, self._head = text, head

    def of_text(self, name: str) -> str:
        """Published name of a tensor that the text model alone publishes as `name`."""
        if name.startswith("model."):
            return self._text + name.removeprefix("model.")
        return self._head + name


class VisionLanguageComponent(ModelComponent):
    """Base of models made of a vision tower over tiles, a projector and any registered text model."""

    requires = frozenset({"pixel_values"})
    weight_fields = frozenset(
        {f"vision_config.{name}" for name in _SHAPING} | {"projector_config.downsample_ratio"}
    )
    architecture: ClassVar[str] = ""
    """What config.json calls the class."""
    vision_model_type: ClassVar[str] = ""
    """`model_type` of config.json's vision_config."""
    names: ClassVar[PublishedNames]

    class Config(ComponentConfig):
        """Fields of a vision-language model."""

        vision_config: VisionConfig = Field(default=VisionConfig(), description="The vision tower.")
        projector_config: ProjectorConfig = Field(
            default=ProjectorConfig(), description="From the tower to the text model."
        )
        text_config: Annotated[ModelComponent, ComponentOf("model")] = Field(
            description="The text model: any registered one."
        )
        image_token_id: NonNegativeInt = Field(
            description="Id that stands where a picture's features go."
        )
        tile_size: PositiveInt | None = Field(
            default=None,
            description="Side of the tiles in pixels; null: vision_config.image_size. Another size "
            "interpolates the position embeddings.",
        )
        image_mean: _Color = Field(
            default=(0.485, 0.456, 0.406),
            description="Taken from each colour, which is between 0 and 1.",
        )
        image_std: _Color = Field(
            default=(0.229, 0.224, 0.225), description="Each colour is divided by it afterwards."
        )
        freeze_vision: bool = Field(
            default=False, description="Keep the vision tower as it was loaded."
        )
        freeze_projector: bool = Field(
            default=False, description="Keep the projector as it was loaded."
        )
        freeze_language: bool = Field(
            default=False, description="Keep the text model as it was loaded."
        )
        vision_recompute_ratio: float = Field(
            default=1.0,
            ge=0.0,
            le=1.0,
            description="Share of the tower's layers that recompute their activations in backward; "
            "a frozen tower keeps none.",
        )

    config: Config

    def check(self, run: RunConfig, path: tuple[str | int, ...]) -> Iterable[Problem]:
        del run
        config, vision = self.config, self.config.vision_config
        yield from self._check_text(path)
        if vision.hidden_size % vision.num_attention_heads:
            yield Problem(
                (*path, "vision_config", "num_attention_heads"),
                f"{vision.num_attention_heads} does not divide hidden_size, {vision.hidden_size}",
            )
        ratio = config.projector_config.downsample_ratio
        if ratio * round(1 / ratio) != 1.0:
            yield Problem(
                (*path, "projector_config", "downsample_ratio"),
                f"{ratio} is not 1 / a whole number, such as 0.5",
            )
            return
        joined = vision.patch_size * round(1 / ratio)
        for where, size in (
            ((*path, "vision_config", "image_size"), vision.image_size),
            ((*path, "tile_size"), config.tile_size),
        ):
            if size is not None and size % joined:
                yield Problem(
                    where,
                    f"{size} is not a multiple of {joined} (patch_size / downsample_ratio); "
                    f"the nearest are {size // joined * joined} and {(size // joined + 1) * joined}",
                )
        if "image_std" in config.model_fields_set and min(config.image_std) <= 0:
            yield Problem((*path, "image_std"), f"{min(config.image_std)} is not above 0")

    def _check_text(self, path: tuple[str | int, ...]) -> Iterable[Problem]:
        text, image_token_id = self.config.text_config, self.config.image_token_id
        if text.image_tokens() is not None:
            yield Problem(
                (*path, "text_config", "class_name"),
                f"{type(text).__name__} takes pictures itself; expected a text model, such as Qwen3",
            )
        vocab_size = getattr(text.config, "vocab_size", None)
        if vocab_size is not None and image_token_id >= vocab_size:
            yield Problem(
                (*path, "image_token_id"),
                f"{image_token_id} is no id of text_config.vocab_size {vocab_size}; give the id of "
                "<IMG_CONTEXT> in the tokenizer, and a vocabulary that holds it (with load_from also "
                '"resize_embeddings": true in text_config)',
            )

    def image_tokens(self) -> ImageTokens:
        """Side of a tile, rows it fills, and their id."""
        vision = self.config.vision_config
        tile_size = self.config.tile_size or vision.image_size
        joined = vision.patch_size * round(1 / self.config.projector_config.downsample_ratio)
        side = tile_size // joined
        return ImageTokens(tile_size, side * side, self.config.image_token_id)

    def num_experts(self) -> int:
        """The text model's."""
        return self.config.text_config.num_experts()

    def sample_costs(self, lengths: np.ndarray, num_tiles: np.ndarray) -> np.ndarray:
        """The text model's, and for each tile the tower's products in units of a token's there.

        A frozen tower runs forward only, a third of the work.
        """
        vision, text = self.config.vision_config, self.config.text_config
        size, tile_size = vision.hidden_size, self.image_tokens().tile_size
        patches = (tile_size // vision.patch_size) ** 2 + 1
        weights = 4 * size * size + 2 * size * vision.intermediate_size
        tile = vision.num_hidden_layers * patches * (weights + 2 * patches * size)
        layers = getattr(text.config, "num_hidden_layers", 24)
        token = layers * 12 * getattr(text.config, "hidden_size", 2048) ** 2
        share = 1 / 3 if self.config.freeze_vision else 1.0
        return text.sample_costs(lengths, num_tiles) + num_tiles * (share * tile / token)

    def build(self) -> BuiltModel:
        from pegboard_plugins.blocks.vision_language import build_vision_language

        return build_vision_language(self)

    def hf_config(self, text: Mapping[str, Any]) -> dict[str, Any]:
        """What `config.json` of an export says, less the dtype; `text` is the text model's."""
        config, vision = self.config, self.config.vision_config
        return {
            "architectures": [self.architecture],
            "model_type": self.hf_model_types[0],
            "vision_config": {
                "model_type": self.vision_model_type,
                "hidden_size": vision.hidden_size,
                "intermediate_size": vision.intermediate_size,
                "num_hidden_layers": vision.num_hidden_layers,
                "num_attention_heads": vision.num_attention_heads,
                "num_channels": 3,
                "image_size": [vision.image_size, vision.image_size],
                "patch_size": [vision.patch_size, vision.patch_size],
                "norm_type": vision.norm_type,
                "layer_norm_eps": vision.layer_norm_eps,
                "attention_bias": vision.attention_bias,
                "use_qk_norm": vision.use_qk_norm,
                "layer_scale_init_value": vision.layer_scale_init_value,
                "drop_path_rate": vision.drop_path_rate,
                "hidden_act": "gelu",
                "hidden_dropout_prob": 0.0,
                "attention_dropout": 0.0,
                "projection_dropout": 0.0,
                "initializer_range": vision.initializer_range,
                "use_absolute_position_embeddings": True,
                "use_mask_token": False,
                "use_mean_pooling": True,
            },
            "text_config": dict(text),
            "image_token_id": config.image_token_id,
            "image_seq_length": self.image_tokens().tokens_per_tile,
            "downsample_ratio": config.projector_config.downsample_ratio,
            "projector_hidden_act": "gelu",
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
            # transformers takes its own default (true) where only the text model says it.
            "tie_word_embeddings": bool(text.get("tie_word_embeddings", False)),
        }

    @classmethod
    def config_from_hf(cls, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON fields of an equal component; `text_config` stays as published.

        Raises:
            ConfigError: a key asks for something that these models do not compute.
        """
        _refuse(hf_config, "", _ONLY)
        published = hf_config.get("vision_config") or {}
        _refuse(published, "vision_config.", _VISION_ONLY)
        # What config.json leaves out means transformers' default, which differs from ours in places.
        vision: dict[str, Any] = {"attention_bias": False}
        for name in VisionConfig.model_fields:
            if name in published:
                vision[name] = published[name]
        for name in ("image_size", "patch_size"):
            vision[name] = _square(f"vision_config.{name}", vision.get(name, _DEFAULT_SIDES[name]))
        text = hf_config.get("text_config") or {}
        if "tie_word_embeddings" in hf_config:
            text = {"tie_word_embeddings": hf_config["tie_word_embeddings"], **text}
        fields: dict[str, Any] = {
            "vision_config": vision,
            "projector_config": {"downsample_ratio": hf_config.get("downsample_ratio", 0.5)},
            "text_config": text,
        }
        if "image_token_id" in hf_config:
            fields["image_token_id"] = hf_config["image_token_id"]
        return fields


_DEFAULT_SIDES = {"image_size": 448, "patch_size": 14}
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "projector_hidden_act": ("gelu",),
    "vision_feature_layer": (-1,),
    "vision_feature_select_strategy": ("default",),
    "quantization_config": (None,),
}
_VISION_ONLY: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    "num_channels": (3,),
    "use_absolute_position_embeddings": (True,),
    "use_mask_token": (False,),
    "use_mean_pooling": (True,),
    "hidden_dropout_prob": (0,),
    "attention_dropout": (0,),
    "projection_dropout": (0,),
    "dropout": (0,),
}


def _refuse(hf_config: Mapping[str, Any], prefix: str, only: Mapping[str, tuple[Any, ...]]) -> None:
    for key, allowed in only.items():
        if key in hf_config and hf_config[key] not in allowed:
            raise ConfigError(
                f"config.json: {prefix}{key} {hf_config[key]!r} is not supported, only {allowed[0]!r}"
            )


def _square(key: str, value: int | Sequence[int]) -> int:
    sides = [value] if isinstance(value, int) else list(value)
    if len(set(sides)) != 1:
        raise ConfigError(f"config.json: {key} {value!r} is not square, which is not supported")
    return int(sides[0])
