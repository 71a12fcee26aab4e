"""Claim: the heat map is one self-contained file that holds every logged step until there are too
many, goes on after a restart, and is not written for a model without experts."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pegboard.contracts import Table
from pegboard.run_folder import MetricsLog
from pegboard.tracking import TableTracker
from pegboard_plugins.trackers.component import ExpertLoadTracker
from pegboard_plugins.trackers.heat_map import HeatMapFile, load_bytes, load_colours


def tracker(folder: Path) -> HeatMapFile:
    built = ExpertLoadTracker(ExpertLoadTracker.Config(every_seconds=0.0)).build(folder)
    assert isinstance(built, HeatMapFile) and isinstance(built, TableTracker)
    return built


def table(value: float) -> dict[str, Table]:
    return {"expert_load": Table(("layer_0", "layer_2"), [[value, 1.0, 0.0], [1.0, 1.0, 1.0]])}


def data_of(path: Path) -> tuple[dict[str, Any], np.ndarray]:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and "http" not in text
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    cells = np.frombuffer(base64.b64decode(data["cells"]), np.uint8)
    return data, cells.reshape(len(data["steps"]), len(data["rows"]), data["columns"])


def test_the_metrics_log_hands_tables_to_trackers_that_take_them(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, [tracker(tmp_path)], active=True)
    log.log(3, {"loss": 1.0}, table(2.0))
    log.log(6, {"loss": 1.0}, table(4.0))
    log.log(7, {"eval_loss": 1.0})
    log.close()
    data, cells = data_of(tmp_path / "expert_load.html")
    assert data["steps"] == [3, 6] and data["rows"] == ["layer_0", "layer_2"]
    assert cells[:, 0].tolist() == [[144, 128, 0], [160, 128, 0]]


def test_a_model_without_experts_leaves_no_file(tmp_path: Path) -> None:
    one = tracker(tmp_path)
    one.log(1, {"loss": 1.0})
    one.close()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_goes_on_keeps_what_it_had_and_takes_repeated_steps_again(
    tmp_path: Path,
) -> None:
    for steps, value in (((1, 2, 3), 1.0), ((3, 4), 2.0)):
        one = tracker(tmp_path)
        for step in steps:
            one.log_tables(step, table(value))
        one.close()
    data, cells = data_of(tmp_path / "expert_load.html")
    assert data["steps"] == [1, 2, 3, 4]
    assert cells[:, 0, 0].tolist() == [128, 128, 144, 144]


def test_the_file_stays_small_however_long_the_run(tmp_path: Path) -> None:
    one = HeatMapFile(tmp_path / "map.html", table="expert_load", every_s=1e9)
    for step in range(3000):
        one.log_tables(step, table(1.0))
    one.close()
    data, _ = data_of(tmp_path / "map.html")
    assert 256 <= len(data["steps"]) <= 512
    assert data["steps"][0] == 0 and data["steps"][-1] == 2999
    assert data["steps"] == sorted(data["steps"])


def test_a_file_that_is_not_ours_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "expert_load.html").write_text("something else")
    one = tracker(tmp_path)
    one.log_tables(1, table(1.0))
    one.close()
    assert data_of(tmp_path / "expert_load.html")[0]["steps"] == [1]


def test_colours_are_white_at_the_mean_black_for_none_red_above_and_blue_below() -> None:
    cells = load_bytes(np.array([[1.0, 0.0, 16.0, 1 / 16, 1000.0]]))
    white, black, red, blue, far = load_colours(cells)[0].tolist()
    assert white == [255, 255, 255] and black == [0, 0, 0]
    assert red == far == [178, 24, 43] and blue == [33, 102, 172]


def test_tensorboard_gets_an_image(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("PIL")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from pegboard_plugins.trackers.event_files import TensorBoardWriter

    writer = TensorBoardWriter(tmp_path)
    writer.log(5, {"loss": 1.0})
    writer.log_tables(5, table(2.0))
    writer.close()
    events = EventAccumulator(str(tmp_path))  # type: ignore[no-untyped-call]
    events.Reload()  # type: ignore[no-untyped-call]
    (image,) = events.Images("expert_load")  # type: ignore[no-untyped-call]
    assert (image.step, image.width, image.height) == (5, 3, 2)
