"""Losses with one fault each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from broken_parts import Broken, Sound
from torch.nn import functional

import pegboard
from pegboard import LossOutput

__all__ = ["BROKEN", "SOUND"]

Sum = Callable[[Any, Any], Any]
"""(token losses, targets) -> what is called backward on."""


def plain(nll: Any, targets: Any) -> Any:
    return (nll * targets.weights_K).sum() * targets.scale


class Entropy:
    """Cross-entropy, one step of it exchanged."""

    def __init__(self, total: Sum, told: Sum, counts: float, bias: bool) -> None:
        self.total, self.told, self.counts, self.bias = total, told, counts, bias

    def __call__(self, hidden: Any, head: Any, targets: Any) -> LossOutput:
        rows = hidden[targets.positions_K]
        logits = head.logits(rows) if self.bias else rows @ head.weight_VD.T
        nll = functional.cross_entropy(logits, targets.labels_K, reduction="none")
        return LossOutput(self.total(nll, targets), self.told(nll, targets))

    def step_counts(self, batch: Any) -> dict[str, float]:
        return {"targets": self.counts * float(batch.targets.weights_K.sum())}


def loss(
    total: Sum = plain,
    *,
    told: Sum = lambda nll, targets: nll.detach(),
    counts: float = 1.0,
    bias: bool = True,
) -> type[pegboard.LossComponent]:
    class Changed(pegboard.LossComponent):
        """Cross-entropy."""

        config: Any

        def build(self) -> Any:
            return Entropy(total, told, counts, bias)

    return Changed


def mean(nll: Any, targets: Any) -> Any:
    return plain(nll, targets) / max(1, len(nll))


def steeper_in_company(nll: Any, targets: Any) -> Any:
    """The right number, with a gradient that grows with the micro-batch."""
    value = plain(nll, targets)
    return value + (value - value.detach()) * len(nll)


SOUND = {"loss": Sound(loss())}
BROKEN = [
    Broken(
        "takes the mean of its micro-batch",
        "parts_add_up",
        loss(mean),
        also=frozenset({"parts_gradients_add_up", "weights_are_factors"}),
    ),
    Broken(
        "compares each token's loss with the micro-batch's",
        "parts_add_up",
        loss(told=lambda nll, targets: (nll - nll.sum()).detach()),
    ),
    Broken(
        "has a gradient that grows with the micro-batch",
        "parts_gradients_add_up",
        loss(steeper_in_company),
        also=frozenset({"gradients_are_right"}),
    ),
    Broken(
        "forgets the scale",
        "the_scale_is_a_factor",
        loss(lambda nll, targets: (nll * targets.weights_K).sum()),
    ),
    Broken(
        "forgets the weights",
        "weights_are_factors",
        loss(lambda nll, targets: nll.sum() * targets.scale),
    ),
    Broken(
        "has the gradient of another formula",
        "gradients_are_right",
        loss(lambda nll, targets: plain(nll, targets) + (nll - nll.detach()).sum()),
    ),
    Broken("counts every target twice", "counts_targets", loss(counts=2.0)),
    Broken(
        "weighs the losses it tells of",
        "token_losses_are_unweighted",
        loss(told=lambda nll, targets: (nll * targets.weights_K).detach()),
    ),
    Broken(
        "tells of losses with their graph",
        "says_loss_and_token_losses",
        loss(told=lambda nll, targets: nll),
    ),
    Broken("overlooks the head's bias", "the_bias_counts", loss(bias=False)),
    Broken(
        "gives a bare zero where nothing is to be predicted",
        "no_targets_are_a_zero_with_a_graph",
        loss(lambda nll, t: plain(nll, t) if len(nll) else torch.zeros((), dtype=nll.dtype)),
    ),
]
