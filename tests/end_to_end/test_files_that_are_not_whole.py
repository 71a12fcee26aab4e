"""The claim: a disk that is full and weights that are not all there end a run with one line and code 2, on every rank,
soon, and leave nothing that looks like an export."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from launching import read_metrics, torchrun

from pegboard.cli import main

MakeConfig = Callable[..., Path]
EXPORT = {"class_name": "HFSaver", "dtype": "float32"}
# Less than the weights (about 150 kB) and more than any other file of the run.
ROOM = 60_000


@contextmanager
def files_no_longer_than(num_bytes: int) -> Iterator[None]:
    """A disk of that size, as far as a single file can tell; also for processes started within."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def wide(**changes: Any) -> dict[str, Any]:
    return {"model": {"hidden_size": 64, "head_dim": 16}, "epoch_num": 1, **changes}


@pytest.mark.parametrize(
    "saver", [EXPORT, {"class_name": "CheckpointSaver"}], ids=["export", "checkpoint"]
)
def test_a_disk_that_fills_up_while_saving_leaves_nothing_half_done(
    saver: dict[str, Any],
    make_config: MakeConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make_config(**wide(savers=[saver]))
    with files_no_longer_than(ROOM):
        assert main(["train", str(config), "--no-third-party"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "could not be written; what stood there before is untouched" in line
    assert "File too large" in line
    run = tmp_path / "a" / "run"
    assert len(read_metrics(run)) == 1
    assert not [path for path in run.rglob("*.safetensors")] and not [*run.glob("export*")]


def test_a_disk_that_is_full_for_the_log_is_one_line(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(**wide(savers=[]))
    with files_no_longer_than(600):
        assert main(["train", str(config), "--no-third-party"]) == 2
    lines = [one for one in capsys.readouterr().err.splitlines() if one and " INFO " not in one]
    assert "File too large" in lines[-1] and not any("Traceback" in one for one in lines)


@pytest.mark.slow
def test_ranks_end_together_on_a_full_disk_and_on_a_missing_shard(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    shards = {**EXPORT, "max_shard_size_gb": 5e-5}
    config = str(make_config(**wide(savers=[shards])))
    with files_no_longer_than(30_000):
        full = torchrun(2, "core/run.py", config, timeout_s=120)
    assert full.returncode == 1
    assert "could not be written" in full.stderr and "core/pegboard/" not in full.stderr
    assert not [*(tmp_path / "a" / "run").glob("export*")]

    assert torchrun(2, "core/run.py", config, timeout_s=120).returncode == 0
    export = tmp_path / "a" / "run" / "export"
    files = sorted(export.glob("model-*.safetensors"))
    assert len(files) > 1
    files[1].unlink()
    started = make_config("b", **wide(load_from=str(export)))
    missing = torchrun(2, "core/run.py", str(started), timeout_s=120)
    assert missing.returncode == 1
    said = f"{export}: 1 of {len(files)} weight files are missing: {files[1].name}"
    assert said in missing.stderr and "core/pegboard/" not in missing.stderr
