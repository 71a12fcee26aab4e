"""What a schedule promises: a finite rate for every step of any run, in proportion to the base rate."""

from __future__ import annotations

import math

from pegboard.testing.case import Case, Check

__all__ = ["CHECKS", "OPTIONS"]

OPTIONS = frozenset[str]()

RUNS = (1, 2, 7, 1000)
BASE = 0.5


def _every_step_has_a_rate(case: Case) -> None:
    for total in RUNS:
        schedule = case.make().build(total)
        for step in range(1, total + 1):
            rate = schedule(step, BASE)
            assert math.isfinite(rate) and rate >= 0, f"step {step} of {total}: rate {rate}"


def _no_rate_is_over_the_base(case: Case) -> None:
    for total in RUNS:
        schedule = case.make().build(total)
        worst = max(schedule(step, BASE) for step in range(1, total + 1))
        assert worst <= BASE * (1 + 1e-9), f"a rate of {worst} for a base of {BASE}"


def _the_first_step_moves(case: Case) -> None:
    for total in RUNS:
        assert case.make().build(total)(1, BASE) > 0, f"the first of {total} steps has a rate of 0"


def _a_step_has_one_rate(case: Case) -> None:
    schedule = case.make().build(100)
    forward = [schedule(step, BASE) for step in range(1, 101)]
    backward = [schedule(step, BASE) for step in range(100, 0, -1)][::-1]
    assert forward == backward, "the rate of a step depends on those asked before: no resume"


def _another_base_never_lowers_a_rate(case: Case) -> None:
    schedule = case.make().build(50)
    for step in range(1, 51):
        assert schedule(step, 2 * BASE) >= schedule(step, BASE), (
            f"step {step}: a higher base, a lower rate"
        )
    peak = max(schedule(step, 2 * BASE) for step in range(1, 51))
    assert peak > max(schedule(step, BASE) for step in range(1, 51)), (
        "the base rate changes nothing"
    )


CHECKS = (
    Check("every_step_has_a_rate", _every_step_has_a_rate),
    Check("no_rate_is_over_the_base", _no_rate_is_over_the_base),
    Check("the_first_step_moves", _the_first_step_moves),
    Check("a_step_has_one_rate", _a_step_has_one_rate),
    Check("another_base_never_lowers_a_rate", _another_base_never_lowers_a_rate),
)
