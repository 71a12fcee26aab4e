"""Claim: dataset, tracker and callback keep the contract of their kind."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from pegboard_sqlite import SQLiteDataset, SQLiteRunLog, SQLiteTracker

from pegboard.testing import Case, Check, checks_for, contract_for


def _kept(run_dir: Path) -> dict[tuple[int, str], float]:
    with sqlite3.connect(run_dir / "run.db") as database:
        rows = database.execute("SELECT step, name, value FROM metrics")
        return {(step, name): value for step, name, value in rows}


test_tracker_contract = contract_for(SQLiteTracker, read=_kept)
test_callback_contract = contract_for(SQLiteRunLog)


@pytest.mark.parametrize("check", checks_for("dataset"), ids=lambda check: check.name)
def test_dataset_contract(check: Check, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.db", tmp_path / "bad.db"
    for path in (good, bad):
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE t (question, tags)")
            rows = [(f"what is {i}?", f"[{i}]") for i in range(5)]
            database.executemany("INSERT INTO t VALUES (?, ?)", rows)
            database.execute("DELETE FROM t WHERE rowid = 2")
    with sqlite3.connect(bad) as database:
        database.execute("UPDATE t SET tags = '[1' WHERE rowid = 4")

    def change() -> None:
        with sqlite3.connect(good) as database:
            database.execute("INSERT INTO t VALUES ('one more', '[]')")

    fields: dict[str, Any] = {"table": "t", "json_columns": ["tags"]}
    options = {"bad_config": {"database": str(bad), **fields}, "change": change}
    folder = tmp_path / "work"
    folder.mkdir()
    check.run(Case(SQLiteDataset, {"database": str(good), **fields}, folder, options))
