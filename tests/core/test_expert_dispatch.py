"""Claim: in a group of one, tokens come to their experts and back unchanged, with their gradient; and nothing but
the counts is read on the host. What many ranks do is in test_expert_parallel.py."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from pegboard.device import local_device
from pegboard.expert_dispatch import AllToAllDispatcher, _places_by_expert
from pegboard.parallel import join_ranks, leave_ranks


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    ranks = join_ranks(local_device())
    yield ranks.mesh.get_group()
    leave_ranks()


@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0, 5], [0, 0, 0]])
def test_there_and_back_changes_nothing(group: dist.ProcessGroup, counts: list[int]) -> None:
    dispatcher = AllToAllDispatcher(group, 3)
    tokens_ND = torch.randn(sum(counts), 4, dtype=torch.float64, requires_grad=True)
    counts_E = torch.tensor(counts, dtype=torch.int32)
    rows_MD, counts_L, journey = dispatcher.dispatch(tokens_ND, counts_E)
    assert counts_L.tolist() == counts and torch.equal(rows_MD, tokens_ND)
    back_ND = dispatcher.combine(rows_MD * 2, journey)
    assert torch.equal(back_ND, tokens_ND * 2)
    weights_ND = torch.randn_like(back_ND)
    (gradient,) = torch.autograd.grad((back_ND * weights_ND).sum(), tokens_ND)
    assert torch.equal(gradient, weights_ND * 2)


def test_rows_of_an_expert_lie_together_in_the_order_of_senders() -> None:
    received_RL = torch.tensor([[2, 0, 1], [1, 3, 0], [0, 1, 2]])
    arrived = [
        (expert, sender, row)
        for sender, per_expert in enumerate(received_RL.tolist())
        for expert, number in enumerate(per_expert)
        for row in range(number)
    ]
    places = _places_by_expert(received_RL, len(arrived)).tolist()
    ordered = [arrived[places.index(place)] for place in range(len(arrived))]
    assert ordered == sorted(arrived)


def test_experts_that_do_not_divide_are_refused() -> None:
    class TwoRanks:
        def size(self) -> int:
            return 2

    with pytest.raises(ValueError, match="3 experts can't be shared by 2 ranks"):
        AllToAllDispatcher(TwoRanks(), 3)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_layer_waits_for_the_gpu_once(group: dist.ProcessGroup) -> None:
    device = local_device()
    dispatcher = AllToAllDispatcher(group, 4)
    tokens_ND = torch.randn(8, 16, device=device, requires_grad=True)
    counts_E = torch.tensor([1, 3, 0, 4], device=device)
    dispatcher.dispatch(tokens_ND, counts_E)  # the communicator starts with the first call
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rows_MD, _, journey = dispatcher.dispatch(tokens_ND, counts_E)
            dispatcher.combine(rows_MD, journey).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(one.message) for one in caught if "synchroniz" in str(one.message)]
    assert len(waits) == 1, waits
