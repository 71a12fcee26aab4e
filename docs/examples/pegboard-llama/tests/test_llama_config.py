"""Claim: fields, presets and config.json mean to Llama what they mean to transformers, and what
can't be honoured is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from pegboard_llama.component import Llama
from pegboard_llama.modeling import StretchedRope
from pydantic import ValidationError
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pegboard import ConfigError

# Published parameter counts, tied embeddings counted once.
PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
}
TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama(**fields: Any) -> Llama:
    return Llama(Llama.Config.model_validate_json(json.dumps({**TINY, **fields})))


def from_hf(**changes: Any) -> dict[str, Any]:
    return Llama.config_from_hf({"model_type": "llama", **TINY, **changes})


def test_every_preset_has_the_published_number_of_parameters() -> None:
    found = {}
    for name, fields in Llama.presets.items():
        config = Llama.Config.model_validate_json(json.dumps(fields))
        with torch.device("meta"):
            module = Llama(config).build().module
        found[name] = sum(parameter.numel() for parameter in module.parameters())
    assert found == PARAMETERS


@pytest.mark.parametrize("preset", sorted(Llama.presets))
def test_the_exported_config_means_the_same_to_transformers(preset: str) -> None:
    component = llama(**Llama.presets[preset])
    said = component.hf_config()
    theirs = LlamaConfig.from_dict(said)
    ours = component.config.model_dump(exclude={"rope_theta", "rope_scaling", "resize_embeddings"})
    assert {name: getattr(theirs, name) for name in ours} == ours
    assert theirs.rope_parameters == said["rope_parameters"]
    assert Llama.config_from_hf(theirs.to_dict()) == Llama.config_from_hf(said)


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_stretched_frequencies_are_those_of_transformers(spelling: str) -> None:
    published = {
        "model_type": "llama",
        **TINY,
        "head_dim": 128,
        "rope_theta": 5e5,
        spelling: {**SCALING, **({"rope_theta": 5e5} if spelling == "rope_parameters" else {})},
    }
    component = llama(**Llama.config_from_hf(published))
    scaling = component.config.rope_scaling
    assert scaling is not None
    plain = 1 / 5e5 ** (torch.arange(0, 128, 2) / 128)
    theirs, factor = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig.from_dict(published))
    ours = StretchedRope(scaling)(plain)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert factor == 1.0
    # All three kinds occur: kept, blended, divided.
    assert (ours == plain).any() and (ours == plain / 8).any()
    assert ((ours > plain / 8) & (ours < plain)).any()


def test_what_config_json_leaves_out_means_transformers_default() -> None:
    theirs = LlamaConfig(**TINY)
    config = llama(**from_hf()).config
    for name in config.model_dump(exclude={"rope_theta", "rope_scaling", "resize_embeddings"}):
        if name != "num_key_value_heads":
            assert getattr(config, name) == getattr(theirs, name), name
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert config.num_key_value_heads is None and theirs.num_key_value_heads == 4


def test_heads_are_as_wide_as_their_share_unless_it_is_said() -> None:
    assert llama().config.head_dim == 8
    assert llama(head_dim=16).config.head_dim == 16
    assert llama(**from_hf(head_dim=None)).config.head_dim == 8
    with pytest.raises(ValidationError, match="head_dim\n.*multiple of 2"):
        llama(num_attention_heads=32)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn.*'default' and 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "linear"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "without low_freq_factor"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
    ],
)
def test_a_key_that_cannot_be_honoured_is_refused_by_name(
    changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        from_hf(**changes)


@pytest.mark.parametrize(
    ("changes", "where", "named"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads", "3"),
        ({"num_attention_heads": 5}, "num_attention_heads", "32"),
        ({"rope_scaling": {**SCALING, "high_freq_factor": 1.0}}, "high_freq_factor", "1.0"),
    ],
)
def test_a_shape_that_does_not_work_is_a_problem_of_the_config(
    changes: dict[str, Any], where: str, named: str
) -> None:
    run: Any = None
    (problem,) = llama(**changes).check(run, ("model",))
    assert problem.path[-1] == where
    assert named in problem.message
