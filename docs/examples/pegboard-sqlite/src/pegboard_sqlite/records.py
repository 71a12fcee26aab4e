"""Rows of a SQLite table as records.

A config names a table and columns, never SQL: both are looked up in the database and quoted, so whatever a JSON file
says, one SELECT is all that runs. The file is opened read-only, in each process when it first reads.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import sqlite3
from array import array
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from pegboard import DataError, SampleKey

__all__ = ["SQLiteRecords", "find_problem", "quoted"]

_WAIT_S = 5.0
"""How long a database that somebody is writing is waited for."""


class SQLiteRecords:
    """The built SQLiteDataset; pickles.

    Args:
        name: of the dataset, for sample keys.
        columns: record key -> column; None: all, under their own names.
        json_columns: columns whose text is parsed.

    Raises:
        DataError: no such file, table or column, or the file can't be read; by the first use, an empty table.
    """

    def __init__(
        self,
        name: str,
        *,
        database: str,
        table: str,
        columns: Mapping[str, str] | None = None,
        json_columns: Sequence[str] = (),
    ) -> None:
        found = find_problem(
            database=database, table=table, columns=columns, json_columns=json_columns
        )
        if found is not None:
            raise DataError(f"{database}: {found[1]}")
        self.name, self.database, self.table = name, database, table
        self.data_files = (database,)  # their content is part of what names tokenized data
        with closing(open_readonly(database)) as connection:
            present = column_names(connection, table)
        self._columns = dict(columns) if columns is not None else {one: one for one in present}
        self._id_name = id_name(present)
        self._json_columns = frozenset(json_columns)
        stat = os.stat(database)
        state = [
            database,
            stat.st_size,
            stat.st_mtime_ns,
            table,
            self._columns,
            sorted(json_columns),
        ]
        self._fingerprint = hashlib.sha256(json.dumps(state).encode()).hexdigest()
        self._connection: sqlite3.Connection | None = None
        self._rowids: array[int] | None = None

    def __len__(self) -> int:
        return len(self._ids())

    def __getitem__(self, index: int) -> dict[str, Any]:
        rowid = self._rowid(index)
        names = ", ".join(map(quoted, self._columns.values()))
        rows = self._select(
            f"SELECT {names} FROM {quoted(self.table)} WHERE {self._id_name} = ?", (rowid,)
        )
        if not rows:
            raise DataError(f"{self.key(index)}: the row is gone; start again")
        record = {}
        for (key, column), value in zip(self._columns.items(), rows[0], strict=True):
            if isinstance(value, bytes):
                raise DataError(f"{self.key(index)}: column {column!r} holds a BLOB, expected text")
            if value is None:
                continue  # no value, no key
            if column in self._json_columns:
                value = self._parsed(index, column, value)
            record[key] = value
        return record

    def key(self, index: int) -> SampleKey:
        """The file and, as its line, the rowid."""
        return SampleKey(self.name, self.database, self._rowid(index))

    def fingerprint(self) -> str | None:
        """None while changes stand in a log beside the file: the file's content doesn't tell of them."""
        log = Path(f"{self.database}-wal")
        return None if log.exists() and log.stat().st_size else self._fingerprint

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connection": None}

    def _rowid(self, index: int) -> int:
        ids = self._ids()
        if not 0 <= index < len(ids):
            raise IndexError(index)
        return ids[index]

    def _ids(self) -> array[int]:
        if self._rowids is None:
            ids = array(
                "q",
                (
                    r
                    for (r,) in self._select(
                        f"SELECT {self._id_name} FROM {quoted(self.table)} ORDER BY 1"
                    )
                ),
            )
            if not ids:
                raise DataError(f"{self.database}: table {self.table!r} has no rows; import some")
            if ids[0] < 1:
                raise DataError(
                    f"{self.database}: table {self.table!r} has rowid {ids[0]}; expected from 1 up"
                )
            self._rowids = ids
        return self._rowids

    def _select(self, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        try:
            if self._connection is None:
                self._connection = open_readonly(self.database)
            return self._connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise DataError(f"{self.database}: {in_words(error)}") from error

    def _parsed(self, index: int, column: str, value: Any) -> Any:
        try:
            return json.loads(value) if isinstance(value, str) else value
        except ValueError as error:
            raise DataError(f"{self.key(index)}: column {column!r} is no JSON: {error}") from error


def find_problem(
    *,
    database: str,
    table: str,
    columns: Mapping[str, str] | None = None,
    json_columns: Sequence[str] = (),
) -> tuple[str, str] | None:
    """(config key, what is wrong there); None if the table can be read."""
    if not os.path.isfile(database):
        return "database", f"no file {database!r} (relative to {Path.cwd()})"
    try:
        with closing(open_readonly(database)) as connection:
            listed = connection.execute(
                "SELECT name, type FROM sqlite_master WHERE type IN ('table', 'view')"
            ).fetchall()
            kinds = dict(listed)
            if table not in kinds:
                return "table", f"no table {table!r} in {database!r}. {_near(table, list(kinds))}"
            if kinds[table] == "view":
                return "table", f"{table!r} is a view, which has no rowids; make a table of it"
            present = column_names(connection, table)
            try:
                connection.execute(f"SELECT {id_name(present)} FROM {quoted(table)} LIMIT 1")
            except sqlite3.OperationalError as error:
                if "no such column" not in str(error):
                    raise
                return "table", f"table {table!r} is WITHOUT ROWID; make one that has rowids"
    except sqlite3.Error as error:
        return "database", f"{database!r}: {in_words(error)}"
    for key, wanted in (("columns", (columns or {}).values()), ("json_columns", json_columns)):
        for column in wanted:
            if column not in present:
                return key, f"no column {column!r} in table {table!r}. {_near(column, present)}"
    return None


def open_readonly(database: str) -> sqlite3.Connection:
    """Nothing can be written through it, and a file that is missing is not made."""
    uri = f"{Path(database).absolute().as_uri()}?mode=ro"
    return sqlite3.connect(uri, uri=True, timeout=_WAIT_S)


def column_names(connection: sqlite3.Connection, table: str) -> list[str]:
    return [row[1] for row in connection.execute(f"PRAGMA table_info({quoted(table)})")]


def id_name(columns: Sequence[str]) -> str:
    """A name of the rowid that no column takes from it."""
    taken = {column.lower() for column in columns}
    return next((name for name in ("rowid", "_rowid_", "oid") if name not in taken), "rowid")


def quoted(name: str) -> str:
    """An SQL identifier, whatever is in it."""
    return '"' + name.replace('"', '""') + '"'


def in_words(error: sqlite3.Error) -> str:
    """What SQLite says, and what to do."""
    text = str(error)
    if "locked" in text or "busy" in text:
        return f"{text}: somebody is writing to it; wait for that, or copy the file"
    if "not a database" in text:
        return f"{text}; expected one that SQLite has made"
    if "malformed" in text:
        return f'{text}: it is damaged; try `sqlite3 FILE ".recover"`, or take a copy'
    return text


def _near(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"There is: {', '.join(known) or 'nothing'}."
