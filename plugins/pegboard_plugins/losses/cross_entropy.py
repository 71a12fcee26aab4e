"""Cross-entropy over the supervised positions: the reference that every other loss is held to.

Rows that predict a label are selected, the head makes their logits in the compute dtype, softmax
runs in fp32 (fp64 stays fp64), and the result is `scale * sum(weight * nll)`. With no label at
all the result is zero and still reaches hidden states and head, so that every rank's backward
runs the same collectives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from pegboard.contracts import LossOutput

if TYPE_CHECKING:
    from torch import Tensor

    from pegboard.contracts import Batch, Head, Targets

__all__ = ["CrossEntropyLoss", "weight_count"]


class CrossEntropyLoss:
    """Holds the logits of all K supervised positions: 4 V K bytes and more."""

    def __call__(self, hidden_TD: Tensor, head: Head, targets: Targets) -> LossOutput:
        """Scaled weighted sum of -log p(label).

        Returns:
            `loss` () and `token_losses_K` (K,), both in promote_types(hidden dtype, float32).
        """
        logits_KV = head.logits(hidden_TD.index_select(0, targets.positions_K))
        logits_KV = logits_KV.to(torch.promote_types(logits_KV.dtype, torch.float32))
        nll_K = F.cross_entropy(logits_KV, targets.labels_K, reduction="none")
        loss = (nll_K * targets.weights_K.to(nll_K.dtype)).sum() * targets.scale
        return LossOutput(loss, nll_K.detach())

    def step_counts(self, batch: Batch) -> Mapping[str, float]:
        """`{"targets": sum of weights}` of one micro-batch, from CPU tensors."""
        return {"targets": weight_count(batch.targets)}


def weight_count(targets: Targets) -> float:
    """Sum of the target weights, in double: no matter how tokens fall into micro-batches."""
    return float(targets.weights_K.sum(dtype=torch.float64))
