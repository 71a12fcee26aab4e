"""Intern-S1 and Intern-S1-mini, as a JSON file names them.

Tower, projector and the merging of both into the text model come from `blocks`; what is here are the
sizes and the names under which the weights are published.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, NonNegativeInt

from pegboard_plugins.blocks.vision_config import PublishedNames, VisionLanguageComponent

__all__ = ["InternS1"]


class InternS1(VisionLanguageComponent):
    """Intern-S1: a vision tower over tiles, a projector, and Qwen3 or any other text model."""

    known_as = ("InternS1Config", "InternS1MiniConfig", "intern_s1", "interns1")
    hf_model_types = ("interns1",)
    architecture = "InternS1ForConditionalGeneration"
    vision_model_type = "interns1_vision"
    names = PublishedNames(
        vision="model.vision_tower.",
        projector="model.multi_modal_projector.",
        text="model.language_model.",
        head="",
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "intern-s1-mini": {
            "vision_config": {},
            "projector_config": {},
            "text_config": {"class_name": "Qwen3", "preset": "qwen3-8b", "vocab_size": 153216},
        },
        "intern-s1": {
            "vision_config": {
                "hidden_size": 3200,
                "intermediate_size": 12800,
                "num_hidden_layers": 45,
                "num_attention_heads": 25,
                "norm_type": "rms_norm",
                "attention_bias": False,
                "use_qk_norm": True,
            },
            "projector_config": {},
            "text_config": {
                "class_name": "Qwen3MoE",
                "preset": "qwen3-235b-a22b",
                "vocab_size": 153216,
            },
        },
    }

    class Config(VisionLanguageComponent.Config):
        """Fields of Intern-S1."""

        image_token_id: NonNegativeInt = Field(
            default=152957, description="Id of <IMG_CONTEXT>, where a picture's features go."
        )

    config: Config
