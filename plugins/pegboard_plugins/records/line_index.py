"""Random access to the JSON lines of a file.

The file is scanned once in blocks of 4 MiB for newlines (numpy; no parsing, no copy of the file),
which gives one int64 offset per line; a line is then one `pread`. A pickled index carries its
offsets and opens the file again.
"""

from __future__ import annotations

import json
import os
from io import FileIO
from typing import Any

import numpy as np

from pegboard import DataError

__all__ = ["LineIndex", "parse_json_line"]

_BLOCK_BYTES = 4 << 20
_BOM = b"\xef\xbb\xbf"


class LineIndex:
    """Lines of one file by number.

    CRLF, a BOM, blank lines at the end and a missing last newline are fine.

    Args:
        path: a file; opened now to be scanned, and again at the first read.

    Raises:
        DataError: the file can't be read, or holds no line that isn't blank.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            with open(path, "rb", buffering=0) as file:
                self.offsets = _line_offsets(file)
        except OSError as error:
            raise DataError(f"{path}: can't read the file: {error.strerror or error}") from error
        if len(self.offsets) == 1:
            raise DataError(f"{path}:1: the file is empty, expected one JSON object per line")
        self._file: FileIO | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def read_bytes(self, index: int) -> bytes:
        """Line `index` (from 0) as it is in the file, its line end included."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
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


def parse_json_line(raw: bytes, place: str) -> dict[str, Any]:
    """One line -> its JSON object; DataError starts with `place` for anything else."""
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
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise DataError(f"{place}: found a JSON {kind}, expected an object")
    # NOTE: json accepts "\ud800" alone, which no tokenizer can encode. Only an escape can make one.
    if b"\\u" in raw:
        try:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(
                f"{place}: a lone surrogate escape (\\ud800 to \\udfff) is not text; remove it"
            ) from None
    return record


def _line_offsets(file: FileIO) -> np.ndarray:
    """(num_lines+1,) int64 line starts, and the last end; blank lines at the end left out."""
    buffer = bytearray(_BLOCK_BYTES)
    view = np.frombuffer(buffer, dtype=np.uint8)
    found: list[np.ndarray] = []
    size, first = 0, 0
    last_is_newline = True
    while count := file.readinto(buffer):
        if size == 0 and buffer.startswith(_BOM):
            first = len(_BOM)
        found.append(np.flatnonzero(view[:count] == 0x0A) + (size + 1))
        last_is_newline = buffer[count - 1] == 0x0A
        size += count
    if not last_is_newline and size > first:
        found.append(np.array([size], dtype=np.int64))
    offsets = np.concatenate([np.array([first], dtype=np.int64), *found])
    num_lines = len(offsets) - 1
    while num_lines and not _read_stripped(
        file, int(offsets[num_lines - 1]), int(offsets[num_lines])
    ):
        num_lines -= 1
    return offsets[: num_lines + 1]


def _read_stripped(file: FileIO, start: int, end: int) -> bytes:
    """A stripped start of the line, enough to tell whether it is blank."""
    while start < end:
        part = os.pread(file.fileno(), min(4096, end - start), start)
        if not part or part.strip():
            return part.strip()
        start += len(part)
    return b""
