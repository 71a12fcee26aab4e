"""Send each token to the rank that keeps its expert, and bring the results back.

Rank r of R keeps experts r*E/R to (r+1)*E/R. Counts are exchanged first; how many rows go where has to be known
on the host, which is the one host sync of a layer. Rows then travel in one all-to-all and are ordered by expert
on arrival. Backward makes the same journeys. A recompute (activation checkpointing) takes the counts of the
forward, so it neither syncs nor exchanges them again. No atomics anywhere: equal inputs give equal bits.

N rows to send, M rows received, D hidden, E experts, R ranks of the group, L = E / R experts kept here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["AllToAllDispatcher", "Journey", "journeys_kept"]


class Journey(NamedTuple):
    """Where the rows of one dispatch went; `combine` takes them back."""

    sent_R: list[int]
    """Rows sent to each rank."""
    received_R: list[int]
    """Rows received from each rank."""
    counts_L: Tensor
    """(L,) int64 rows that each expert kept here received."""
    order_M: Tensor | None
    """(M,) int64: row i by expert is row `order_M[i]` by arrival; None: the same order."""
    place_M: Tensor | None
    """(M,) int64, the inverse of `order_M`."""


class AllToAllDispatcher:
    """Token exchange of one layer's experts over the ranks of a group.

    Args:
        group: the ranks that share the experts; all of them make every call, in the same order.
        num_experts: E, divisible by the size of the group.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        size = group.size()
        if num_experts % size:
            raise ValueError(f"{num_experts} experts can't be shared by {size} ranks")
        self.group, self.num_ranks = group, size
        self.num_experts, self.num_local_experts = num_experts, num_experts // size
        self._keep: Callable[[Journey], None] | None = None
        self._replay: Callable[[], Journey] | None = None

    def dispatch(self, tokens_ND: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor, Journey]:
        """Rows for the experts kept here, from all ranks of the group. Collective.

        Args:
            tokens_ND: rows sorted by expert; differentiable.
            counts_E: (E,) integer rows of each expert, on the same device.

        Returns:
            (M, D) rows sorted by local expert, and by sender among those of one expert; (L,) int64
            rows of each; what `combine` needs.
        """
        journey = self._replay() if self._replay is not None else self._plan(counts_E)
        if self._keep is not None:
            self._keep(journey)
        arrived_MD = _exchange(tokens_ND, journey.received_R, journey.sent_R, self.group)
        rows_MD = _reorder(arrived_MD, journey.order_M, journey.place_M)
        return rows_MD, journey.counts_L, journey

    def combine(self, rows_MD: Tensor, journey: Journey) -> Tensor:
        """(M, D') rows in the order that `dispatch` gave -> (N, D') in the order it took. Collective."""
        arrived_MD = _reorder(rows_MD, journey.place_M, journey.order_M)
        return _exchange(arrived_MD, journey.sent_R, journey.received_R, self.group)

    def _plan(self, counts_E: Tensor) -> Journey:
        ranks, local = self.num_ranks, self.num_local_experts
        sent_RL = counts_E.to(torch.int64).contiguous().view(ranks, local)
        received_RL = torch.empty_like(sent_RL)
        dist.all_to_all_single(received_RL, sent_RL, group=self.group)
        # The one host sync.
        sent_R, received_R = torch.stack([sent_RL.sum(1), received_RL.sum(1)]).tolist()
        counts_L = received_RL.sum(0)
        if local == 1:
            return Journey(sent_R, received_R, counts_L, None, None)
        place_M = _places_by_expert(received_RL, sum(received_R))
        order_M = torch.empty_like(place_M)
        order_M[place_M] = torch.arange(len(place_M), device=place_M.device)
        return Journey(sent_R, received_R, counts_L, order_M, place_M)


def journeys_kept(
    module: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts for a forward of `module` and its recompute: the recompute's rows go the same ways.

    For `torch.utils.checkpoint.checkpoint(context_fn=...)`. Dispatchers are found in the `dispatcher`
    attributes of the modules inside.
    """
    dispatchers = [
        found
        for part in module.modules()
        if isinstance(found := getattr(part, "dispatcher", None), AllToAllDispatcher)
    ]
    kept: list[list[Journey]] = [[] for _ in dispatchers]

    @contextmanager
    def forward() -> Iterator[None]:
        for dispatcher, journeys in zip(dispatchers, kept, strict=True):
            dispatcher._keep = journeys.append
        try:
            yield
        finally:
            for dispatcher in dispatchers:
                dispatcher._keep = None

    @contextmanager
    def recompute() -> Iterator[None]:
        for dispatcher, journeys in zip(dispatchers, kept, strict=True):
            dispatcher._replay = iter(journeys).__next__
        try:
            yield
        finally:
            for dispatcher in dispatchers:
                dispatcher._replay = None

    return forward(), recompute()


def _places_by_expert(received_RL: Tensor, num_rows: int) -> Tensor:
    """(M,) where each row goes that arrived by sender, then expert, to lie by expert, then sender."""
    by_arrival = received_RL.flatten()
    begins_by_arrival = by_arrival.cumsum(0) - by_arrival
    by_expert = received_RL.t().flatten()
    begins_by_expert = (by_expert.cumsum(0) - by_expert).view(received_RL.t().shape).t().flatten()
    # NOTE: with output_size there is no host sync.
    shift_M = (begins_by_expert - begins_by_arrival).repeat_interleave(
        by_arrival, output_size=num_rows
    )
    return torch.arange(num_rows, device=received_RL.device) + shift_M


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        out = rows.new_empty((sum(received), *rows.shape[1:]))
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(gradients[0], ctx.sent, ctx.received, ctx.group), None, None, None


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # A gather too, where index_select's own backward adds with atomics.
        order, inverse = ctx.saved_tensors
        return _reorder(gradients[0], inverse, order), None, None


def _exchange(
    rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup
) -> Tensor:
    out: Tensor = _Exchange.apply(rows, received, sent, group)  # type: ignore[no-untyped-call]
    return out


def _reorder(rows: Tensor, order: Tensor | None, inverse: Tensor | None) -> Tensor:
    if order is None or inverse is None:
        return rows
    out: Tensor = _Reorder.apply(rows, order, inverse)  # type: ignore[no-untyped-call]
    return out
