"""Random access to the JSON lines of a file.

The file is scanned once for newlines, in ranges of bytes that threads share (numpy; no parsing, no
copy of the file), which gives one int64 offset per line; a line is then one `pread`. A pickled index
carries its offsets and opens the file again.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from typing import Any

import numpy as np
from pydantic_core import from_json

from pegboard import DataError

__all__ = ["LineIndex", "num_index_threads", "parse_json_line"]

_BLOCK_BYTES = 1 << 20
"""Read at a time, so that a block and what is found in it stay in the cache."""
_RANGE_BYTES = 64 << 20
"""Scanned as one task."""
_MAX_THREADS = 8
_BOM = b"\xef\xbb\xbf"


class LineIndex:
    """Lines of one file by number.

    CRLF, a BOM, blank lines at the end and a missing last newline are fine.

    Args:
        path: a file; opened now to be scanned, and again at the first read.
        num_threads: that scan it together; None: as many as there are cores, at most 8.

    Raises:
        DataError: the file can't be read, or holds no line that isn't blank.
    """

    def __init__(self, path: str, *, num_threads: int | None = None) -> None:
        self.path = path
        try:
            with open(path, "rb", buffering=0) as file:
                self.offsets = _line_offsets(file, num_threads or num_index_threads())
        except OSError as error:
            raise DataError(f"{path}: can't read the file: {error.strerror or error}") from error
        if len(self.offsets) == 1:
            raise DataError(f"{path}:1: the file is empty, expected one JSON object per line")
        self._file: FileIO | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def read_bytes(self, index: int) -> bytes:
        """Line `index` (from 0) as it is in the file, its line end included."""
        if not 0 <= index < len(self.offsets) - 1:
            raise IndexError(index)
        start, end = self.offsets[index : index + 2].tolist()
        try:
            if self._file is None:
                self._file = FileIO(self.path, "rb")
            raw = os.pread(self._file.fileno(), end - start, start)
        except OSError as error:
            place = f"{self.path}:{index + 1}"
            raise DataError(f"{place}: can't read the file: {error.strerror or error}") from error
        if len(raw) != end - start:
            raise DataError(
                f"{self.path}:{index + 1}: the file became shorter after it was indexed; "
                "start again"
            )
        return raw

    def place_of(self, index: int) -> dict[str, str | int]:
        """Where the bytes of line `index` (from 0) are: `file`, and `start` and `end` in it."""
        start, end = self.offsets[index : index + 2].tolist()
        return {"file": os.path.abspath(self.path), "start": start, "end": end}

    def read_record(self, index: int) -> dict[str, Any]:
        """Line `index` (from 0) as a JSON object; DataError starts with `file:line:`."""
        return parse_json_line(self.read_bytes(index), f"{self.path}:{index + 1}")

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "offsets": self.offsets, "_file": None}


def num_index_threads() -> int:
    """Threads that scan files together: as many as there are cores, at most 8."""
    return max(1, min(_MAX_THREADS, len(os.sched_getaffinity(0))))


def parse_json_line(raw: bytes, place: str) -> dict[str, Any]:
    """One line -> its JSON object; DataError starts with `place` for anything else.

    A bare list of messages is the object `{"messages": [...]}`.
    """
    try:
        # Several times as fast as json; it refuses all that json refuses, and lone surrogates.
        record = from_json(raw)
    except ValueError:
        record = _parse_carefully(raw, place)
    if not isinstance(record, dict):
        if isinstance(record, list) and record:
            if isinstance(record[0], dict) and "role" in record[0]:
                return {"messages": record}
        kind = type(record).__name__
        raise DataError(f"{place}: found a JSON {kind}, expected an object")
    return record


def _parse_carefully(raw: bytes, place: str) -> Any:
    """With the standard library: what is wrong in its words, or a value that the fast way refuses."""
    if not raw.strip():
        raise DataError(f"{place}: blank line, expected a JSON object; remove the line")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8"
        ) from None
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: invalid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: JSON that can't be read: {error}") from None
    # NOTE: json accepts "\ud800" alone, which no tokenizer can encode. Only an escape can make one.
    if b"\\u" in raw:
        try:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(
                f"{place}: a lone surrogate escape (\\ud800 to \\udfff) is not text; remove it"
            ) from None
    return record


def _line_offsets(file: FileIO, num_threads: int) -> np.ndarray:
    """(num_lines+1,) int64 line starts, and the last end; blank lines at the end left out."""
    size = os.fstat(file.fileno()).st_size
    first = len(_BOM) if os.pread(file.fileno(), len(_BOM), 0) == _BOM else 0
    starts = range(0, size, _RANGE_BYTES)
    if num_threads == 1 or len(starts) < 2:
        found = [_line_ends(file, start, min(start + _RANGE_BYTES, size)) for start in starts]
    else:
        with ThreadPoolExecutor(num_threads, thread_name_prefix="pegboard-index") as threads:
            tasks = [
                threads.submit(_line_ends, file, start, min(start + _RANGE_BYTES, size))
                for start in starts
            ]
            found = [task.result() for task in tasks]
    last_end = next((int(ends[-1]) for ends in reversed(found) if len(ends)), 0)
    if last_end < size and size > first:
        found.append(np.array([size], dtype=np.int64))
    offsets = np.concatenate([np.array([first], dtype=np.int64), *found])
    num_lines = len(offsets) - 1
    while num_lines and not _read_stripped(
        file, int(offsets[num_lines - 1]), int(offsets[num_lines])
    ):
        num_lines -= 1
    return offsets[: num_lines + 1]


def _line_ends(file: FileIO, start: int, stop: int) -> np.ndarray:
    """int64 places behind each newline of a range of bytes."""
    buffer = bytearray(_BLOCK_BYTES)
    block = np.frombuffer(buffer, dtype=np.uint8)
    is_newline = np.empty(_BLOCK_BYTES, dtype=np.bool_)
    found = [np.empty(0, dtype=np.int64)]
    while start < stop:
        wanted = memoryview(buffer)[: min(stop - start, _BLOCK_BYTES)]
        count = os.preadv(file.fileno(), [wanted], start)
        if not count:
            break  # it became shorter just now; reading a line says so
        np.equal(block, 0x0A, out=is_newline)
        found.append(np.flatnonzero(is_newline[:count]) + (start + 1))
        start += count
    return np.concatenate(found)


def _read_stripped(file: FileIO, start: int, end: int) -> bytes:
    """A stripped start of the line, enough to tell whether it is blank."""
    while start < end:
        part = os.pread(file.fileno(), min(4096, end - start), start)
        if not part or part.strip():
            return part.strip()
        start += len(part)
    return b""
