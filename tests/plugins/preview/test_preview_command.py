"""`pegboard preview` exits with 0, with 1 where a condition holds, and with 2 on an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pegboard.cli import main

TEXTS = [{"text": f"line {k}"} for k in range(20)]
UNTRAINED = [
    {
        "messages": [
            {"role": "user", "content": "question " * 40},
            {"role": "assistant", "content": "a"},
        ]
    }
]


def preview(path: Path, *words: str) -> int:
    return main(["preview", str(path), "--no-third-party", *words])


def test_a_sound_run_shows_its_first_step_and_exits_with_0(
    write_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert preview(write_run({"a": TEXTS}), "--fail-if", "supervised<1%") == 0
    said = capsys.readouterr()
    assert "step 1 of 2, epoch 1" in said.out and "line" in said.out
    assert "--fail-if" not in said.err


def test_a_condition_that_holds_exits_with_1_and_says_where(
    write_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run({"a": TEXTS, "b": UNTRAINED})
    assert preview(path, "--fail-if", "supervised<0.1%", "--fail-if", "supervised<5%") == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("--fail-if supervised<5%: source 'b' has ") and "(2 of " in last


def test_an_error_exits_with_2_and_one_line(
    write_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run({"a": TEXTS})
    folder = str(path.parent)
    for words in (
        ["--html", folder],
        ["--step", "99"],
        ["--step", "0"],
        ["--fail-if", "nonsense"],
        ["--packs", "-1"],
    ):
        assert preview(path, *words) == 2
        assert len(capsys.readouterr().err.strip().splitlines()[-1:]) == 1
    assert main(["preview", "missing.json", "--no-third-party"]) == 2


def test_html_is_written_where_asked(
    write_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "page.html"
    assert preview(write_run({"a": TEXTS}), "--html", str(file), "--packs", "0") == 0
    assert file.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert f"wrote {file}" in capsys.readouterr().err


@pytest.mark.slow
def test_it_starts_no_process_group_and_training_uses_what_it_prepared(
    write_run: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_run({"a": TEXTS})
    code = (
        "import sys; from pegboard.cli import main\n"
        f"code = main(['preview', {str(path)!r}, '--no-third-party'])\n"
        "import torch.distributed as dist\n"
        "sys.exit(code or dist.is_initialized())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    stores = sorted((tmp_path / "work" / ".token_store").iterdir())
    config = json.loads(path.read_text())
    config["savers"] = []
    path.write_text(json.dumps(config))
    changes = ["--set", "total_steps=1", "--set", "epoch_num=null"]
    assert main(["train", str(path), "--no-third-party", *changes]) == 0
    assert sorted((tmp_path / "work" / ".token_store").iterdir()) == stores
