"""Records of several files as one sequence: JSON lines, compressed or not, and parquet.

Record numbers run through the files in order. A few files stay open at a time, so a folder of
thousands of shards does not run out of file descriptors.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from pegboard import DataError, SampleKey
from pegboard_plugins.records.compressed_lines import CompressedLines
from pegboard_plugins.records.line_index import LineIndex
from pegboard_plugins.records.parquet_rows import ParquetRows

__all__ = ["JsonlRecords"]

_MAX_OPEN_FILES = 32


class _RecordFile(Protocol):
    path: str

    def __len__(self) -> int: ...

    def read_record(self, index: int) -> dict[str, Any]: ...

    def close(self) -> None: ...


class JsonlRecords:
    """The built dataset: records by index, read when asked for; pickles.

    Args:
        name: the dataset's name in the config, for sample keys.
        files: paths, in the order that records are numbered.
        anno_path: what the config said, for messages.
        max_records: keep only this many from the start.
        media_root: folder of relative media paths, for whoever reads the media; None means the
            current folder.
        unpack_dir: folder of unpacked compressed files.

    Raises:
        DataError: no file, or one that is empty or can't be read.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[str],
        *,
        anno_path: str = "",
        max_records: int | None = None,
        media_root: str | None = None,
        unpack_dir: str = "",
    ) -> None:
        if not files:
            raise DataError(f"{anno_path}: dataset {name!r} found no file of records there")
        self.name = name
        self.media_root = media_root
        self._indices = tuple(_open_records(path, unpack_dir) for path in files)
        self._ends = np.cumsum([len(index) for index in self._indices])
        self._num_records = min(int(self._ends[-1]), max_records or int(self._ends[-1]))
        self._open: OrderedDict[int, None] = OrderedDict()
        state = [(path, (stat := os.stat(path)).st_size, stat.st_mtime_ns) for path in files]
        text = json.dumps([state, self._num_records, media_root])
        self._fingerprint = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def __len__(self) -> int:
        return self._num_records

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, line = self._locate(index)
        self._open[file] = None
        self._open.move_to_end(file)
        if len(self._open) > _MAX_OPEN_FILES:
            self._indices[self._open.popitem(last=False)[0]].close()
        return self._indices[file].read_record(line)

    def key(self, index: int) -> SampleKey:
        file, line = self._locate(index)
        return SampleKey(self.name, self._indices[file].path, line + 1)

    def fingerprint(self) -> str:
        return self._fingerprint

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < self._num_records:
            raise IndexError(index)
        file = int(np.searchsorted(self._ends, index, side="right"))
        return file, index - (int(self._ends[file - 1]) if file else 0)


def _open_records(path: str, unpack_dir: str) -> _RecordFile:
    if path.endswith(".parquet"):
        return ParquetRows(path)
    if path.endswith((".gz", ".zst")):
        return CompressedLines(path, unpack_dir)
    return LineIndex(path)
