"""Claim: rows are read as the config says; whatever is wrong is told with its place, and no config can run SQL."""

from __future__ import annotations

import argparse
import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pegboard_sqlite import SQLiteDataset, SQLiteImport
from pegboard_sqlite.records import SQLiteRecords

from pegboard import DataError
from pegboard.plugin_manager import load_plugins


@pytest.fixture
def database(tmp_path: Path) -> str:
    path = tmp_path / "a.db"
    with sqlite3.connect(path) as connection:
        connection.execute('CREATE TABLE "odd ""name; --" (question, "the ""answer""", tags, n)')
        connection.execute(
            'INSERT INTO "odd ""name; --" VALUES (?, ?, ?, ?)', ("q", "a", '["x"]', None)
        )
        connection.execute("CREATE TABLE empty (a)")
        connection.execute("CREATE TABLE flat (a PRIMARY KEY) WITHOUT ROWID")
        connection.execute("CREATE TABLE blobs (a)")
        connection.execute("INSERT INTO blobs VALUES (x'00')")
        connection.execute("CREATE VIEW seen AS SELECT a FROM blobs")
        connection.execute("CREATE TABLE own (rowid, a)")
        connection.execute("INSERT INTO own VALUES ('mine', 'b')")
    return str(path)


def problems(**fields: Any) -> Iterator[str]:
    part: Any = SQLiteDataset(SQLiteDataset.Config.model_validate(fields))
    for path, message in part.check(None, ("d",)):
        yield f"{'.'.join(path)}: {message}"


def test_any_name_is_a_name_and_null_is_no_key(database: str) -> None:
    table = 'odd "name; --'
    records = SQLiteRecords("d", database=database, table=table, json_columns=("tags",))
    assert len(records) == 1
    assert records[0] == {"question": "q", 'the "answer"': "a", "tags": ["x"]}
    chosen = {"completion": 'the "answer"', "prompt": "question"}
    records = SQLiteRecords("d", database=database, table=table, columns=chosen)
    assert records[0] == {"completion": "a", "prompt": "q"}
    assert str(records.key(0)) == f"{database}:1"


def test_a_column_may_be_called_rowid(database: str) -> None:
    records = SQLiteRecords("d", database=database, table="own")
    assert records[0] == {"rowid": "mine", "a": "b"} and records.key(0).line == 1


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"table": "blob"}, "d.table: no table 'blob' in .* Did you mean 'blobs'?"),
        ({"table": "x; DROP TABLE blobs"}, "d.table: no table 'x; DROP TABLE blobs' in"),
        ({"table": "seen"}, "d.table: 'seen' is a view, which has no rowids"),
        ({"table": "flat"}, "d.table: table 'flat' is WITHOUT ROWID"),
        ({"table": "blobs", "columns": {"k": "aa"}}, "d.columns: no column 'aa' in table 'blobs'"),
        ({"table": "blobs", "json_columns": ["1"]}, "d.json_columns: no column '1' in table"),
        ({"database": "no.db", "table": "t"}, "d.database: no file 'no.db' .relative to "),
    ],
)
def test_what_is_not_there_is_told_before_the_run(
    database: str, fields: dict[str, Any], says: str
) -> None:
    (found,) = problems(**{"database": database, **fields})
    assert re.match(says, found)
    assert not Path("no.db").exists()


def test_a_file_that_is_no_database_or_is_damaged_is_told(database: str, tmp_path: Path) -> None:
    text = tmp_path / "text.db"
    text.write_text("no database at all, and long enough to be read as one " * 99)
    (found,) = problems(database=str(text), table="t")
    assert "file is not a database; expected one that SQLite has made" in found
    content = Path(database).read_bytes()
    cut = tmp_path / "cut.db"
    cut.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    with pytest.raises(DataError, match=r"cut\.db: .*(malformed|disk image).*it is damaged"):
        SQLiteRecords("d", database=str(cut), table="blobs")[0]


def test_a_locked_database_is_told(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pegboard_sqlite.records._WAIT_S", 0.05)
    with closing(sqlite3.connect(database, isolation_level=None)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        (found,) = problems(database=database, table="blobs")
        assert "database is locked: somebody is writing to it" in found


def test_an_empty_table_and_a_blob_are_told(database: str) -> None:
    with pytest.raises(DataError, match=r"a\.db: table 'empty' has no rows"):
        len(SQLiteRecords("d", database=database, table="empty"))
    with pytest.raises(DataError, match=r"a\.db:1: column 'a' holds a BLOB"):
        SQLiteRecords("d", database=database, table="blobs")[0]


def test_nothing_is_kept_while_changes_stand_beside_the_file(database: str) -> None:
    assert SQLiteRecords("d", database=database, table="blobs").fingerprint()
    with closing(sqlite3.connect(database)) as writer:
        writer.execute("PRAGMA journal_mode = WAL")
        with writer:
            writer.execute("INSERT INTO blobs VALUES ('more')")
        records = SQLiteRecords("d", database=database, table="blobs")
        assert len(records) == 2 and records.fingerprint() is None


def run_import(records: Path, database: Path, table: str = "records") -> int:
    arguments = argparse.Namespace(records=str(records), database=str(database), table=table)
    return SQLiteImport().run(arguments, load_plugins(third_party=False))


def test_what_was_imported_is_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [
        {"messages": [{"role": "user", "content": "\u00e9"}], "n": 1},
        {"messages": [], "n": 2.5, "text": "x"},
    ]
    source, database = tmp_path / "a.jsonl", tmp_path / "b.db"
    source.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    assert run_import(source, database, "t") == 0
    assert '2 records in table \'t\'; "json_columns": ["messages"]' in capsys.readouterr().out
    read = SQLiteRecords("d", database=str(database), table="t", json_columns=("messages",))
    assert [read[i] for i in range(len(read))] == records
    before = database.read_bytes()
    with pytest.raises(DataError, match='b.db: table "?t"? already exists'):
        run_import(source, database, "t")
    assert database.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1}\n{"a', ":2: not JSON"),
        ("[1]", ":1: expected an object"),
        ("", ": no record with a key"),
        ('{"a": 1, "A": 2}', ":1: keys that differ only in case"),
        ('{"a": 99999999999999999999}', ":1: a number has more than 64 bits"),
    ],
)
def test_a_bad_line_is_named_and_leaves_nothing(tmp_path: Path, text: str, says: str) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        run_import(source, tmp_path / "b.db")
    assert str(caught.value).startswith(f"{source}{says}")
    assert not (tmp_path / "b.db").exists()
