"""The state of an optimizer as named tensors and numbers.

A state entry is named `key.parameter`, such as `exp_avg.layers.0.up.weight`: it does not depend on
the order or the grouping of parameters. Only the optimizer knows how it keeps its state, so a
fresh one makes it by itself, and what was saved is copied in.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor

from pegboard.errors import CheckpointError

__all__ = ["create_state", "drop_unsaved_state", "optimizer_entries", "set_numbers"]


def optimizer_entries(
    model_tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON-able values of the state, by `key.parameter`, such as `exp_avg.a.weight`."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for name, parameter in _named_parameters_of(model_tensors, optimizer):
        # .get: state is a defaultdict, and asking must not make an entry.
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{key}.{name}"] = value
            elif value is None or isinstance(value, (bool, int, float, str)):
                numbers[f"{key}.{name}"] = value
            else:
                raise CheckpointError(
                    f"optimizer state {key!r} of {name} is {type(value).__name__}, expected a "
                    "tensor or a number"
                )
    return tensors, numbers


def create_state(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer make its own state by a step that moves nothing.

    Only the optimizer knows on which device and in which layout it keeps a tensor. The parameters
    are overwritten afterwards anyway.
    """
    if optimizer.state:
        return
    parameters = [p for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
    gradients = [p.grad for p in parameters]
    rates = [group.get("lr") for group in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if rate is not None:
            group["lr"] = torch.zeros_like(rate) if isinstance(rate, Tensor) else 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if rate is not None:
            group["lr"] = rate
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def drop_unsaved_state(
    model_tensors: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    saved: Set[str],
) -> None:
    """Forget the state of parameters that had none yet (no gradient so far) when it was saved.

    Args:
        saved: `key.parameter` of all that was saved.
    """
    for name, parameter in _named_parameters_of(model_tensors, optimizer):
        keys = optimizer.state.get(parameter, {})
        if keys and not any(f"{key}.{name}" in saved for key in keys):
            del optimizer.state[parameter]


def set_numbers(
    model_tensors: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    saved: Mapping[str, Any],
) -> None:
    """Put the values that are not tensors back in place, by `key.parameter`."""
    for name, parameter in _named_parameters_of(model_tensors, optimizer):
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if not isinstance(value, Tensor):
                state[key] = saved[f"{key}.{name}"]


def _named_parameters_of(
    model_tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> list[tuple[str, Tensor]]:
    names = {id(tensor): name for name, tensor in model_tensors.items()}
    found = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise CheckpointError(
                    f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is "
                    "not in the module; build it after the module is sharded"
                )
            found.append((names[id(parameter)], parameter))
    return found
