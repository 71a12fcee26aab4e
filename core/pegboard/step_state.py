"""What parts of a model carry through an optimizer step: driven here, defined by the model.

Modules that keep `pegboard.contracts.StepState` are told when a step begins and ends. One that has
to know the whole step before its first gradient gets a forward pass of all micro-batches for it,
without gradients and without targets, so that the head costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pegboard.contracts import Batch, StepReport, StepState

if TYPE_CHECKING:
    from pegboard.parallel import Ranks

__all__ = ["StepStates"]


class StepStates:
    """All step states of one model.

    Args:
        module: the whole model.
    """

    def __init__(self, module: nn.Module, ranks: Ranks) -> None:
        self.states = [part for part in module.modules() if isinstance(part, StepState)]
        self._world_size = ranks.world_size

    def begin_step(self, batches: Sequence[Batch], forward: Callable[[Batch], object]) -> None:
        """Run the first pass if a state wants one. Collective.

        Args:
            batches: this rank's micro-batches.
            forward: runs the model on one of them.
        """
        # Not any(generator): every state is to be asked.
        wanting = [s for s in self.states if s.wants_first_pass(len(batches))]
        if not wanting:
            return
        with torch.no_grad():
            for batch in batches:
                forward(_without_targets(batch))
        for state in wanting:
            state.end_first_pass(self._sum)

    def end_step(self) -> None:
        """The optimizer has made its step; not for one that is skipped. Collective."""
        for state in self.states:
            state.end_step(self._sum)

    def report(self) -> StepReport:
        """All states' reports in one; the same on every rank."""
        reports = [state.report() for state in self.states]
        return StepReport(
            {name: value for report in reports for name, value in report.numbers.items()},
            {name: table for report in reports for name, table in report.tables.items()},
        )

    def _sum(self, tensor: Tensor) -> None:
        if self._world_size > 1:
            dist.all_reduce(tensor)


def _without_targets(batch: Batch) -> Batch:
    targets = batch.targets
    return replace(
        batch,
        targets=targets._replace(
            positions_K=targets.positions_K[:0],
            labels_K=targets.labels_K[:0],
            weights_K=targets.weights_K[:0],
            source_ids_K=targets.source_ids_K[:0],
        ),
    )
