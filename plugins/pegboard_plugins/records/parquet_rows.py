"""Rows of a parquet file by number.

Row groups are the unit of reading: the last one read is kept, so that reading in order reads each
once. A field that is null is left out of the record, because a table has a null wherever another row
has a field, and a record of JSON would not have the key.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from pegboard.errors import DataError
from pegboard_plugins.records.file_kinds import missing_package

if TYPE_CHECKING:
    from pyarrow import Table
    from pyarrow.parquet import ParquetFile

__all__ = ["ParquetRows"]


class ParquetRows:
    """Rows of one file as records; the same methods as `LineIndex`, less the bytes.

    Raises:
        DataError: pyarrow is not installed, or the file is none or has no rows.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._file: ParquetFile | None = None
        self._group: tuple[int, Table] | None = None
        metadata = self._opened().metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._ends = np.cumsum([0, *sizes])[1:]
        if not metadata.num_rows:
            raise DataError(f"{path}: the file has no rows")
        self.close()  # a folder may hold more files than a process may have open

    def __len__(self) -> int:
        return int(self._ends[-1])

    def place_of(self, index: int) -> dict[str, str | int]:
        """Where row `index` (from 0) is: `file` and `row`."""
        return {"file": os.path.abspath(self.path), "row": index}

    def read_record(self, index: int) -> dict[str, Any]:
        """Row `index` (from 0) as an object of plain values; DataError starts with `file:row:`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        from pyarrow import ArrowException

        place = f"{self.path}:{index + 1}"
        number = int(np.searchsorted(self._ends, index, side="right"))
        if self._group is None or self._group[0] != number:
            self._group = None  # before the next is read: two may not fit
            try:
                self._group = (number, self._opened().read_row_group(number))
            except (OSError, ArrowException) as error:
                raise DataError(f"{place}: can't read row group {number}: {error}") from error
        first = int(self._ends[number - 1]) if number else 0
        try:
            (row,) = self._group[1].slice(index - first, 1).to_pylist()
        except (ValueError, ArithmeticError, LookupError, ArrowException) as error:
            # Nothing in the file says that a string is UTF-8, or a time one that Python has.
            raise DataError(f"{place}: a value of the row can't be read: {error}") from error
        return {key: _without_nulls(value) for key, value in row.items() if value is not None}

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        if self._file is not None:
            self._file.close()
        self._file = self._group = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_group": None}

    def _opened(self) -> ParquetFile:
        if self._file is None:
            if (problem := missing_package(self.path)) is not None:
                raise DataError(f"{self.path}: {problem}")
            from pyarrow import ArrowException
            from pyarrow.parquet import ParquetFile

            try:
                self._file = ParquetFile(self.path, memory_map=True)
            except (OSError, ArrowException) as error:
                line = " ".join(str(error).split())
                raise DataError(f"{self.path}: not a parquet file: {line}") from error
        return self._file


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
