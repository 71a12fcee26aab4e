"""The claim: a package that the project never imports is installed, and a run of two processes reads its data from it,
writes its metrics through it and is resumed; the tables say what the run's own files say."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT, read_metrics, run_alone, torchrun

PACKAGE = ROOT / "docs" / "examples" / "pegboard-sqlite"
pytestmark = pytest.mark.slow


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the package as pip would leave it: modules, and metadata made of its pyproject.toml."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    folder = tmp_path / "site"
    shutil.copytree(PACKAGE / "src", folder)
    info = folder / f"pegboard_sqlite-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    points = "\n".join(
        f"{name} = {value}" for name, value in project["entry-points"]["pegboard"].items()
    )
    (info / "entry_points.txt").write_text(f"[pegboard]\n{points}\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def rows(database: Path, statement: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(database) as connection:
        return connection.execute(statement).fetchall()


def test_a_run_from_a_table_is_logged_and_resumed(site: Path, tmp_path: Path) -> None:
    questions = tmp_path / "train.jsonl"
    records = [
        {
            "question": f"Ann has {i} apples and buys {i % 7} more. How many has she?",
            "answer": f"{i} + {i % 7} = {i + i % 7}.\n#### {i + i % 7}",
        }
        for i in range(1, 41)
    ]
    questions.write_text("\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
    database = tmp_path / "train.db"
    done = run_alone("sqlite-import", str(questions), str(database), "--table", "train")
    assert done.returncode == 0 and "40 records in table 'train'" in done.stdout, done.stderr

    config = json.loads((ROOT / "configs" / "tiny" / "qwen3.json").read_text(encoding="utf-8"))
    dataset = {
        "class_name": "SQLiteDataset",
        "name": "train",
        "database": str(database),
        "table": "train",
        "columns": {"prompt": "question", "completion": "answer"},
    }
    config |= {
        "work_dir": str(tmp_path / "runs"),
        "run_name": "run",
        "requires": ["pegboard-sqlite"],
        "total_steps": 4,
        "savers": [{"class_name": "CheckpointSaver", "every_steps": 2}],
        "trackers": [{"class_name": "SQLiteTracker"}],
        "callbacks": [{"class_name": "SQLiteRunLog"}],
    }
    config["datasets"][0]["dataset"] = dataset
    path = tmp_path / "config.json"

    def train(*words: str) -> subprocess.CompletedProcess[str]:
        path.write_text(json.dumps(config, indent=1), encoding="utf-8")
        return torchrun(2, "core/run.py", str(path), *words)

    result = train()
    assert result.returncode == 0, result.stderr[-4000:]
    config["total_steps"] = 6
    result = train("--resume")
    assert result.returncode == 0, result.stderr[-4000:]

    run_dir = tmp_path / "runs" / "run"
    logged = {
        (int(line["step"]), name): value
        for line in read_metrics(run_dir)
        for name, value in line.items()
        if name != "step"
    }
    kept = rows(run_dir / "run.db", "SELECT step, name, value FROM metrics")
    assert {(step, name): value for step, name, value in kept} == logged
    assert {step for step, _ in logged} == set(range(1, 7))

    history = rows(
        run_dir / "run.db",
        "SELECT id, run, status, first_step, last_step, total_steps, stopped, error, num_ranks, "
        "ended >= started FROM runs ORDER BY id",
    )
    run = str(run_dir)
    assert history == [
        (1, run, "done", 0, 4, 4, None, None, 2, 1),
        (2, run, "done", 4, 6, 6, None, None, 2, 1),
    ]
    saved = rows(run_dir / "run.db", "SELECT run_id, step, saver FROM saved ORDER BY rowid")
    assert saved == [(id, step, "CheckpointSaver") for id, step in ((1, 2), (1, 4), (2, 6))]

    # Some mistakes of its user: told by `check`, in one line with file, line and column.
    for mistake, says in (
        (
            {"column": {}},
            "datasets[0].dataset.column: unknown key 'column'. Did you mean 'columns'?",
        ),
        ({"table": "trian"}, "datasets[0].dataset.table: no table 'trian' in "),
    ):
        config["datasets"][0]["dataset"] = {**dataset, **mistake}
        path.write_text(json.dumps(config, indent=1), encoding="utf-8")
        said = run_alone("check", str(path))
        (line,) = said.stderr.splitlines()
        assert said.returncode == 2 and line.startswith(f"{path}:") and says in line
    schema = json.loads(run_alone("schema").stdout)
    assert schema["definitions"]["dataset.SQLiteDataset"]["properties"]["table"]
    without = run_alone("check", str(path), "--no-third-party")
    assert (
        without.returncode == 2
        and "'pegboard-sqlite' offers it, and --no-third-party leaves it out" in without.stderr
    )


def test_the_tests_of_the_package_pass_where_it_is_installed(site: Path, tmp_path: Path) -> None:
    # No `-p`: where Pegboard is installed, pytest has its plugin already and takes no second one.
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    paths = [site, ROOT / "core", ROOT / "plugins"]
    done = subprocess.run(
        [sys.executable, *words, str(PACKAGE / "tests")],
        cwd=PACKAGE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_the_project_never_imports_it() -> None:
    guilty = [
        str(path)
        for folder in ("core", "plugins")
        for path in (ROOT / folder).rglob("*.py")
        if "pegboard_sqlite" in path.read_text(encoding="utf-8")
    ]
    assert guilty == []
