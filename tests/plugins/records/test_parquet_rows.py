"""Rows of a parquet file are the records they were, in any order."""

from __future__ import annotations

import os
import pickle
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
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


def test_a_value_that_python_can_not_hold_is_a_bad_row_and_the_others_are_read(
    tmp_path: Path,
) -> None:
    from pyarrow import Array, Table, parquet, py_buffer, string, timestamp

    ends = py_buffer(np.array([0, 2, 5], dtype="<i4"))
    texts = Array.from_buffers(string(), 2, [None, ends, py_buffer(b"ok\xffno")])
    times = pyarrow.array([0, 2**62], timestamp("us"))
    for name, column, problem in (
        ("text.parquet", texts, "can't decode byte 0xff"),
        ("time.parquet", times, "out of range"),
    ):
        parquet.write_table(Table.from_pydict({"value": column}), tmp_path / name)
        rows = ParquetRows(str(tmp_path / name))
        assert rows.read_record(0)["value"] in ("ok", datetime(1970, 1, 1))
        place = f"{tmp_path}/{name}:2: a value of the row can't be read: "
        with pytest.raises(DataError, match=f"^{re.escape(place)}.*{problem}"):
            rows.read_record(1)


def test_a_file_that_is_not_read_is_not_kept_open(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    files = [ParquetRows(str(path)) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) < before + 20
    assert [file.read_record(5) for file in files] == [RECORDS[5]] * 20


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
