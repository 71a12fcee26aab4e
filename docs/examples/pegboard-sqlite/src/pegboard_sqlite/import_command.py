"""`pegboard sqlite-import`: JSON lines into a table."""

from __future__ import annotations

import argparse
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pegboard

from .records import in_words, quoted

__all__ = ["SQLiteImport"]


class SQLiteImport(pegboard.Command):
    """Import a file of JSON lines into a new table of a SQLite database, all of it or nothing."""

    name = "sqlite-import"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("records", metavar="RECORDS.jsonl", help="one JSON object a line")
        parser.add_argument("database", metavar="OUT.db", help="made where it is missing")
        parser.add_argument("--table", default="records", metavar="NAME", help="default: records")

    def run(self, arguments: argparse.Namespace, plugins: Any) -> int:
        del plugins
        source, database = Path(arguments.records), Path(arguments.database)
        if not source.is_file():
            raise pegboard.DataError(f"{source}: no such file (relative to {Path.cwd()})")
        columns: dict[str, bool] = {}  # column -> whether some value is JSON
        for line, record in _records(source):
            for name, value in record.items():
                columns[name] = columns.get(name, False) or isinstance(value, list | dict)
            if len({name.lower() for name in columns}) < len(columns):
                raise pegboard.DataError(
                    f"{source}:{line}: keys that differ only in case can't both be columns"
                )
        if not columns:
            raise pegboard.DataError(f"{source}: no record with a key")
        is_new = not database.exists()
        try:
            count = _write(source, database, arguments.table, columns)
        except (sqlite3.Error, pegboard.DataError, OverflowError) as error:
            if is_new:
                database.unlink(missing_ok=True)
            if isinstance(error, sqlite3.Error):
                raise pegboard.DataError(f"{database}: {in_words(error)}") from error
            raise
        told = [name for name, is_json in columns.items() if is_json]
        hint = f'; "json_columns": {json.dumps(told)}' if told else ""
        print(f"{database}: {count} records in table {arguments.table!r}{hint}")
        return 0


def _write(source: Path, database: Path, table: str, columns: dict[str, bool]) -> int:
    names = ", ".join(map(quoted, columns))
    marks = ", ".join("?" for _ in columns)
    count = 0
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("BEGIN")  # the table too: all or nothing
        connection.execute(f"CREATE TABLE {quoted(table)} ({names})")
        for line, record in _records(source):
            # Once a column holds JSON, all of it is.
            row = [
                json.dumps(value, ensure_ascii=False)
                if columns[name] and value is not None
                else value
                for name, value in ((name, record.get(name)) for name in columns)
            ]
            try:
                connection.execute(f"INSERT INTO {quoted(table)} VALUES ({marks})", row)
            except OverflowError as error:
                raise pegboard.DataError(
                    f"{source}:{line}: a number has more than 64 bits"
                ) from error
            count += 1
    return count


def _records(source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with source.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise pegboard.DataError(f"{source}:{number}: not JSON: {error}") from error
            if not isinstance(record, dict):
                raise pegboard.DataError(f"{source}:{number}: expected an object")
            yield number, record
