"""Mean loss over held-out data, as a whole and per source.

Every rank runs its packs of the one epoch there is; sums are reduced once at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pegboard.reporting import SourceSums

if TYPE_CHECKING:
    from pegboard.assemble import ModelOnRanks
    from pegboard.contracts import Batch
    from pegboard.data_loading import RunData
    from pegboard.parallel import Ranks

__all__ = ["Evaluator"]


class Evaluator:
    """Evaluates one model on one set of data.

    Args:
        model: shared with training; left in evaluation mode.
        data: held-out data of this rank.
        names: of its sources, in the order of their ids.
    """

    def __init__(
        self, model: ModelOnRanks, ranks: Ranks, data: RunData, names: Sequence[str]
    ) -> None:
        self.model, self.ranks, self.data, self.names = model, ranks, data, list(names)

    def evaluate(self) -> dict[str, float]:
        """`eval_loss` and `eval_loss/<source>`. Collective."""
        module, loss = self.model.module, self.model.loss
        module.eval()
        sums = SourceSums(len(self.names), self.ranks.device)
        with torch.no_grad():
            for step in range(self.data.steps_per_epoch(0)):
                for batch in self.data.micro_batches(0, step):
                    scales = {name: 1.0 for name in self._unscaled_names(batch)}
                    on_device = batch.to(self.ranks.device).with_scales(scales)
                    sums.add(on_device, module(on_device, loss))
        _, source_losses, _ = sums.reduce(self.names, self.ranks)
        return {
            "eval_loss": sums.mean_loss,
            **{f"eval_loss/{name}": value for name, value in source_losses.items()},
        }

    def _unscaled_names(self, batch: Batch) -> set[str]:
        names = {"tokens", "samples", *self.model.loss.step_counts(batch)}
        if self.model.built.step_counts:
            names |= set(self.model.built.step_counts(batch))
        return names
