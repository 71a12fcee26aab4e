"""Rows of a parquet file are the records they were, in any order."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from pegboard.errors import DataError
from pegboard_plugins.records.parquet_rows import ParquetRows

pyarrow = pytest.importorskip("pyarrow")
RECORDS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": str(n)}]}
    for n in range(25)
]
CALL = {"name": "f", "arguments": {"x": 1}}
RECORDS[3]["messages"][1] = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RECORDS[4]["id"] = "four"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Row groups of 10."""
    from pyarrow import Table, parquet

    file = tmp_path / "x.parquet"
    parquet.write_table(Table.from_pylist(RECORDS), file, row_group_size=10)
    return file


def test_rows_are_records_without_the_nulls_of_other_rows(path: Path) -> None:
    from pyarrow import Table, parquet

    # from_pylist takes the columns from the first row.
    columns = {key: [record.get(key) for record in RECORDS] for key in ("messages", "id")}
    parquet.write_table(Table.from_pydict(columns), path, row_group_size=10)
    rows = ParquetRows(str(path))
    assert len(rows) == 25
    assert [rows.read_record(i) for i in range(25)] == RECORDS
    assert [rows.read_record(i) for i in (24, 0, 3)] == [RECORDS[i] for i in (24, 0, 3)]
    with pytest.raises(IndexError):
        rows.read_record(25)


def test_a_pickled_file_opens_again_and_so_does_a_closed_one(path: Path) -> None:
    rows = ParquetRows(str(path))
    rows.read_record(12)
    copy = pickle.loads(pickle.dumps(rows))
    rows.close()
    assert rows.read_record(5) == copy.read_record(5) == RECORDS[5]


def test_what_is_no_parquet_file_is_named(tmp_path: Path) -> None:
    from pyarrow import parquet, schema, string

    file = tmp_path / "x.parquet"
    for content in (b"", b"not a table", b"PAR1" + b"\x00" * 20 + b"PAR1"):
        file.write_bytes(content)
        with pytest.raises(DataError) as error:
            ParquetRows(str(file))
        assert str(error.value).startswith(f"{file}: not a parquet file")
        assert "\n" not in str(error.value)
    parquet.write_table(schema([("text", string())]).empty_table(), file)
    with pytest.raises(DataError, match="the file has no rows"):
        ParquetRows(str(file))
