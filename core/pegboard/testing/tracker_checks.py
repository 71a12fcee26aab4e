"""What a tracker promises: it takes any numbers at any step, keeps them in the run's folder, and closes.

Options: `read(run_dir)`, what was kept there, as {(step, name): value}.
"""

from __future__ import annotations

from pegboard.testing.case import Case, Check

__all__ = ["CHECKS", "OPTIONS"]

OPTIONS = frozenset({"read"})


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


def _writes_inside_the_run_folder(case: Case) -> None:
    run_dir = case.folder / "run"
    run_dir.mkdir()
    tracker = case.make().build(run_dir)
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    outside = sorted(path.name for path in case.folder.iterdir() if path != run_dir)
    assert not outside, f"left {', '.join(outside)} beside the run's folder"


def _numbers_are_kept(case: Case) -> None:
    import pytest

    if "read" not in case.options:
        pytest.skip("no option `read`")
    told = {(1, "loss"): 2.5, (1, "lr"): 1e-4, (2, "loss"): 2.25, (3, "loss"): 2.0}
    for steps in ((1, 2), (3,)):  # a run, and where it went on
        tracker = case.make().build(case.folder)
        for step in steps:
            tracker.log(step, {name: value for (at, name), value in told.items() if at == step})
        tracker.close()
    found = dict(case.options["read"](case.folder))
    assert found.keys() == told.keys(), f"{sorted(found)} was kept of {sorted(told)}"
    off = [key for key in told if abs(found[key] - told[key]) > 1e-6 * abs(told[key])]
    assert not off, f"kept as another number: {[(key, found[key], told[key]) for key in off]}"


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
    Check("writes_inside_the_run_folder", _writes_inside_the_run_folder),
    Check("numbers_are_kept", _numbers_are_kept),
    Check("may_be_built_again", _may_be_built_again),
)
