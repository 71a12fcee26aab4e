"""What a tracker promises: it takes any numbers at any step, and closes."""

from __future__ import annotations

from pegboard.testing.case import Case, Check

__all__ = ["CHECKS", "OPTIONS"]

OPTIONS = frozenset[str]()


def _takes_numbers_and_closes(case: Case) -> None:
    tracker = case.make().build(case.folder)
    tracker.log(1, {"loss": 2.5, "loss/some source": 3.0, "lr": 1e-4})
    tracker.log(2, {"loss": 2.25})
    tracker.close()


def _takes_numbers_that_are_not_finite(case: Case) -> None:
    tracker = case.make().build(case.folder)
    tracker.log(1, {"loss": float("nan"), "grad_norm": float("inf")})
    tracker.close()


def _takes_steps_out_of_order_and_new_names(case: Case) -> None:
    tracker = case.make().build(case.folder)
    tracker.log(5, {"loss": 1.0})
    tracker.log(5, {"eval_loss": 1.5})
    tracker.log(6, {})
    tracker.close()


def _leaves_the_numbers_alone(case: Case) -> None:
    tracker = case.make().build(case.folder)
    metrics = {"loss": 2.5, "lr": 1e-4}
    tracker.log(1, metrics)
    tracker.close()
    assert metrics == {"loss": 2.5, "lr": 1e-4}, f"the numbers became {metrics}"


def _may_be_built_again(case: Case) -> None:
    for step in (1, 2):
        tracker = case.make().build(case.folder)
        tracker.log(step, {"loss": 1.0})
        tracker.close()


CHECKS = (
    Check("takes_numbers_and_closes", _takes_numbers_and_closes),
    Check("takes_numbers_that_are_not_finite", _takes_numbers_that_are_not_finite),
    Check("takes_steps_out_of_order_and_new_names", _takes_steps_out_of_order_and_new_names),
    Check("leaves_the_numbers_alone", _leaves_the_numbers_alone),
    Check("may_be_built_again", _may_be_built_again),
)
