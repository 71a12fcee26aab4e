"""Claim: an export's config.json is the one the run began with, unknown keys included, and only what the run
changed is edited."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pegboard.published_config import edited_config, export_config
from pegboard_plugins.qwen3.component import Qwen3

PUBLISHED: dict[str, Any] = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rope_theta": 10000.0,
    "somebodys_note": [1, 2],
    "transformers_version": "4.51.0",
}


def exported(folder: Path, published: dict[str, Any], **changes: Any) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(published), encoding="utf-8")
    model = Qwen3(Qwen3.Config(**{**Qwen3.config_from_hf(PUBLISHED), **changes}))
    with torch.device("meta"):
        ours = model.build().hf_config
    return export_config(model, ours, folder)


def test_nothing_changed_leaves_every_key_as_it_was(tmp_path: Path) -> None:
    assert exported(tmp_path, PUBLISHED) == PUBLISHED


def test_a_changed_field_is_edited_whether_it_stood_there_or_not(tmp_path: Path) -> None:
    config = exported(tmp_path, PUBLISHED, vocab_size=64, rms_norm_eps=1e-5)
    assert config == {**PUBLISHED, "vocab_size": 64, "rms_norm_eps": 1e-5}


def test_a_folder_that_says_nothing_or_something_else_gives_our_own(tmp_path: Path) -> None:
    model = Qwen3(Qwen3.Config(**Qwen3.config_from_hf(PUBLISHED)))
    ours = model.hf_config()
    assert export_config(model, ours, None) == ours
    assert export_config(model, ours, tmp_path) == ours
    assert exported(tmp_path, {**PUBLISHED, "model_type": "other"}) == ours
    assert exported(tmp_path, {**PUBLISHED, "use_sliding_window": True}) == ours


def test_an_object_is_edited_inside() -> None:
    published = {"inner": {"a": 1, "theirs": 2}, "kept": 3}
    unchanged = {"inner": {"a": 1, "b": 5}, "kept": 3}
    ours = {"inner": {"a": 7, "b": 5}, "kept": 3}
    edited = edited_config(published, unchanged, ours)
    assert edited == {"inner": {"a": 7, "theirs": 2}, "kept": 3}
    assert published["inner"] == {"a": 1, "theirs": 2}
