"""What a loss promises: a scaled sum that adds up over any split of the tokens, with right gradients.

K supervised positions, T tokens, D hidden, V vocabulary. In float64 throughout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pegboard.contracts import Head, LossOutput, Targets
from pegboard.testing.case import Case, Check
from pegboard.testing.rows import make_examples, make_row

__all__ = ["CHECKS", "OPTIONS"]

OPTIONS = frozenset[str]()

T, D, V = 12, 6, 11


def _inputs() -> tuple[Tensor, Tensor, Targets]:
    draw = torch.Generator().manual_seed(2)
    hidden_TD = torch.randn(T, D, generator=draw, dtype=torch.float64, requires_grad=True)
    weight_VD = torch.randn(V, D, generator=draw, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([0, 1, 2, 4, 5, 8, 9, 10])
    targets = Targets(
        positions,
        torch.randint(0, V, (len(positions),), generator=draw),
        torch.rand(len(positions), generator=draw) + 0.5,
        torch.zeros(len(positions), dtype=torch.int64),
        0.25,
    )
    return hidden_TD, weight_VD, targets


def _call(case: Case, hidden_TD: Tensor, weight_VD: Tensor, targets: Targets) -> LossOutput:
    head = Head(weight_VD, None, lambda rows: functional.linear(rows, weight_VD))
    output: Any = case.make().build()(hidden_TD, head, targets)
    return LossOutput(*output)


def _part(targets: Targets, which: slice | Tensor) -> Targets:
    positions, labels, weights, sources, scale = targets
    return Targets(positions[which], labels[which], weights[which], sources[which], scale)


def _says_loss_and_token_losses(case: Case) -> None:
    hidden, weight, targets = _inputs()
    out = _call(case, hidden, weight, targets)
    assert out.loss.shape == (), f"loss has shape {tuple(out.loss.shape)}"
    assert out.token_losses_K.shape == targets.positions_K.shape, "not one token loss per target"
    assert not out.token_losses_K.requires_grad, "token losses are not detached"
    assert torch.isfinite(out.token_losses_K).all(), "a token loss is not finite"


def _parts_add_up(case: Case) -> None:
    hidden, weight, targets = _inputs()
    whole = _call(case, hidden, weight, targets)
    parts = [_call(case, hidden, weight, _part(targets, s)) for s in (slice(0, 3), slice(3, None))]
    total = parts[0].loss + parts[1].loss
    assert torch.allclose(whole.loss, total, rtol=1e-9), (
        f"the loss of all targets is {whole.loss.item()}, of two parts together {total.item()}: "
        "it depends on how tokens fall into micro-batches"
    )
    joined = torch.cat([part.token_losses_K for part in parts])
    assert torch.allclose(whole.token_losses_K, joined, rtol=1e-9), (
        "token losses depend on the rest"
    )


def _parts_gradients_add_up(case: Case) -> None:
    gradients = []
    for splits in ([slice(None)], [slice(0, 3), slice(3, None)]):
        hidden, weight, targets = _inputs()
        for which in splits:
            _call(case, hidden, weight, _part(targets, which)).loss.backward()
        gradients.append((hidden.grad, weight.grad))
    for one, two, name in zip(*gradients, ("hidden", "weight"), strict=True):
        assert one is not None and two is not None, f"no gradient of {name}"
        assert torch.allclose(one, two, rtol=1e-8, atol=1e-12), f"gradients of {name} differ"


def _token_losses_are_unweighted(case: Case) -> None:
    hidden, weight, targets = _inputs()
    plain = targets._replace(weights_K=torch.ones_like(targets.weights_K), scale=1.0)
    found = _call(case, hidden, weight, targets).token_losses_K
    wanted = _call(case, hidden, weight, plain).token_losses_K
    assert torch.allclose(found, wanted, rtol=1e-9), (
        "token losses hold the weights or the scale: losses per source would be wrong"
    )


def _the_bias_counts(case: Case) -> None:
    hidden, weight, targets = _inputs()
    bias_V = torch.linspace(-1, 1, V, dtype=torch.float64)
    head = Head(weight, bias_V, lambda rows: functional.linear(rows, weight, bias_V))
    found = LossOutput(*case.make().build()(hidden, head, targets)).loss
    # The same head without a bias: one more number of each row, always 1.
    ones_T1 = torch.ones(T, 1, dtype=torch.float64)
    wider = torch.cat([hidden, ones_T1], dim=1), torch.cat([weight, bias_V[:, None]], dim=1)
    wanted = _call(case, *wider, targets).loss
    assert torch.allclose(found, wanted, rtol=1e-9), (
        f"the loss is {found.item()} for a head with a bias, expected {wanted.item()}"
    )


def _the_scale_is_a_factor(case: Case) -> None:
    hidden, weight, targets = _inputs()
    one = _call(case, hidden, weight, targets).loss
    two = _call(case, hidden, weight, targets._replace(scale=3 * targets.scale)).loss
    assert torch.allclose(two, 3 * one, rtol=1e-9), (
        "three times the scale is not three times the loss"
    )


def _weights_are_factors(case: Case) -> None:
    hidden, weight, targets = _inputs()
    weights = targets.weights_K.clone()
    weights[2] = 0
    without = _call(case, hidden, weight, targets._replace(weights_K=weights)).loss
    keep = torch.arange(len(weights)) != 2
    expected = _call(case, hidden, weight, _part(targets, keep)).loss
    assert torch.allclose(without, expected, rtol=1e-9), (
        "a target of weight 0 has a say in the loss"
    )


def _gradients_are_right(case: Case) -> None:
    # Not torch's gradcheck: it runs one graph backward many times, which a loss may refuse.
    hidden, weight, targets = _inputs()
    _call(case, hidden, weight, targets).loss.backward()
    step = 1e-6
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        assert tensor.grad is not None, f"no gradient of {name}"
        found, flat = tensor.grad.flatten(), tensor.detach().view(-1)
        for index in range(0, len(flat), 5):
            around = []
            for sign in (1, -1):
                flat[index] += sign * step
                with torch.no_grad():
                    around.append(_call(case, hidden, weight, targets).loss.item())
                flat[index] -= sign * step
            expected = (around[0] - around[1]) / (2 * step)
            assert abs(found[index].item() - expected) < 1e-6, (
                f"the gradient of {name}[{index}] is {found[index].item()}, by differences {expected}"
            )


def _no_targets_are_a_zero_with_a_graph(case: Case) -> None:
    hidden, weight, targets = _inputs()
    out = _call(case, hidden, weight, _part(targets, slice(0, 0)))
    assert out.loss.item() == 0, f"the loss of no target is {out.loss.item()}"
    out.loss.backward()
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        assert tensor.grad is not None, f"no gradient of {name}: other ranks would wait for it"
        assert not tensor.grad.any(), f"a gradient of {name} without a target"


def _counts_targets(case: Case) -> None:
    batch = make_row(make_examples((5, 3), vocab_size=V), 1.0)
    counts = case.make().build().step_counts(batch)
    assert "targets" in counts, f"step_counts has no `targets`: {sorted(counts)}"
    assert counts["targets"] == 6, f"6 targets of weight 1 are counted as {counts['targets']}"
    double = make_row(make_examples((5, 3), vocab_size=V), 1.0)
    double.targets.weights_K.mul_(2)
    found = case.make().build().step_counts(double)["targets"]
    assert found == 12, f"6 targets of weight 2 are counted as {found}"


CHECKS = (
    Check("says_loss_and_token_losses", _says_loss_and_token_losses),
    Check("parts_add_up", _parts_add_up),
    Check("parts_gradients_add_up", _parts_gradients_add_up),
    Check("token_losses_are_unweighted", _token_losses_are_unweighted),
    Check("the_bias_counts", _the_bias_counts),
    Check("the_scale_is_a_factor", _the_scale_is_a_factor),
    Check("weights_are_factors", _weights_are_factors),
    Check("gradients_are_right", _gradients_are_right),
    Check("no_targets_are_a_zero_with_a_graph", _no_targets_are_a_zero_with_a_graph),
    Check("counts_targets", _counts_targets),
)
