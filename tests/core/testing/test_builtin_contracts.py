"""The claim: every built-in part keeps every promise of its kind; none is left out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from pegboard.plugin_manager import load_plugins
from pegboard.testing import Case, Check, checks_for

REGISTRY = load_plugins(third_party=False).registry
QWEN3: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
MOE = {
    **QWEN3,
    "moe_intermediate_size": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [0],
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 288,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
TEXT = {"class_name": "Qwen3", **QWEN3}
CHAT = {
    "messages": [
        {"role": "user", "content": "What is two and two?"},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": "And three?"},
        {"role": "assistant", "content": "Five."},
    ]
}
FORMS: dict[str, list[Any]] = {
    "OpenAIFormat": [CHAT, CHAT["messages"]],
    "ShareGPTFormat": [
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    ],
    "AlpacaFormat": [{"instruction": "Add.", "input": "1 1", "output": "2"}],
    "PromptCompletionFormat": [{"prompt": "a", "completion": "b"}],
    "PlainTextFormat": [{"text": "a text"}],
    "PretokenizedFormat": [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}],
}
"""Records of each form; those of the others are foreign to it."""
TWO_FIELDS = ("vision_config", "projector_config")

CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Qwen3": (QWEN3, {}),
    "Qwen3MoE": (MOE, {}),
    "AutoModelForCausalLM": ({"hf_config": LLAMA}, {}),
    "InternS1": (
        {"vision_config": VISION, "projector_config": {}, "text_config": TEXT, "image_token_id": 265},
        {},
    ),
    "InternVL": (
        {"vision_config": VISION, "projector_config": {}, "text_config": TEXT, "image_token_id": 265},
        {},
    ),
    "ChatTokenizeFn": ({"max_length": 512}, {"records": [CHAT]}),
    "TextTokenizeFn": ({"max_length": 512}, {"records": [{"text": "some words"}]}),
    "AdapterSaver": ({}, {"adapter": True}),
    "LoRA": ({"rank": 2}, {}),
    "Freeze": ({"prefixes": ["model.layers.0."]}, {}),
    "AdamW": ({"lr": 1e-3}, {}),
    "SequentialPacker": ({}, {"keeps_order": True}),
}
SKIPPED = {
    ("AutoModelForCausalLM", "config_goes_both_ways"): "transformers adds keys with every release",
}


def cases() -> list[Any]:
    found = []
    for kind in sorted({entry.kind for entry in REGISTRY.entries()}):
        for entry in REGISTRY.entries():
            if entry.kind != kind:
                continue
            for check in checks_for(kind):
                marks = [pytest.mark.slow] if check.name == "two_ranks_are_one" else []
                name = f"{entry.class_name}-{check.name}"
                found.append(pytest.param(entry.cls, check, id=name, marks=marks))
    return found
