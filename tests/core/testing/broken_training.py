"""Collators, packers, optimizers and schedules with one fault each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from broken_parts import Broken, Sound
from pydantic import Field

import pegboard
from pegboard import Batch, Example, PackPlan

__all__ = ["BROKEN", "SOUND"]

Examples = Sequence[Example]
Plan = Callable[[np.ndarray, int, int], PackPlan]
Rate = Callable[[int, int, float], float]


class Flat:
    """The built-in collator, what goes in or comes out exchanged."""

    def __init__(self, pad: int) -> None:
        from pegboard_plugins.collators.text import TextCollator

        self.inner = TextCollator(pad_token_id=pad)

    def __call__(self, examples: Examples) -> Batch:
        return self.inner(examples)


class PadCounting(Flat):
    def __call__(self, examples: Examples) -> Batch:
        batch = super().__call__(examples)
        return replace(batch, num_tokens=batch.num_tokens + 1) if examples else batch


class OneLine(Flat):
    def __call__(self, examples: Examples) -> Batch:
        batch = super().__call__(examples)
        return replace(batch, position_ids_T=torch.arange(len(batch.input_ids_T)))


class FirstLost(Flat):
    def __call__(self, examples: Examples) -> Batch:
        batch = super().__call__(examples)
        positions, labels, weights, sources, scale = batch.targets
        left = pegboard.Targets(positions[1:], labels[1:], weights[1:], sources[1:], scale)
        return replace(batch, targets=left)


class CutLost(Flat):
    def __call__(self, examples: Examples) -> Batch:
        return super().__call__([replace(example, next_id=None) for example in examples])


class Erasing(Flat):
    def __call__(self, examples: Examples) -> Batch:
        batch = super().__call__(examples)
        for example in examples:
            example.loss_mask[:] = False
        return batch


class FillerCounted(Flat):
    def __call__(self, examples: Examples) -> Batch:
        batch = super().__call__(examples)
        return batch if examples else replace(batch, num_tokens=1)


class ClosedFlat(Flat):
    def __init__(self, pad: int) -> None:
        super().__init__(pad)
        self.open = lambda: 1


def collator(cls: type[Flat]) -> type[pegboard.CollatorComponent]:
    class Flattened(pegboard.CollatorComponent):
        """One flat row."""

        config: Any

        def build(self, *, pad_token_id: int) -> Any:
            return cls(pad_token_id)

    return Flattened


def packer(plan: Plan, *, cuts: bool = False) -> type[pegboard.PackerComponent]:
    class Planned(pegboard.PackerComponent):
        """A plan."""

        cuts_samples = cuts
        config: Any

        def build(self) -> Any:
            class Built:
                def plan(self, lengths: np.ndarray, limit: int, seed: int) -> PackPlan:
                    return plan(lengths, limit, seed)

            return Built()

    return Planned


def alone(samples: np.ndarray) -> PackPlan:
    return PackPlan(np.arange(len(samples) + 1), samples)


def shuffled(lengths: np.ndarray, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(len(lengths))


def with_a_repeat(lengths: np.ndarray, limit: int, seed: int) -> PackPlan:
    order = shuffled(lengths, seed)
    if len(order) > 5:
        order[1] = order[0]
    return alone(order)


def with_an_empty_pack(lengths: np.ndarray, limit: int, seed: int) -> PackPlan:
    return PackPlan(np.array([0, *range(len(lengths) + 1)]), shuffled(lengths, seed))


def with_a_token_lost(lengths: np.ndarray, limit: int, seed: int) -> PackPlan:
    from pegboard_plugins.packers.in_order import Cut

    plan = Cut().plan(lengths, limit, seed)
    assert plan.stops is not None
    stops = plan.stops.copy()
    if len(lengths) > 5:
        stops[0] -= 1
    return plan._replace(stops=stops)


def schedule(rate: Rate) -> type[pegboard.LRScheduleComponent]:
    class Rated(pegboard.LRScheduleComponent):
        """A rate by step."""

        config: Any

        def build(self, total_steps: int) -> Any:
            return lambda step, base: rate(step, total_steps, base)

    return Rated


def falling(step: int, total: int, base: float) -> float:
    return base * (1 - (step - 1) / total)


class Tiring(pegboard.LRScheduleComponent):
    """A schedule whose rate is lower when a step is asked for again."""

    config: Any

    def build(self, total_steps: int) -> Any:
        asked: set[int] = set()

        def rate(step: int, base: float) -> float:
            again = step in asked
            asked.add(step)
            return base * (0.999 if again else 1.0)

        return rate


class Momentum(torch.optim.SGD):
    """What is built of the sound optimizer, and where faults are put."""


class Restless(Momentum):
    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter += 1e-3
        return super().step(closure)


class Decaying(Momentum):
    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter *= 1 - 0.1 * group["lr"]
        return super().step(closure)


class Warming(Momentum):
    """Counts its steps where nobody saves them."""

    def step(self, closure: Any = None) -> Any:
        self.taken = getattr(self, "taken", 0) + 1
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] *= min(1.0, self.taken / 5)
        super().step(closure)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate


def optimizer(
    cls: type[Momentum] = Momentum,
    *,
    base_lr: bool = True,
    joined: bool = False,
    skipped: int = 0,
    maximize: bool = False,
) -> type[pegboard.OptimizerComponent]:
    class Descent(pegboard.OptimizerComponent):
        """Gradient descent with momentum."""

        class Config(pegboard.ComponentConfig):
            lr: float = Field(default=1e-2, gt=0, description="Base rate.")

        config: Config

        def build(self, groups: Any) -> torch.optim.Optimizer:
            held = [[p for _, p in group.named_parameters][skipped:] for group in groups]
            if joined:
                held = [[parameter for group in held for parameter in group]]
            rate = {"lr": self.config.lr, **({"base_lr": self.config.lr} if base_lr else {})}
            split = [{"params": parameters, **rate} for parameters in held]
            return cls(split, lr=self.config.lr, momentum=0.9, maximize=maximize)

    return Descent


SOUND = {
    "collator": Sound(collator(Flat)),
    "packer": Sound(packer(lambda lengths, limit, seed: alone(shuffled(lengths, seed)))),
    "optimizer": Sound(optimizer()),
    "lr_schedule": Sound(schedule(falling)),
}
BROKEN = [
    Broken("counts a token too many", "the_row_holds_every_sample", collator(PadCounting)),
    Broken(
        "counts positions through the row", "positions_restart_with_each_sample", collator(OneLine)
    ),
    Broken("loses the first target", "labels_are_shifted_inside_each_sample", collator(FirstLost)),
    Broken(
        "loses the target behind a cut", "a_cut_sample_keeps_its_last_target", collator(CutLost)
    ),
    Broken(
        "erases the masks it was given",
        "examples_are_left_alone",
        collator(Erasing),
        also=frozenset({"labels_are_shifted_inside_each_sample"}),
    ),
    Broken("counts the token of a filler", "an_empty_pack_is_a_filler", collator(FillerCounted)),
    Broken("holds what does not pickle", "pickles", collator(ClosedFlat)),
    Broken(
        "leaves a sample out",
        "every_sample_once",
        packer(lambda lengths, limit, seed: alone(shuffled(lengths, seed)[len(lengths) > 5 :])),
    ),
    Broken("gives a sample twice", "every_sample_once", packer(with_a_repeat)),
    Broken("makes an empty pack", "offsets_cut_the_samples", packer(with_an_empty_pack)),
    Broken(
        "ignores the seed",
        "the_seed_alone_decides",
        packer(lambda lengths, limit, seed: alone(np.arange(len(lengths)))),
    ),
    Broken(
        "draws from the process's random numbers",
        "the_seed_alone_decides",
        packer(lambda lengths, limit, seed: alone(np.random.permutation(len(lengths)))),
    ),
    Broken(
        "puts everything into one pack",
        "no_pack_is_too_long",
        packer(lambda n, limit, seed: PackPlan(np.array([0, len(n)]), shuffled(n, seed))),
    ),
    Broken(
        "needs two samples",
        "few_samples_are_planned_too",
        packer(lambda n, limit, seed: alone(shuffled(n, seed) if len(n) > 1 else n[:0])),
    ),
    Broken(
        "loses a token where it cuts",
        "cut_samples_overlap_nowhere",
        packer(with_a_token_lost, cuts=True),
    ),
    Broken("holds not every parameter", "takes_every_parameter_once", optimizer(skipped=1)),
    Broken("says no base rate", "groups_have_a_base_rate", optimizer(base_lr=False)),
    Broken("joins the groups of two meshes", "meshes_stay_apart", optimizer(joined=True)),
    Broken("climbs", "goes_downhill", optimizer(maximize=True)),
    Broken("moves at a rate of zero", "a_rate_of_zero_moves_nothing", optimizer(Restless)),
    Broken(
        "decays what has no gradient", "a_parameter_without_gradient_stays", optimizer(Decaying)
    ),
    Broken("counts its steps outside its state", "state_goes_on_where_it_was", optimizer(Warming)),
    Broken(
        "begins at zero",
        "the_first_step_moves",
        schedule(lambda step, total, base: base * (step - 1) / total),
    ),
    Broken(
        "goes over the base rate",
        "no_rate_is_over_the_base",
        schedule(lambda step, total, base: 2 * base),
    ),
    Broken(
        "ends below zero",
        "every_step_has_a_rate",
        schedule(lambda step, total, base: -1e-9 if step == total > 1 else base),
    ),
    Broken(
        "knows a rate of its own",
        "another_base_never_lowers_a_rate",
        schedule(lambda step, total, base: 1e-3),
    ),
    Broken("remembers what was asked", "a_step_has_one_rate", Tiring),
]
