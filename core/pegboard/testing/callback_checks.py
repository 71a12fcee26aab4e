"""What a callback promises: it takes every event of a run, changes none, and asks for a stop in words.

Options: `metrics`, numbers of a step beside the usual ones, such as those it watches.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pegboard.callback_calls import check_callback
from pegboard.callbacks import (
    Callback,
    CheckpointSaved,
    StepEnd,
    TrainEnd,
    TrainFailure,
    TrainStart,
)
from pegboard.testing.case import Case, Check

__all__ = ["CHECKS", "OPTIONS"]

OPTIONS = frozenset({"metrics"})

TOTAL_STEPS = 6
METRICS: Mapping[str, float] = {
    "loss": 2.5,
    "lr": 1e-4,
    "grad_norm": 0.5,
    "tokens": 100.0,
    "loss/some source": 2.5,
}


def _run_dir(case: Case) -> Path:
    run_dir = case.folder / "run"
    run_dir.mkdir(exist_ok=True)
    return run_dir


def _build(case: Case) -> Callback:
    callback: Callback = case.make().build(_run_dir(case))
    return callback


def _start(case: Case, *, step: int = 0) -> TrainStart:
    run_dir = _run_dir(case)
    return TrainStart(
        run_dir=run_dir,
        config={"seed": 42, "savers": [{"class_name": "CheckpointSaver"}]},
        step=step,
        total_steps=TOTAL_STEPS,
        resumed_from=run_dir / "checkpoints" / f"step_{step:08d}" if step else None,
        rank=0,
        world_size=1,
    )


def _step(case: Case, step: int, **changes: float) -> StepEnd:
    metrics = {**METRICS, **case.options.get("metrics", {}), **changes}
    return StepEnd(step=step, total_steps=TOTAL_STEPS, metrics=metrics, applied=True)


def _saved(case: Case, step: int) -> CheckpointSaved:
    path = _run_dir(case) / "checkpoints" / f"step_{step:08d}"
    return CheckpointSaved(step=step, path=path, saver="CheckpointSaver")


def _run(case: Case, callback: Callback, first: int, last: int) -> list[str | None]:
    """Steps of a run and a checkpoint after them; what each step's end returned."""
    asked = [callback.on_step_end(_step(case, step)) for step in range(first, last + 1)]
    callback.on_checkpoint_saved(_saved(case, last))
    return asked


def _its_methods_are_events(case: Case) -> None:
    check_callback(_build(case))


def _takes_a_whole_run(case: Case) -> None:
    callback = _build(case)
    callback.on_train_start(_start(case))
    _run(case, callback, 1, TOTAL_STEPS)
    callback.on_train_end(TrainEnd(step=TOTAL_STEPS, total_steps=TOTAL_STEPS, stopped=None))


def _takes_a_run_that_fails(case: Case) -> None:
    for steps in (0, 2):
        callback = _build(case)
        callback.on_train_start(_start(case))
        if steps:
            _run(case, callback, 1, steps)
        callback.on_train_error(TrainFailure(step=steps, error=RuntimeError("out of memory")))


def _takes_a_run_that_is_stopped(case: Case) -> None:
    callback = _build(case)
    callback.on_train_start(_start(case))
    _run(case, callback, 1, 2)
    callback.on_train_end(TrainEnd(step=2, total_steps=TOTAL_STEPS, stopped="SIGTERM"))


def _may_be_built_again(case: Case) -> None:
    first = _build(case)
    first.on_train_start(_start(case))
    _run(case, first, 1, 3)
    # Killed: no end was told. The next process goes on from the checkpoint, and repeats nothing before it.
    second = _build(case)
    second.on_train_start(_start(case, step=3))
    _run(case, second, 4, TOTAL_STEPS)
    second.on_train_end(TrainEnd(step=TOTAL_STEPS, total_steps=TOTAL_STEPS, stopped=None))


def _takes_numbers_that_are_not_finite(case: Case) -> None:
    callback = _build(case)
    callback.on_train_start(_start(case))
    for step, number in enumerate((float("nan"), float("inf"), float("-inf")), start=1):
        watched = dict.fromkeys(case.options.get("metrics", {}), number)
        callback.on_step_end(_step(case, step, loss=number, grad_norm=number, **watched))
    callback.on_train_error(TrainFailure(step=3, error=RuntimeError("not finite")))


def _asks_for_a_stop_in_words(case: Case) -> None:
    callback = _build(case)
    callback.on_train_start(_start(case))
    for reason in _run(case, callback, 1, TOTAL_STEPS):
        assert reason is None or (isinstance(reason, str) and reason.strip()), (
            f"on_step_end returned {reason!r}; expected None, or a text that says why to stop"
        )


def _leaves_the_facts_alone(case: Case) -> None:
    callback = _build(case)
    start, step = _start(case), _step(case, 1)
    before: list[Any] = [repr(start), repr(step)]
    callback.on_train_start(start)
    callback.on_step_end(step)
    assert [repr(start), repr(step)] == before, "an event was changed; others are told of it too"


CHECKS = (
    Check("its_methods_are_events", _its_methods_are_events),
    Check("takes_a_whole_run", _takes_a_whole_run),
    Check("takes_a_run_that_fails", _takes_a_run_that_fails),
    Check("takes_a_run_that_is_stopped", _takes_a_run_that_is_stopped),
    Check("may_be_built_again", _may_be_built_again),
    Check("takes_numbers_that_are_not_finite", _takes_numbers_that_are_not_finite),
    Check("asks_for_a_stop_in_words", _asks_for_a_stop_in_words),
    Check("leaves_the_facts_alone", _leaves_the_facts_alone),
)
