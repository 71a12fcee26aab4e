"""Claim: Qwen3's fields, presets and config.json agree with transformers, and what can't be
honoured is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from pegboard.errors import ConfigError
from pegboard_plugins.qwen3.component import Qwen3

# Published parameter counts, tied embeddings counted once.
PARAMETERS = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}
TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def from_hf(**changes: Any) -> dict[str, Any]:
    return Qwen3.config_from_hf({"model_type": "qwen3", **TINY, "head_dim": 8, **changes})


@pytest.mark.parametrize("preset", sorted(Qwen3.presets))
def test_a_preset_has_the_published_number_of_parameters(preset: str) -> None:
    with torch.device("meta"):
        built = Qwen3(Qwen3.Config(**Qwen3.presets[preset])).build()
    assert sum(p.numel() for p in built.module.parameters()) == PARAMETERS[preset]


def test_every_preset_is_listed_in_this_test() -> None:
    assert set(Qwen3.presets) == set(PARAMETERS)


@pytest.mark.parametrize("preset", sorted(Qwen3.presets))
def test_the_exported_config_means_the_same_to_transformers(preset: str) -> None:
    component = Qwen3(Qwen3.Config(**Qwen3.presets[preset]))
    theirs = Qwen3Config.from_dict(component.hf_config())
    for name in Qwen3.Config.model_fields.keys() - {"rope_theta", "resize_embeddings"}:
        assert getattr(theirs, name) == getattr(component.config, name), name
    assert theirs.rope_parameters == {"rope_type": "default", "rope_theta": 1000000.0}
    assert theirs.layer_types is not None and set(theirs.layer_types) == {"full_attention"}


def test_config_json_there_and_back_gives_the_same_fields() -> None:
    config = Qwen3.Config(**TINY, num_key_value_heads=2, rope_theta=77.0, attention_bias=True)
    ours = Qwen3(config)
    assert Qwen3.Config(**Qwen3.config_from_hf(ours.hf_config())) == config
    theirs = Qwen3Config.from_dict(ours.hf_config()).to_dict()
    assert Qwen3.Config(**Qwen3.config_from_hf(theirs)) == config


def test_what_config_json_leaves_out_means_transformers_default() -> None:
    theirs = Qwen3Config()
    fields = Qwen3.config_from_hf({"model_type": "qwen3", **TINY})
    for name in fields.keys() - TINY.keys() - {"rope_theta"}:
        assert fields[name] == getattr(theirs, name), name
    assert theirs.rope_parameters is not None
    assert fields["rope_theta"] == theirs.rope_parameters["rope_theta"]


def test_rope_theta_is_read_in_both_spellings() -> None:
    assert from_hf(rope_theta=5.0, rope_scaling=None)["rope_theta"] == 5.0
    assert from_hf(rope_parameters={"rope_type": "default", "rope_theta": 6.0})["rope_theta"] == 6.0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6}}, "linear"),
        (
            {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"use_sliding_window": True, "sliding_window": 16}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
)
def test_a_key_that_cannot_be_honoured_is_refused_by_name(
    changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        from_hf(**changes)


def test_heads_that_do_not_divide_are_a_problem_of_the_config() -> None:
    component = Qwen3(Qwen3.Config(**TINY, num_key_value_heads=3))
    (problem,) = component.check(None, ("model",))  # type: ignore[arg-type]
    assert problem.path == ("model", "num_key_value_heads")
    assert "4" in problem.message and "3" in problem.message
