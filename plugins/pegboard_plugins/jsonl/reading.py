"""Records of several files as one sequence: JSON lines, compressed or not, and parquet.

Record numbers run through the files in order. Files are scanned when the first record is asked for:
what is prepared already needs no index. A few stay open at a time, so a folder of thousands of shards
does not run out of file descriptors.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np

from pegboard import DataError, SampleKey
from pegboard_plugins.records.compressed_lines import CompressedLines
from pegboard_plugins.records.json_array import is_json_array
from pegboard_plugins.records.line_index import LineIndex, num_index_threads
from pegboard_plugins.records.parquet_rows import ParquetRows

__all__ = ["JsonlRecords"]

_MAX_OPEN_FILES = 32


class _RecordFile(Protocol):
    path: str

    def __len__(self) -> int: ...

    def place_of(self, index: int) -> dict[str, str | int]: ...

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

    Attributes:
        data_files: the files that the records come from; their content is part of what names
            prepared data.

    Raises:
        DataError: no file, or one that is not there; by the first use of its records, one that is
            empty or can't be read.
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
        self.data_files = tuple(files)
        self._unpack_dir = unpack_dir
        self._max_records = max_records
        self._opened: _Opened | None = None
        self._recent: OrderedDict[int, None] = OrderedDict()
        try:
            state = [(path, (stat := os.stat(path)).st_size, stat.st_mtime_ns) for path in files]
        except OSError as error:
            raise DataError(
                f"{error.filename}: can't read the file: {error.strerror or error}"
            ) from error
        # Lists were refused once, and what was prepared then says so.
        lists = ["lists"] if any(path.endswith(".json") for path in files) else []
        text = json.dumps([state, max_records, media_root, *lists])
        self._fingerprint = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def __len__(self) -> int:
        return self._files().num_records

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, line = self._locate(index)
        self._recent[file] = None
        self._recent.move_to_end(file)
        files = self._files().files
        if len(self._recent) > _MAX_OPEN_FILES:
            files[self._recent.popitem(last=False)[0]].close()
        return files[file].read_record(line)

    def key(self, index: int) -> SampleKey:
        file, line = self._locate(index)
        return SampleKey(self.name, self.data_files[file], line + 1)

    def fingerprint(self) -> str:
        return self._fingerprint

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recent": OrderedDict()}

    def _files(self) -> _Opened:
        if self._opened is None:
            files = _open_all(self.data_files, self._unpack_dir)
            ends = np.cumsum([len(file) for file in files])
            total = int(ends[-1])
            self._opened = _Opened(files, ends, min(total, self._max_records or total))
        return self._opened

    def _locate(self, index: int) -> tuple[int, int]:
        opened = self._files()
        if not 0 <= index < opened.num_records:
            raise IndexError(index)
        file = int(np.searchsorted(opened.ends, index, side="right"))
        return file, index - (int(opened.ends[file - 1]) if file else 0)


class _Opened(NamedTuple):
    """What scanning the files gave."""

    files: tuple[_RecordFile, ...]
    ends: np.ndarray
    """(num_files,) int64 number of the first record behind each file."""
    num_records: int


def _open_all(paths: Sequence[str], unpack_dir: str) -> tuple[_RecordFile, ...]:
    """Many files are shared by threads; of a single one, a line index shares the ranges of bytes."""
    if len(paths) == 1:
        return (_open_records(paths[0], unpack_dir, None),)
    with ThreadPoolExecutor(num_index_threads(), thread_name_prefix="pegboard-index") as threads:
        return tuple(threads.map(lambda path: _open_records(path, unpack_dir, 1), paths))


def _open_records(path: str, unpack_dir: str, num_threads: int | None) -> _RecordFile:
    if path.endswith(".parquet"):
        return ParquetRows(path)
    if path.endswith((".gz", ".zst")) or is_json_array(path):
        return CompressedLines(path, unpack_dir)
    return LineIndex(path, num_threads=num_threads)
