"""InternVL 3.5 (`-HF` checkpoints), as a JSON file names it: the same parts as Intern-S1 under other names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, NonNegativeInt

from pegboard_plugins.blocks.vision_config import PublishedNames, VisionLanguageComponent

__all__ = ["InternVL"]


def _preset(text_class: str, text_preset: str) -> Mapping[str, Any]:
    return {"text_config": {"class_name": text_class, "preset": text_preset}}


class InternVL(VisionLanguageComponent):
    """InternVL 3.5: a vision tower over tiles, a projector, and Qwen3 or any other text model."""

    known_as = ("InternVLConfig", "InternVL3P5Dense8BConfig", "InternVLChat", "intern_vl")
    hf_model_types = ("internvl",)
    architecture = "InternVLForConditionalGeneration"
    vision_model_type = "internvl_vision"
    names = PublishedNames(
        vision="vision_tower.",
        projector="multi_modal_projector.",
        text="language_model.model.",
        head="language_model.",
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "internvl3.5-1b": _preset("Qwen3", "qwen3-0.6b"),
        "internvl3.5-8b": _preset("Qwen3", "qwen3-8b"),
        "internvl3.5-30b-a3b": _preset("Qwen3MoE", "qwen3-30b-a3b"),
    }

    class Config(VisionLanguageComponent.Config):
        """Fields of InternVL."""

        image_token_id: NonNegativeInt = Field(
            default=151671, description="Id of <IMG_CONTEXT>, where a picture's features go."
        )

    config: Config
