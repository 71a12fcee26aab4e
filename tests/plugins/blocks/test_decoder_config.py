"""Claim: what config.json says of rotary positions is read in both spellings, and a model names the kinds it computes."""

from __future__ import annotations

from typing import Any

import pytest

from pegboard.errors import ConfigError
from pegboard_plugins.blocks.decoder_config import decoder_fields_from_hf, rope_of

LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ({}, {"rope_type": "default"}),
        ({"rope_theta": 5.0, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5.0}),
        ({"rope_theta": 5.0, "rope_scaling": LINEAR}, {**LINEAR, "rope_theta": 5.0}),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, LINEAR),
        ({"rope_parameters": {**LINEAR, "rope_theta": 6.0}}, {**LINEAR, "rope_theta": 6.0}),
        (
            {"rope_theta": 5.0, "rope_parameters": {**LINEAR, "rope_theta": 6.0}},
            {**LINEAR, "rope_theta": 6.0},
        ),
    ],
)
def test_rotary_positions_are_read_in_both_spellings(said: Any, found: Any) -> None:
    assert rope_of(said) == found


def test_a_model_names_the_kinds_of_rotary_positions_it_computes() -> None:
    said = {"rope_theta": 5.0, "rope_scaling": LINEAR}
    assert decoder_fields_from_hf(said, {}, rope_types=("linear",))["rope_theta"] == 5.0
    with pytest.raises(ConfigError, match="'linear' is not supported, only 'default' and 'llama3'"):
        decoder_fields_from_hf(said, {}, rope_types=("default", "llama3"))
