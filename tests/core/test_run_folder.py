"""Claim: a run has a folder that is its own, one that is resumed is one that can be, and its numbers stay readable."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from pegboard.parallel import leave_ranks
from pegboard.run_folder import MetricsLog, choose_run_dir


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    leave_ranks()


@pytest.mark.usefixtures("one_rank")
def test_runs_that_begin_in_the_same_second_have_a_folder_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "strftime", lambda form: "20300101-120000")
    work_dir = tmp_path / "new" / "work"
    found = [choose_run_dir(str(work_dir), None, resume=resume) for resume in (False, False, True)]
    names = ["20300101-120000", "20300101-120000-2", "20300101-120000-3"]
    assert found == [work_dir / name for name in names]
    assert all(folder.is_dir() for folder in found)


@pytest.mark.usefixtures("one_rank")
def test_a_run_without_a_whole_checkpoint_is_not_the_one_to_resume(tmp_path: Path) -> None:
    whole = tmp_path / "whole" / "checkpoints" / "step_00000002"
    whole.mkdir(parents=True)
    (whole / "state.json").write_text("{}", encoding="utf-8")
    killed = tmp_path / "killed"
    (killed / "checkpoints" / "step_00000001.tmp-0a1b2c3d").mkdir(parents=True)
    later = (tmp_path / "whole").stat().st_mtime + 60
    os.utime(killed, (later, later))
    assert choose_run_dir(str(tmp_path), None, resume=True) == tmp_path / "whole"


@pytest.mark.parametrize("torn", ["", '{"step": 2, "lo', '{"step": 2, "loss": 1.0}'])
def test_a_line_that_was_cut_short_takes_no_other_along(torn: str, tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n' + torn, encoding="utf-8")
    log = MetricsLog(tmp_path, [], active=True)
    log.log(2, {"eval_loss": 3.0})
    log.close()
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert lines == [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 3.0}]


def test_a_file_with_nothing_but_a_cut_line_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"st', encoding="utf-8")
    log = MetricsLog(tmp_path, [], active=True)
    log.log(1, {"loss": 3.0})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert json.loads(text) == {"step": 1, "loss": 3.0}
