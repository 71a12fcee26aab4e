"""What an optimizer promises: groups that a schedule can drive, descent, state that can be saved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pegboard.component import ParameterGroup
from pegboard.optimizer_state import create_state, optimizer_entries
from pegboard.testing.case import Case, Check

__all__ = ["CHECKS", "OPTIONS"]

OPTIONS = frozenset[str]()


def _parameters() -> dict[str, nn.Parameter]:
    draw = torch.Generator().manual_seed(4)
    shapes = {"a.weight": (4, 3), "a.bias": (4,), "norm.weight": (3,), "b.weight": (2, 4)}
    return {n: nn.Parameter(torch.randn(shape, generator=draw)) for n, shape in shapes.items()}


def _build(case: Case, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    named = list(parameters.items())
    group = ParameterGroup(named, [p.ndim <= 1 for _, p in named])
    optimizer: torch.optim.Optimizer = case.make().build([group])
    return optimizer


def _steps(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], n: int) -> float:
    """Minimise the distance to 1; the last loss."""
    loss = torch.tensor(0.0)
    for _ in range(n):
        optimizer.zero_grad()
        loss = torch.stack([((p - 1) ** 2).sum() for p in parameters]).sum()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def _takes_every_parameter_once(case: Case) -> None:
    parameters = _parameters()
    held = [p for group in _build(case, parameters).param_groups for p in group["params"]]
    assert len(held) == len(parameters), f"{len(held)} of {len(parameters)} parameters are held"
    assert {id(p) for p in held} == {id(p) for p in parameters.values()}, "others are held"


def _groups_have_a_base_rate(case: Case) -> None:
    for group in _build(case, _parameters()).param_groups:
        assert "base_lr" in group, "a group has no `base_lr` for the schedule to scale"
        assert group["lr"] == group["base_lr"], f"lr {group['lr']} at the start, not `base_lr`"


def _meshes_stay_apart(case: Case) -> None:
    one, two = _parameters(), _parameters()
    groups = [
        ParameterGroup(list(p.items()), [q.ndim <= 1 for q in p.values()]) for p in (one, two)
    ]
    ids = {id(p) for p in one.values()}
    for group in case.make().build(groups).param_groups:
        inside = {id(p) in ids for p in group["params"]}
        assert len(inside) == 1, "a group mixes parameters of two meshes"


def _goes_downhill(case: Case) -> None:
    parameters = _parameters()
    optimizer = _build(case, parameters)
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    first = _steps(optimizer, list(parameters.values()), 1)
    last = _steps(optimizer, list(parameters.values()), 60)
    assert last < first, f"the loss went from {first:.4f} to {last:.4f} in 60 steps"


def _a_rate_of_zero_moves_nothing(case: Case) -> None:
    parameters = _parameters()
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = _build(case, parameters)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    _steps(optimizer, list(parameters.values()), 2)
    moved = [name for name, p in parameters.items() if not torch.equal(p, before[name])]
    assert not moved, f"moved at a rate of 0: {', '.join(moved)}"


def _a_parameter_without_gradient_stays(case: Case) -> None:
    parameters = _parameters()
    before = parameters["b.weight"].detach().clone()
    optimizer = _build(case, parameters)
    _steps(optimizer, [p for name, p in parameters.items() if name != "b.weight"], 2)
    assert torch.equal(parameters["b.weight"], before), "moved without a gradient"


def _state_goes_on_where_it_was(case: Case) -> None:
    one, two = _parameters(), _parameters()
    first = _build(case, one)
    _steps(first, list(one.values()), 3)
    second = _build(case, two)
    create_state(second)
    tensors, numbers = optimizer_entries(one, first)
    target, _ = optimizer_entries(two, second)
    assert tensors.keys() == target.keys(), "a fresh optimizer makes other state than a used one"
    with torch.no_grad():
        for name, tensor in tensors.items():
            target[name].copy_(tensor)
        for name, parameter in one.items():
            two[name].copy_(parameter)
    for key, value in numbers.items():
        what, _, owner = key.partition(".")
        second.state[two[owner]][what] = value
    _steps(first, list(one.values()), 2)
    _steps(second, list(two.values()), 2)
    for name in one:
        assert torch.equal(one[name], two[name]), f"{name} goes another way after state was copied"


CHECKS = (
    Check("takes_every_parameter_once", _takes_every_parameter_once),
    Check("groups_have_a_base_rate", _groups_have_a_base_rate),
    Check("meshes_stay_apart", _meshes_stay_apart),
    Check("goes_downhill", _goes_downhill),
    Check("a_rate_of_zero_moves_nothing", _a_rate_of_zero_moves_nothing),
    Check("a_parameter_without_gradient_stays", _a_parameter_without_gradient_stays),
    Check("state_goes_on_where_it_was", _state_goes_on_where_it_was),
)
