"""Claim: fresh weights depend on the seed and the module's name only.

That ranks change nothing either is in test_weight_loading.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from pegboard.errors import PluginError
from pegboard.initialization import init_module_weights


class Table(nn.Module):
    """Fills itself, a buffer included."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 4))
        self.bias: Tensor
        self.register_buffer("bias", torch.empty(3))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.uniform_(self.weight, 2.0, 3.0, generator=generator)
        self.bias.fill_(5.0)


class Net(nn.Module):
    initializer_range = 0.1

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(200, 200)
        self.second = nn.Linear(200, 200)
        self.norm = nn.LayerNorm(8)
        self.table = Table()


def fresh(seed: int = 0, module: nn.Module | None = None) -> dict[str, Tensor]:
    module = module or Net()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(float("nan"))
    init_module_weights(module, seed)
    return dict(module.named_parameters())


def test_the_same_seed_gives_the_same_weights_whatever_the_global_generator() -> None:
    torch.manual_seed(1)
    first = fresh()
    torch.manual_seed(2)
    second = fresh()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["first.weight"], fresh(seed=1)["first.weight"])


def test_modules_of_one_shape_differ_and_order_does_not_matter() -> None:
    weights = fresh()
    assert not torch.equal(weights["first.weight"], weights["second.weight"])
    alone = nn.ModuleDict({"second": nn.Linear(200, 200)})
    setattr(alone, "initializer_range", 0.1)  # noqa: B010
    assert torch.equal(fresh(module=alone)["second.weight"], weights["second.weight"])


def test_matrices_are_normal_in_the_models_range_norms_one_biases_zero() -> None:
    weights = fresh()
    assert weights["first.weight"].std().item() == pytest.approx(0.1, rel=0.02)
    assert weights["norm.weight"].eq(1).all() and weights["norm.bias"].eq(0).all()
    assert weights["first.bias"].eq(0).all()


def test_a_module_that_takes_a_generator_fills_itself() -> None:
    module = Net()
    table = fresh(module=module)["table.weight"]
    assert table.min() >= 2.0 and table.max() <= 3.0
    assert module.table.bias.eq(5.0).all()
    assert isinstance(module.table.weight, nn.Parameter) and module.table.weight.requires_grad


def test_a_buffer_that_nobody_fills_is_a_fault_of_the_model() -> None:
    module = nn.Module()
    module.register_buffer("inv_freq", torch.empty(3))
    with pytest.raises(PluginError, match="inv_freq"):
        init_module_weights(module, 0)


def test_a_lower_dtype_gets_the_same_draw_rounded() -> None:
    low = fresh(module=Net().bfloat16())["first.weight"]
    assert torch.equal(low, fresh()["first.weight"].bfloat16())


def test_activation_checkpointing_changes_no_weight() -> None:
    module = Net()
    module.register_module("first", checkpoint_wrapper(module.first))
    wrapped = fresh(module=module)["first._checkpoint_wrapped_module.weight"]
    assert torch.equal(wrapped, fresh()["first.weight"])


def test_a_skipped_module_is_left_alone_and_changes_no_other() -> None:
    module = Net()
    before = module.first.weight.detach().clone()
    init_module_weights(module, 0, skip={"first.weight", "first.bias"})
    assert torch.equal(module.first.weight, before)
    assert torch.equal(module.second.weight, fresh()["second.weight"])
