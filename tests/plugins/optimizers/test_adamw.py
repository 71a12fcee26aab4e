"""Claim: AdamW splits parameters by name and shape, shows base rates, and fails on a dead rule."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from pegboard import ConfigError, ParameterGroup
from pegboard_plugins.optimizers.component import AdamW


def make_group(*names: str, dtype: torch.dtype = torch.float32) -> ParameterGroup:
    """`norm` and `bias` in a name make a vector."""
    vectors = ["norm" in name or "bias" in name for name in names]
    shapes = [(3,) if vector else (3, 2) for vector in vectors]
    generator = torch.Generator().manual_seed(0)
    parameters = [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes
    ]
    return ParameterGroup(list(zip(names, parameters, strict=True)), vectors)


def build(groups: list[ParameterGroup], **fields: Any) -> torch.optim.AdamW:
    config = AdamW.Config.model_validate_json(json.dumps(fields))
    return AdamW(config).build(groups)


def test_norms_and_biases_do_not_decay_and_the_rest_does() -> None:
    group = make_group("a.weight", "a.bias", "norm.weight", "b.weight")
    optimizer = build([group], lr=1e-3, weight_decay=0.1)
    weights, vectors = optimizer.param_groups
    assert (weights["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    tensors = dict(group.named_parameters)
    assert [id(p) for p in weights["params"]] == [id(tensors["a.weight"]), id(tensors["b.weight"])]
    assert [id(p) for p in vectors["params"]] == [id(tensors["a.bias"]), id(tensors["norm.weight"])]


def test_vectors_decay_where_the_config_says_so() -> None:
    optimizer = build([make_group("a.weight", "a.bias")], weight_decay=0.1, decay_vectors=True)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1]
    assert len(optimizer.param_groups[0]["params"]) == 2


def test_every_torch_group_has_a_name_of_its_own_and_its_base_rate() -> None:
    rules = [{"match": "vision.*", "lr": 1e-6}]
    groups = [make_group("vision.w", "vision.norm", "text.w"), make_group("text.expert")]
    optimizer = build(groups, lr=1e-4, param_groups=rules)
    assert {group["name"]: group["base_lr"] for group in optimizer.param_groups} == {
        "0/vision.*/weights": 1e-6,
        "0/vision.*/vectors": 1e-6,
        "0/default/weights": 1e-4,
        "1/default/weights": 1e-4,
    }
    assert all(group["lr"] == group["base_lr"] for group in optimizer.param_groups)


def test_parameters_of_two_meshes_never_share_a_torch_group() -> None:
    first, second = make_group("a.w"), make_group("b.w")
    optimizer = build([first, second])
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]


def test_a_rule_sets_the_decay_of_vectors_too() -> None:
    optimizer = build(
        [make_group("a.w", "a.bias")], param_groups=[{"match": "a.*", "weight_decay": 0.3}]
    )
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3]


def test_the_first_matching_rule_counts() -> None:
    rules = [{"match": "a.b.*", "lr": 1.0}, {"match": "a.*", "lr": 2.0}]
    optimizer = build([make_group("a.c.w", "a.b.w")], param_groups=rules)
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {
        "0/a.*/weights": 2.0,
        "0/a.b.*/weights": 1.0,
    }


def test_a_rule_may_match_in_one_group_only() -> None:
    groups = [make_group("dense.w"), make_group("experts.w")]
    optimizer = build(groups, param_groups=[{"match": "experts.*", "lr": 2.0}])
    assert [group["lr"] for group in optimizer.param_groups] == [1e-5, 2.0]


def test_a_rule_that_matches_nothing_is_an_error_that_names_it() -> None:
    with pytest.raises(
        ConfigError, match=r"param_groups\[0\]\.match: 'visoin\.\*' matches no .*'vision\.w'"
    ):
        build([make_group("vision.w")], param_groups=[{"match": "visoin.*", "lr": 1e-6}])


def test_a_rule_that_an_earlier_one_covers_is_an_error_that_names_both() -> None:
    rules = [{"match": "a.*", "lr": 1.0}, {"match": "a.b.*", "lr": 2.0}]
    with pytest.raises(
        ConfigError, match=r"param_groups\[1\]\.match: 'a\.b\.\*' .* earlier rule 'a\.\*'"
    ):
        build([make_group("a.b.w", "a.c.w")], param_groups=rules)


@pytest.mark.parametrize("groups", [[], [ParameterGroup([], [])]])
def test_nothing_to_train_is_a_config_error(groups: list[ParameterGroup]) -> None:
    with pytest.raises(ConfigError, match="no trainable parameter"):
        build(groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_fused_and_steps_as_plain_adamw_does(dtype: torch.dtype) -> None:
    ours, theirs = make_group("a.w", dtype=dtype), make_group("a.w", dtype=dtype)
    optimizer = build([ours], lr=1e-2, betas=[0.8, 0.9], eps=1e-6, weight_decay=0.1)
    assert optimizer.defaults["fused"] is True
    (_, left), (_, right) = ours.named_parameters[0], theirs.named_parameters[0]
    plain = torch.optim.AdamW(
        [right], lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1, foreach=False
    )
    for step in range(3):
        left.grad, right.grad = left.detach() + step, right.detach() + step
        optimizer.step()
        plain.step()
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(left, right, rtol=bound, atol=bound)


@pytest.mark.parametrize(
    "fields",
    [
        {"lr": 0},
        {"lr": -1e-5},
        {"betas": [0.9, 1.0]},
        {"betas": [0.9]},
        {"eps": 0},
        {"weight_decay": -0.1},
    ]
    + [
        {"param_groups": [{"lr": 1.0}]},
        {"param_groups": [{"match": "", "lr": 1.0}]},
        {"momentum": 0.9},
    ],
)
def test_a_value_out_of_range_is_refused_before_the_run(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AdamW.Config.model_validate_json(json.dumps(fields))
