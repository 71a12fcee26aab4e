"""Claim: a module that keeps the StepState protocol is found at any depth, gets a first pass without
gradients or targets when it wants one, and is told of the end of every step."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from pegboard.contracts import Batch, StepReport, StepState, Table, Targets
from pegboard.step_state import StepStates


class Counter(nn.Module):
    """Counts tokens; wants to know the step's before the step."""

    def __init__(self, name: str, wants: bool) -> None:
        super().__init__()
        self.name, self.wants, self.seen = name, wants, torch.zeros(())
        self.events: list[Any] = []

    def forward(self, batch: Batch) -> None:
        self.seen += batch.num_tokens

    def wants_first_pass(self, num_micro_batches: int) -> bool:
        self.events.append(("begin", num_micro_batches))
        return self.wants

    def end_first_pass(self, sum_over_ranks: Callable[[Tensor], None]) -> None:
        sum_over_ranks(self.seen)
        self.events.append(("first pass", float(self.seen)))
        self.seen.zero_()

    def end_step(self, sum_over_ranks: Callable[[Tensor], None]) -> None:
        self.events.append(("end", float(self.seen)))

    def report(self) -> StepReport:
        return StepReport(
            {f"seen/{self.name}": float(self.seen)}, {self.name: Table(("a",), [[1.0]])}
        )


def batch(tokens: int) -> Batch:
    ids = torch.zeros(tokens, dtype=torch.long)
    targets = Targets(ids, ids, torch.ones(tokens), ids, 1.0)
    return Batch(
        input_ids_T=ids,
        position_ids_T=ids,
        cu_seqlens=torch.tensor([0, tokens]).int(),
        max_seqlen=tokens,
        targets=targets,
        num_tokens=tokens,
    )


ONE_RANK: Any = SimpleNamespace(world_size=1)


def test_states_are_found_asked_and_given_a_pass_without_gradients_or_targets() -> None:
    eager, lazy = Counter("eager", True), Counter("lazy", False)
    assert isinstance(eager, StepState)
    model = nn.ModuleDict({"tower": nn.Linear(1, 1), "text": nn.Sequential(eager, lazy)})
    states = StepStates(model, ONE_RANK)
    assert list(map(id, states.states)) == [id(eager), id(lazy)]
    passes = []

    def forward(one: Batch) -> None:
        passes.append((torch.is_grad_enabled(), len(one.targets.labels_K), one.num_tokens))
        eager(one)

    states.begin_step([batch(3), batch(4)], forward)
    assert passes == [(False, 0, 3), (False, 0, 4)]
    assert eager.events == [("begin", 2), ("first pass", 7.0)]
    assert lazy.events == [("begin", 2)]
    states.end_step()
    assert lazy.events[-1] == ("end", 0.0)
    numbers, tables = states.report()
    assert numbers == {"seen/eager": 0.0, "seen/lazy": 0.0}
    assert set(tables) == {"eager", "lazy"}


def test_without_a_state_that_wants_it_there_is_no_first_pass() -> None:
    states = StepStates(nn.Sequential(Counter("lazy", False)), ONE_RANK)

    def forward(one: Batch) -> None:
        raise AssertionError("not to be called")

    states.begin_step([batch(3)], forward)
    plain = StepStates(nn.Linear(1, 1), ONE_RANK)
    plain.begin_step([batch(3)], forward)
    plain.end_step()
    assert plain.report() == ({}, {})
