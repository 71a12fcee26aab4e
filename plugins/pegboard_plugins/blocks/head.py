"""The output projection, which calls the loss itself.

Reading the weight from outside breaks once the head is sharded as its own unit, so the loss goes to the
weight: `forward` hands it a `Head`. A tied head owns no parameter (`to_empty()` would silently untie a
shared one): the embedding's weight is an argument.

T tokens, C rows of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pegboard.contracts import Head, Loss, LossOutput, Targets
from pegboard.errors import PluginError

__all__ = ["LMHead"]


class LMHead(nn.Module):
    """Hidden states to logits, chunk by chunk, as the loss asks.

    Args:
        hidden_size: D.
        vocab_size: V.
        tied: own no weight; `forward` is given the embedding's.
    """

    holds_vocabulary = True
    """The first dim of its weight is the vocabulary: may grow when weights are loaded."""

    def __init__(self, hidden_size: int, vocab_size: int, *, tied: bool) -> None:
        super().__init__()
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        self.weight: nn.Parameter | None
        if tied:
            self.register_parameter("weight", None)
        else:
            self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(
        self, hidden_TD: Tensor, targets: Targets, loss: Loss, tied_weight_VD: Tensor | None = None
    ) -> LossOutput:
        """Loss of the (already normed) hidden states; computes no logits by itself.

        Raises:
            PluginError: the loss returned something else than a `LossOutput`, such as its value alone.
        """
        weight_VD = self._weight(tied_weight_VD)

        def logits(hidden_CD: Tensor) -> Tensor:
            return functional.linear(hidden_CD, weight_VD)

        out = loss(hidden_TD, Head(weight_VD, None, logits), targets)
        if not isinstance(out, LossOutput):
            raise PluginError(
                f"loss '{type(loss).__name__}' returned an object of type {type(out).__name__}; "
                "return pegboard.LossOutput(scaled sum, detached loss of each target)"
            )
        return out

    def logits(self, hidden_TD: Tensor, tied_weight_VD: Tensor | None = None) -> Tensor:
        """(T, V) logits of an unsharded head."""
        return functional.linear(hidden_TD, self._weight(tied_weight_VD))

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, {self.vocab_size}, tied={self.weight is None}"

    def _weight(self, tied_weight_VD: Tensor | None) -> Tensor:
        weight = self.weight if self.weight is not None else tied_weight_VD
        if weight is None:
            raise ValueError("a tied head needs the embedding's weight as an argument")
        return weight
