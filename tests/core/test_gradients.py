"""Claim: the norm is that of the whole gradient and clipping brings it to the limit as torch's own does, or leaves it
alone; checkpointing recomputes the share of units that was asked for, evenly spread, and changes no number."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from pegboard import parallel
from pegboard.contracts import BuiltModel
from pegboard.parallel import (
    Ranks,
    apply_activation_checkpointing,
    clip_gradients,
    gradient_norm,
    reduce_once_per_step,
)
from pegboard.weight_map import WeightMap

ALONE = Ranks(0, 1, torch.device("cpu"), None)  # type: ignore[arg-type]


def with_gradients(seed: int = 0) -> list[nn.Parameter]:
    torch.manual_seed(seed)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (2,), (0, 4))]
    for parameter in parameters[:2] + parameters[3:]:  # one has none
        parameter.grad = torch.randn_like(parameter) * 3
    return parameters


@pytest.mark.parametrize("limit", [0.5, 1e3])
def test_gradients_are_clipped_as_torch_does(limit: float) -> None:
    ours, theirs = with_gradients(), with_gradients()
    norm = gradient_norm(ours, ALONE)
    expected = nn.utils.clip_grad_norm_(theirs, limit)
    assert float(norm) == pytest.approx(float(expected), rel=1e-6)
    clip_gradients(ours, norm, limit)
    for one, two in zip(ours, theirs, strict=True):
        assert (one.grad is None) == (two.grad is None)
        if one.grad is not None and two.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-6, atol=0)
    after = float(gradient_norm(ours, ALONE))
    assert after == pytest.approx(min(limit, float(norm)), rel=1e-5)


def test_one_gradient_that_is_no_number_makes_the_norm_none() -> None:
    parameters = with_gradients()
    assert parameters[0].grad is not None
    parameters[0].grad[1, 1] = float("inf")
    assert not torch.isfinite(gradient_norm(parameters, ALONE))


@pytest.mark.parametrize(("mine", "all_fit"), [(True, True), (True, False), (False, False)])
def test_ranks_agree_on_when_gradients_are_reduced(
    mine: bool, all_fit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_of_two = Ranks(0, 2, torch.device("cpu"), None)  # type: ignore[arg-type]
    told: list[float] = []

    def with_the_other(values: Mapping[str, float], ranks: Ranks) -> dict[str, float]:
        told.extend(values.values())
        return {name: value + all_fit for name, value in values.items()}

    monkeypatch.setattr(parallel, "sum_over_ranks", with_the_other)
    monkeypatch.setattr(parallel, "device_memory_bytes", lambda _: 10**6 if mine else 100)
    layer = nn.Linear(10, 10)
    assert reduce_once_per_step("auto", layer, one_of_two) is all_fit
    assert told == [float(mine)]
    assert reduce_once_per_step("per_step", layer, one_of_two)
    assert not reduce_once_per_step("per_micro_batch", layer, one_of_two)
    assert len(told) == 1


class Layer(nn.Linear):
    """Counts how often it runs."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return super().forward(x).tanh()


def stack(num_layers: int) -> BuiltModel:
    torch.manual_seed(1)
    return BuiltModel(
        module=nn.Sequential(*(Layer(4, 4) for _ in range(num_layers))),
        weight_map=WeightMap(()),
        shard_units=(),
        hf_config={},
        checkpoint_units=tuple(str(index) for index in range(num_layers)),
    )


RUNS: Mapping[tuple[str, float | None], list[int]] = {
    ("none", None): [1, 1, 1, 1, 1, 1, 1, 1],
    ("full", None): [2, 2, 2, 2, 2, 2, 2, 2],
    ("ratio", 1.0): [2, 2, 2, 2, 2, 2, 2, 2],
    ("ratio", 0.5): [1, 2, 1, 2, 1, 2, 1, 2],
    ("ratio", 0.25): [1, 1, 1, 2, 1, 1, 1, 2],
}


@pytest.mark.parametrize(("mode", "ratio"), RUNS)
def test_as_many_layers_run_again_as_were_asked_for(mode: str, ratio: float | None) -> None:
    plain, recomputed = stack(8), stack(8)
    apply_activation_checkpointing(recomputed, mode, ratio)
    for built in (plain, recomputed):
        built.module(torch.ones(3, 4)).sum().backward()
    layers = [layer for layer in recomputed.module.modules() if isinstance(layer, Layer)]
    assert [layer.runs for layer in layers] == RUNS[mode, ratio]
    names = [name for name, _ in plain.module.named_parameters()]
    assert [name for name, _ in recomputed.module.named_parameters()] == names
    for one, two in zip(plain.module.parameters(), recomputed.module.parameters(), strict=True):
        assert one.grad is not None and two.grad is not None and torch.equal(one.grad, two.grad)
