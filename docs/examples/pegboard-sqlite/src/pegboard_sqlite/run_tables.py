"""What a run leaves in SQLite: metrics of its steps, and its own history.

Every event is one transaction, so another process may read at any time. Several runs may write to one file: each row
says which run it is of.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pegboard

from .records import in_words

__all__ = ["MetricsTable", "RunLog"]

_WAIT_S = 30.0
_TABLES = """
CREATE TABLE IF NOT EXISTS metrics (
    run TEXT NOT NULL, step INTEGER NOT NULL, name TEXT NOT NULL, value REAL,
    PRIMARY KEY (run, step, name)
);
CREATE TABLE IF NOT EXISTS runs (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL, status TEXT NOT NULL, started TEXT NOT NULL, ended TEXT,
    first_step INTEGER NOT NULL, last_step INTEGER NOT NULL, total_steps INTEGER NOT NULL,
    stopped TEXT, error TEXT, num_ranks INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS saved (
    run_id INTEGER NOT NULL REFERENCES runs (id), step INTEGER NOT NULL, saver TEXT NOT NULL,
    path TEXT NOT NULL, at TEXT NOT NULL
);
"""


class _Tables:
    """The file, opened for writing; errors name it."""

    def __init__(self, database: str | Path) -> None:
        self._database = database
        try:
            self._connection = sqlite3.connect(database, timeout=_WAIT_S)
            self._connection.executescript(_TABLES)
        except sqlite3.Error as error:
            raise pegboard.TrainingError(f"{database}: {in_words(error)}") from error

    def write(self, statement: str, *rows: tuple[Any, ...]) -> int:
        """One transaction; returns the id of a row that was added."""
        try:
            with self._connection:
                cursor = self._connection.cursor()
                for row in rows:
                    cursor.execute(statement, row)
                return cursor.lastrowid or 0
        except sqlite3.Error as error:
            raise pegboard.TrainingError(f"{self._database}: {in_words(error)}") from error

    def close(self) -> None:
        self._connection.close()


class MetricsTable:
    """The built SQLiteTracker. A step that is repeated after a restart replaces what was there."""

    def __init__(self, database: str | Path, run_dir: Path) -> None:
        self._tables, self._run = _Tables(database), str(run_dir)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        # As in metrics.jsonl, a number that is not finite is null.
        rows = [
            (self._run, step, name, value if math.isfinite(value) else None)
            for name, value in metrics.items()
        ]
        self._tables.write("INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, ?)", *rows)

    def close(self) -> None:
        self._tables.close()


class RunLog(pegboard.Callback):
    """The built SQLiteRunLog: a row for each start. One that stays `running` was killed."""

    def __init__(self, database: str | Path, run_dir: Path) -> None:
        self._tables, self._run = _Tables(database), str(run_dir)
        self._id, self._step = 0, 0

    def on_train_start(self, event: pegboard.TrainStart) -> None:
        self._step = event.step
        self._id = self._tables.write(
            "INSERT INTO runs (run, status, started, first_step, last_step, total_steps, num_ranks) "
            "VALUES (?, 'running', ?, ?, ?, ?, ?)",
            (self._run, _now(), event.step, event.step, event.total_steps, event.world_size),
        )

    def on_checkpoint_saved(self, event: pegboard.CheckpointSaved) -> None:
        row = (self._id, event.step, event.saver, str(event.path), _now())
        self._tables.write("INSERT INTO saved VALUES (?, ?, ?, ?, ?)", row)
        self._tables.write("UPDATE runs SET last_step = ? WHERE id = ?", (event.step, self._id))

    def on_train_end(self, event: pegboard.TrainEnd) -> None:
        status = "done" if event.stopped is None else "stopped"
        self._end(status, event.step, event.stopped, None)

    def on_train_error(self, event: pegboard.TrainFailure) -> None:
        error = f"{type(event.error).__name__}: {event.error}"
        self._end("failed", event.step, None, error)

    def _end(self, status: str, step: int, stopped: str | None, error: str | None) -> None:
        self._tables.write(
            "UPDATE runs SET status = ?, ended = ?, last_step = ?, stopped = ?, error = ? WHERE id = ?",
            (status, _now(), step, stopped, error, self._id),
        )
        self._tables.close()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
