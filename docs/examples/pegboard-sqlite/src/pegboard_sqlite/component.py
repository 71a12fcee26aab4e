"""The parts as a config names them, each with a JSON Schema of its own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import pegboard

from .records import SQLiteRecords, find_problem
from .run_tables import MetricsTable, RunLog

__all__ = ["SQLiteDataset", "SQLiteRunLog", "SQLiteTracker"]

_OUTPUT: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "database": {
            "type": "string",
            "minLength": 1,
            "description": "SQLite file, made where it is missing; several runs may share it. "
            "Default: run.db in the run's folder.",
        }
    },
}


class SQLiteDataset(pegboard.DatasetComponent):
    """Records from the rows of a SQLite table, in the order of their rowids."""

    known_as: ClassVar[tuple[str, ...]] = ("sqlite", "sql")
    config_schema: ClassVar[Any] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["database", "table"],
        "properties": {
            "database": {"$ref": "#/$defs/Name", "description": "SQLite file; opened read-only."},
            "table": {"$ref": "#/$defs/Name", "description": "Table that has rowids; no view."},
            "columns": {
                "type": "object",
                "minProperties": 1,
                "additionalProperties": {"$ref": "#/$defs/Name"},
                "description": 'Key of the record -> column, such as {"prompt": "question"}; '
                "left out: every column under its own name.",
            },
            "json_columns": {
                "type": "array",
                "items": {"$ref": "#/$defs/Name"},
                "uniqueItems": True,
                "default": [],
                "description": "Columns whose text is JSON, such as the messages of a chat.",
            },
        },
        "$defs": {"Name": {"type": "string", "minLength": 1}},
    }
    config: pegboard.SchemaConfig

    def check(self, run: Any, path: tuple[str | int, ...]) -> Iterable[pegboard.Problem]:
        """The file is there, and has the table and the columns."""
        del run
        found = find_problem(**self._source())
        if found is not None:
            key, message = found
            yield pegboard.Problem((*path, key), message)

    def build(self, name: str) -> SQLiteRecords:
        return SQLiteRecords(name, **self._source())

    def _source(self) -> dict[str, Any]:
        config = self.config
        return {
            "database": config["database"],
            "table": config["table"],
            "columns": config.get("columns"),
            "json_columns": tuple(config["json_columns"]),
        }


class SQLiteTracker(pegboard.TrackerComponent):
    """Metrics of each logged step in a table `metrics`."""

    known_as: ClassVar[tuple[str, ...]] = ("sqlite",)
    config_schema: ClassVar[Any] = _OUTPUT
    config: pegboard.SchemaConfig

    def build(self, run_dir: Path) -> MetricsTable:
        return MetricsTable(self.config.get("database") or run_dir / "run.db", run_dir)


class SQLiteRunLog(pegboard.CallbackComponent):
    """Start, end and error of each run in a table `runs`, and what it saved in `saved`."""

    config_schema: ClassVar[Any] = _OUTPUT
    config: pegboard.SchemaConfig

    def build(self, run_dir: Path) -> RunLog:
        return RunLog(self.config.get("database") or run_dir / "run.db", run_dir)
