"""Claim: rates rise by base/w a step, never start at zero, end on exactly the rate asked for."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from pegboard import ConfigError
from pegboard_plugins.lr_schedules.component import ConstantSchedule, CosineSchedule, LinearSchedule

ALL = [ConstantSchedule, CosineSchedule, LinearSchedule]
DECAYS = [CosineSchedule, LinearSchedule]


def rates(cls: Any, total: int, base: float = 1.0, **fields: Any) -> list[float]:
    schedule = cls(cls.Config(**fields)).build(total)
    return [schedule(step, base) for step in range(1, total + 1)]


@pytest.mark.parametrize("cls", ALL)
def test_warm_up_step_k_of_w_has_k_wths_of_the_base_rate(cls: Any) -> None:
    assert rates(cls, 20, base=2.0, warmup_steps=4)[:4] == [0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize("cls", ALL)
def test_ratio_and_steps_say_the_same_warm_up(cls: Any) -> None:
    assert rates(cls, 30, warmup_ratio=0.1) == rates(cls, 30, warmup_steps=3)


@pytest.mark.parametrize("cls", ALL)
def test_the_default_warm_up_is_three_percent(cls: Any) -> None:
    assert rates(cls, 100) == rates(cls, 100, warmup_steps=3)


@pytest.mark.parametrize("total", [1, 2, 3, 10])
@pytest.mark.parametrize("cls", ALL)
def test_without_a_warm_up_the_first_step_has_the_base_rate(cls: Any, total: int) -> None:
    assert rates(cls, total, base=3e-4, warmup_ratio=0.0)[0] == 3e-4


@pytest.mark.parametrize("fields", [{"warmup_ratio": 0.0}, {"warmup_steps": 4}, {}])
@pytest.mark.parametrize("min_lr", [0.0, 1e-7])
@pytest.mark.parametrize("cls", DECAYS)
def test_the_last_step_has_exactly_the_least_rate(
    cls: Any, min_lr: float, fields: dict[str, Any]
) -> None:
    assert rates(cls, 17, base=1e-5, min_lr=min_lr, **fields)[-1] == min_lr


@pytest.mark.parametrize("cls", DECAYS)
def test_a_decay_falls_at_every_step(cls: Any) -> None:
    values = rates(cls, 50, warmup_steps=5, min_lr=0.01)[4:]
    assert all(earlier > later for earlier, later in itertools.pairwise(values))


def test_cosine_and_linear_follow_their_formulas() -> None:
    parts = [(step - 2) / 8 for step in range(2, 11)]
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * part)) / 2 for part in parts]
    linear = [1.0 - 0.9 * part for part in parts]
    assert rates(CosineSchedule, 10, warmup_steps=2, min_lr=0.1)[1:] == pytest.approx(cosine)
    assert rates(LinearSchedule, 10, warmup_steps=2, min_lr=0.1)[1:] == pytest.approx(linear)


def test_constant_stays_at_the_base_rate_after_the_warm_up() -> None:
    assert rates(ConstantSchedule, 8, warmup_steps=2) == [0.5] + [1.0] * 7


@pytest.mark.parametrize("cls", DECAYS)
def test_a_group_with_a_smaller_rate_never_rises_to_the_least_rate(cls: Any) -> None:
    assert rates(cls, 5, base=1e-7, warmup_ratio=0.0, min_lr=1e-6) == [1e-7] * 5


@pytest.mark.parametrize("cls", ALL)
def test_a_warm_up_may_fill_the_run_but_not_outlast_it(cls: Any) -> None:
    assert rates(cls, 4, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0]
    with pytest.raises(ConfigError, match=r"warmup_steps: 5 is more than the run's 4 steps"):
        rates(cls, 4, warmup_steps=5)


@pytest.mark.parametrize("cls", ALL)
def test_a_warm_up_that_outlasts_the_run_is_found_before_the_run(cls: Any) -> None:
    path = ("lr_schedule",)
    (problem,) = cls(cls.Config(warmup_steps=5)).check(SimpleNamespace(total_steps=4), path)
    assert problem.path == ("lr_schedule", "warmup_steps")
    assert "5 is more than the run's 4 steps" in problem.message
    for fields, total in (({"warmup_steps": 4}, 4), ({"warmup_steps": 5}, None), ({}, 1)):
        assert not list(cls(cls.Config(**fields)).check(SimpleNamespace(total_steps=total), path))


@pytest.mark.parametrize("cls", ALL)
def test_a_rate_doesnt_depend_on_the_rates_asked_before(cls: Any) -> None:
    schedule = cls(cls.Config(warmup_steps=2)).build(10)
    forwards = [schedule(step, 1.0) for step in range(1, 11)]
    assert [schedule(step, 1.0) for step in range(10, 0, -1)] == forwards[::-1]


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize(
    "fields",
    [{"warmup_ratio": 0.1, "warmup_steps": 3}, {"warmup_ratio": 1.5}, {"warmup_steps": -1}],
)
def test_a_warm_up_that_contradicts_itself_is_refused(cls: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        cls.Config(**fields)
