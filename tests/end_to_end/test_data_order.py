"""What a run is fed depends on its config alone: not on kills, ranks or workers; and the plan that it
prints is what it trains."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT, environment_of_a_run, read_metrics, run_alone, torchrun, write_chats

FED = ("epoch", "tokens", "targets", "samples")


def two_sources(tmp_path: Path) -> list[dict[str, Any]]:
    entries = []
    for name, number, ratio in (("some", 31, 1.0), ("more", 17, 2.5)):
        dataset = {
            "class_name": "JsonlDataset",
            "name": name,
            "anno_path": str(write_chats(tmp_path / f"{name}.jsonl", number)),
            "sample_ratio": ratio,
        }
        tokenize_fn = {"class_name": "ChatTokenizeFn", "max_length": 256}
        entries.append({"dataset": dataset, "tokenize_fn": tokenize_fn})
    return entries


def planned(log: str) -> dict[str, int]:
    """Samples, tokens and supervised tokens of the first epoch, all sources, as the log's table says."""
    (line,) = [line for line in log.splitlines() if re.search(r"INFO\s+all ", line)]
    numbers = [
        int(n.replace(",", ""))
        for n in re.findall(r"(?<![\d.])[\d,]+(?![\d.,]*%)", line.split(" all ")[1])
    ]
    return {"samples": numbers[1], "tokens": numbers[2], "targets": numbers[3]}


@pytest.mark.parametrize("packer", ["ExpandSoftPacker", "HardPacker"])
def test_the_printed_plan_adds_up_to_what_the_model_was_fed(
    make_config: Callable[..., Path], tmp_path: Path, packer: str
) -> None:
    config = make_config(
        datasets=two_sources(tmp_path),
        dataloader={"pack_max_length": 256, "packer": {"class_name": packer}},
        global_batch_size=4,
        epoch_num=2,
        savers=[],
    )
    result = torchrun(2, "core/run.py", str(config))
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = [m for m in read_metrics(tmp_path / "a" / "run") if m["epoch"] == 0]
    found = {name: sum(m[name] for m in metrics) for name in ("samples", "tokens", "targets")}
    assert found == planned(result.stderr)


@pytest.mark.slow
def test_workers_and_ranks_do_not_change_what_each_step_is_fed(
    make_config: Callable[..., Path], tmp_path: Path
) -> None:
    fields: dict[str, Any] = {
        "datasets": two_sources(tmp_path),
        "global_batch_size": 4,
        "epoch_num": 3,
        "savers": [],
    }
    expected: list[dict[str, float]] = []
    for ranks, workers in ((1, 0), (1, 4), (2, 1), (4, 0)):
        name = f"{ranks}_{workers}"
        loader = {"pack_max_length": 256, "num_workers": workers}
        config = make_config(name, dataloader=loader, **fields)
        result = torchrun(ranks, "core/run.py", str(config))
        assert result.returncode == 0, result.stderr[-3000:]
        metrics = read_metrics(tmp_path / name / "run")
        expected = expected or metrics
        assert [[m[key] for key in FED] for m in metrics] == [
            [m[key] for key in FED] for m in expected
        ]
        for one, other in zip(metrics, expected, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_points_trains_the_same_batches(
    make_config: Callable[..., Path], tmp_path: Path
) -> None:
    fields: dict[str, Any] = {
        "datasets": two_sources(tmp_path),
        "dataloader": {"pack_max_length": 256, "packer": {"class_name": "HardPacker"}},
        "global_batch_size": 3,
        "epoch_num": 60,
        "savers": [{"class_name": "CheckpointSaver", "every_steps": 3, "keep_last": 2}],
    }
    assert run_alone(str(make_config("whole", **fields))).returncode == 0
    whole = {m["step"]: m for m in read_metrics(tmp_path / "whole" / "run")}
    config = make_config("killed", **fields)
    metrics_file = tmp_path / "killed" / "run" / "metrics.jsonl"
    script = ROOT / "tests" / "end_to_end" / "killed_runs.py"
    result = subprocess.run(
        [sys.executable, str(script), str(config), str(metrics_file), "20", "0"],
        cwd=ROOT,
        env=environment_of_a_run(),
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "ended with status 0 after 20 kills" in result.stdout, (
        result.stdout + result.stderr[-3000:]
    )
    steps = set()
    for line in metrics_file.read_text().splitlines():
        metrics = json.loads(line)
        expected = whole[metrics["step"]]
        # The loss, to the bit: the same batches, in the same order, from the same weights.
        for name in (*FED, "loss", "grad_norm", "lr"):
            assert metrics[name] == expected[name], (metrics["step"], name)
        steps.add(metrics["step"])
    assert steps == whole.keys()


@pytest.mark.slow
def test_a_run_goes_on_with_other_ranks_or_another_batch_size_where_it_was(
    make_config: Callable[..., Path], tmp_path: Path
) -> None:
    fields: dict[str, Any] = {
        "datasets": two_sources(tmp_path),
        "global_batch_size": 4,
        "epoch_num": 2,
        "savers": [{"class_name": "CheckpointSaver", "every_steps": 3, "keep_last": 100}],
    }
    assert run_alone(str(make_config("whole", **fields))).returncode == 0
    whole = read_metrics(tmp_path / "whole" / "run")

    def cut_back(name: str) -> Path:
        """The same run, as it was after step 3."""
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        run = tmp_path / name / "run"
        for folder in (run / "checkpoints").iterdir():
            if folder.name != "step_00000003":
                shutil.rmtree(folder)
        (run / "metrics.jsonl").unlink()
        return run

    run = cut_back("ranks")
    result = torchrun(2, "core/run.py", "train", str(make_config("ranks", **fields)), "--resume")
    assert result.returncode == 0, result.stderr[-3000:]
    again = read_metrics(run)
    assert [m["step"] for m in again] == [m["step"] for m in whole[3:]]
    for one, other in zip(again, whole[3:], strict=True):
        assert [one[key] for key in FED] == [other[key] for key in FED]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)

    run = cut_back("batch")
    fields["global_batch_size"] = 2
    config = make_config("batch", **fields)
    refused = run_alone("train", str(config), "--resume")
    assert refused.returncode == 2 and "changed since: global_batch_size;" in refused.stderr
    words = ["train", str(config), "--resume", "--set", "on_changed_data=continue"]
    assert run_alone(*words).returncode == 0
    again = read_metrics(run)
    assert again[0]["step"] == 4 and len(again) > len(whole) - 3
    for epoch in (0, 1):
        for name in ("samples", "tokens", "targets"):
            rest = sum(m[name] for m in again if m["epoch"] == epoch)
            assert rest == sum(m[name] for m in whole[3:] if m["epoch"] == epoch)
