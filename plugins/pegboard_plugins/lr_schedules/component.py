"""Learning rate by step: a linear warm-up, then cosine, linear or no decay.

Step k of a warm-up of w steps has base * k / w, so the first step is never wasted on zero; the
last step of a decay has exactly `min_lr`. Without a warm-up the first step has the base rate.
Source: cosine annealing of Loshchilov and Hutter, SGDR, 2017 (arXiv:1608.03983), equation 5, one
period.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from pegboard import ComponentConfig, ConfigError, LRScheduleComponent, Problem

if TYPE_CHECKING:
    from pegboard.contracts import LRSchedule
    from pegboard.run_config import RunConfig

__all__ = ["ConstantSchedule", "CosineSchedule", "LinearSchedule"]


class _WarmupConfig(ComponentConfig):
    warmup_ratio: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Warm-up as a part of all steps, rounded; null is 0.03 without warmup_steps.",
    )
    warmup_steps: int | None = Field(
        default=None, ge=0, description="Warm-up in steps, in place of warmup_ratio."
    )

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise ValueError(
                "both warmup_ratio and warmup_steps are set; expected one; take one away"
            )
        return self

    def warmup(self, total_steps: int) -> int:
        """Warm-up steps of a run of `total_steps`."""
        if self.warmup_steps is None:
            ratio = 0.03 if self.warmup_ratio is None else self.warmup_ratio
            return round(ratio * total_steps)
        if self.warmup_steps > total_steps:
            raise ConfigError(f"lr_schedule.warmup_steps: {self.too_long(total_steps)}")
        return self.warmup_steps

    def too_long(self, total_steps: int) -> str:
        """What is wrong with more warm-up steps than the run has."""
        return (
            f"{self.warmup_steps} is more than the run's {total_steps} steps; expected at most "
            "that; shorten it or use warmup_ratio"
        )


class _DecayConfig(_WarmupConfig):
    min_lr: float = Field(
        default=0.0,
        ge=0,
        description="Learning rate of the last step, absolute; a parameter group with a smaller "
        "rate keeps its own.",
    )


class CosineSchedule(LRScheduleComponent):
    """Warm-up, then half a cosine down to `min_lr`."""

    known_as = ("cosine", "cosine_with_min_lr", "CosineAnnealingLR")

    class Config(_DecayConfig):
        """Warm-up and the rate at the end."""

    config: Config

    def check(self, run: RunConfig, path: tuple[str | int, ...]) -> Iterable[Problem]:
        """The warm-up fits the run, where its length is known."""
        return _check_warmup(self.config, run, path)

    def build(self, total_steps: int) -> LRSchedule:
        """(step from 1 to `total_steps`, base lr) -> lr; ConfigError for too long a warm-up."""
        return _with_decay(
            self.config, total_steps, lambda part: 0.5 * (1.0 + math.cos(math.pi * part))
        )


class LinearSchedule(LRScheduleComponent):
    """Warm-up, then a straight line down to `min_lr`."""

    known_as = ("linear", "linear_with_warmup")

    class Config(_DecayConfig):
        """Warm-up and the rate at the end."""

    config: Config

    def check(self, run: RunConfig, path: tuple[str | int, ...]) -> Iterable[Problem]:
        """The warm-up fits the run, where its length is known."""
        return _check_warmup(self.config, run, path)

    def build(self, total_steps: int) -> LRSchedule:
        """(step from 1 to `total_steps`, base lr) -> lr; ConfigError for too long a warm-up."""
        return _with_decay(self.config, total_steps, lambda part: 1.0 - part)


class ConstantSchedule(LRScheduleComponent):
    """Warm-up, then the base learning rate."""

    known_as = ("constant", "constant_with_warmup")

    class Config(_WarmupConfig):
        """Warm-up."""

    config: Config

    def check(self, run: RunConfig, path: tuple[str | int, ...]) -> Iterable[Problem]:
        """The warm-up fits the run, where its length is known."""
        return _check_warmup(self.config, run, path)

    def build(self, total_steps: int) -> LRSchedule:
        """(step from 1 to `total_steps`, base lr) -> lr; ConfigError for too long a warm-up."""
        warmup = max(1, self.config.warmup(total_steps))
        return lambda step, base_lr: base_lr * min(1.0, step / warmup)


def _check_warmup(
    config: _WarmupConfig, run: RunConfig, path: tuple[str | int, ...]
) -> Iterable[Problem]:
    steps, total = config.warmup_steps, run.total_steps
    if steps is not None and total is not None and steps > total:
        yield Problem((*path, "warmup_steps"), config.too_long(total))


def _with_decay(
    config: _DecayConfig, total_steps: int, shape: Callable[[float], float]
) -> LRSchedule:
    """`shape` goes from 1 at part 0 to 0 at part 1 of the steps after the warm-up."""
    warmup = max(1, config.warmup(total_steps))

    def lr(step: int, base_lr: float) -> float:
        if step <= warmup:
            return base_lr * step / warmup
        end = min(config.min_lr, base_lr)
        return end + (base_lr - end) * shape(min(1.0, (step - warmup) / (total_steps - warmup)))

    return lr
