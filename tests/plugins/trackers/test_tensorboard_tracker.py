"""Claim: numbers reach TensorBoard under their names; its absence is one clear problem."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pegboard import ConfigError
from pegboard_plugins.trackers.component import TensorBoardTracker

READER = "tensorboard.backend.event_processing.event_accumulator"
RUN: Any = None  # the check looks at installed packages only


def make_tracker(**fields: Any) -> TensorBoardTracker:
    return TensorBoardTracker(TensorBoardTracker.Config(**fields))


def test_a_missing_package_is_one_problem_at_the_tracker(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(
        sys.modules, "tensorboard", None
    )  # what Python reads as "can't be imported"
    (problem,) = make_tracker().check(RUN, ("trackers", 0))
    assert problem.path == ("trackers", 0, "class_name")
    assert "pip install tensorboard" in problem.message
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        make_tracker().build(tmp_path)


def test_points_are_read_back_under_their_names_and_steps(tmp_path: Path) -> None:
    reader = pytest.importorskip(READER, reason="tensorboard is not installed")

    assert list(make_tracker().check(RUN, ("trackers", 0))) == []
    tracker = make_tracker(folder="events").build(tmp_path)
    tracker.log(1, {"loss": 2.5, "lr": 1e-5})
    tracker.log(3, {"loss": 2.0})
    tracker.close()
    tracker.close()
    events = reader.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [(point.step, point.value) for point in events.Scalars("loss")] == [(1, 2.5), (3, 2.0)]
    assert [point.step for point in events.Scalars("lr")] == [1]


def test_a_resumed_run_hides_what_it_does_again(tmp_path: Path) -> None:
    reader = pytest.importorskip(READER, reason="tensorboard is not installed")

    for steps in ((1, 2, 3, 4), (3, 4)):
        tracker = make_tracker().build(tmp_path)
        for step in steps:
            tracker.log(step, {"loss": float(step)})
        tracker.close()
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [point.step for point in events.Scalars("loss")] == [1, 2, 3, 4]


def test_a_tracker_that_logs_nothing_leaves_no_file(tmp_path: Path) -> None:
    pytest.importorskip(READER, reason="tensorboard is not installed")
    make_tracker().build(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["", "/tmp/elsewhere", "../outside"])
def test_the_folder_stays_inside_the_run(folder: str) -> None:
    with pytest.raises(ValidationError):
        make_tracker(folder=folder)
