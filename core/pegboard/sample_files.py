"""How tokenized samples lie in files: the columns of a store, and the part files it is made of.

A store has one flat file per column, so that a reader maps it and copies nothing. It is put together
from parts, one file per span of records: blocks of columns, then a JSON footer with counts and a
checksum. Both depend on the records alone, never on who wrote them or when.
"""

from __future__ import annotations

import json
import os
import struct
import uuid
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pegboard.errors import DataError

__all__ = [
    "FORMAT_VERSION",
    "KEY_DTYPE",
    "BadRecord",
    "Block",
    "DamagedPart",
    "PartSummary",
    "PartWriter",
    "read_part",
    "read_summary",
]

FORMAT_VERSION = 2
KEY_DTYPE = np.dtype([("line", "<i8"), ("file", "<i4"), ("part", "<i4")])
_BLOCK_TOKENS = 1 << 20
"""Tokens that a writer holds in memory."""
_HEAD = struct.Struct("<4q")
_TAIL = struct.Struct("<qI8s")
_MAGIC = b"PEGPART2"


class DamagedPart(DataError):
    """A part file that is not whole, as after a power cut; it can be made again."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path}: damaged part of a token store; delete the file and start again")
        self.path = path

    def __reduce__(self) -> tuple[type[DamagedPart], tuple[Path]]:
        return DamagedPart, (self.path,)


class BadRecord(NamedTuple):
    """A record that can't be used."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class Block(NamedTuple):
    """Columns of some samples."""

    lengths: np.ndarray
    """(num_samples,) int32 tokens of each sample."""
    targets: np.ndarray
    """(num_samples,) int32 supervised tokens of each; not its first, which nothing predicts."""
    tiles: np.ndarray
    """(num_samples,) int32 vision tiles of each."""
    detail_lengths: np.ndarray
    """(num_samples,) int32 bytes of each sample's details; 0 without."""
    keys: np.ndarray
    """(num_samples,) KEY_DTYPE; `file` counts in the list of files."""
    ids: np.ndarray
    """(num_tokens,) int32."""
    mask: np.ndarray
    """(num_tokens,) uint8, 0 or 1."""
    details: np.ndarray
    """(num_bytes,) uint8: JSON texts of media and extras."""


@dataclass
class PartSummary:
    """What a part says of itself."""

    num_records: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    num_tiles: int = 0
    detail_bytes: int = 0
    files: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    bad: list[BadRecord] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "dropped": dict(self.dropped), "events": dict(self.events)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PartSummary:
        values = dict(data)
        values["dropped"] = Counter(values["dropped"])
        values["events"] = Counter(values["events"])
        values["bad"] = [BadRecord(*row) for row in values["bad"]]
        return cls(**values)


class PartWriter:
    """Writes one part beside its place and puts it there by rename.

    Args:
        path: of the part; it appears there whole, by `commit`.
    """

    def __init__(self, path: Path) -> None:
        self.summary = PartSummary()
        self._path = path
        self._draft = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.new")
        self._file: BinaryIO = self._draft.open("wb")
        self._crc = 0
        self._files: dict[str, int] = {}
        self._start_block()

    def add(
        self,
        ids: np.ndarray,
        mask: np.ndarray,
        key: tuple[str, int, int],
        tiles: int = 0,
        details: bytes = b"",
    ) -> None:
        """Append a sample.

        Args:
            ids: (T,) int32, T at least 1.
            mask: (T,) bool.
            key: file, line and part of its record.
            tiles: vision tiles.
            details: JSON text of media and extras.
        """
        file, line, part = key
        self._lengths.append(len(ids))
        self._targets.append(int(np.count_nonzero(mask[1:])))
        self._tiles.append(tiles)
        self._detail_lengths.append(len(details))
        self._keys.append((line, self._files.setdefault(file, len(self._files)), part))
        self._ids.append(ids)
        self._mask.append(mask)
        self._details.append(details)
        self._num_tokens += len(ids)
        if self._num_tokens >= _BLOCK_TOKENS:
            self._write_block()

    def name_files(self, files: Sequence[str]) -> None:
        """Say what the numbers of files in `write_columns` mean; `add` does this by itself."""
        for file in files:
            self._files.setdefault(file, len(self._files))

    def write_columns(self, columns: Sequence[np.ndarray], details: bytes) -> None:
        """Write samples as the columns of a `Block`, `details` apart."""
        lengths, targets, tiles = columns[0], columns[1], columns[2]
        num_tokens = int(lengths.sum())
        self._write(_HEAD.pack(len(lengths), num_tokens, len(details), 0))
        for column in columns:
            self._write(column.tobytes())
        self._write(details)
        self.summary.num_samples += len(lengths)
        self.summary.num_tokens += num_tokens
        self.summary.num_supervised += int(targets.sum())
        self.summary.num_tiles += int(tiles.sum())
        self.summary.detail_bytes += len(details)

    def commit(self) -> None:
        """Finish the file and give it its name."""
        self._write_block()
        self.summary.files = list(self._files)
        footer = json.dumps(self.summary.to_json()).encode("utf-8", "surrogatepass")
        self._crc = zlib.crc32(footer, self._crc)
        self._file.write(footer)
        self._file.write(_TAIL.pack(len(footer), self._crc, _MAGIC))
        self._file.close()
        os.replace(self._draft, self._path)

    def discard(self) -> None:
        """Leave nothing behind; after `commit` it does nothing."""
        self._file.close()
        self._draft.unlink(missing_ok=True)

    def _start_block(self) -> None:
        self._num_tokens = 0
        self._lengths: list[int] = []
        self._targets: list[int] = []
        self._tiles: list[int] = []
        self._detail_lengths: list[int] = []
        self._keys: list[tuple[int, int, int]] = []
        self._ids: list[np.ndarray] = []
        self._mask: list[np.ndarray] = []
        self._details: list[bytes] = []

    def _write_block(self) -> None:
        if not self._lengths:
            return
        details = b"".join(self._details)
        columns = [
            np.array(self._lengths, dtype="<i4"),
            np.array(self._targets, dtype="<i4"),
            np.array(self._tiles, dtype="<i4"),
            np.array(self._detail_lengths, dtype="<i4"),
            np.array(self._keys, dtype=KEY_DTYPE),
            np.concatenate(self._ids).astype("<i4", copy=False),
            np.concatenate(self._mask).view(np.uint8),
        ]
        self.write_columns(columns, details)
        self._start_block()

    def _write(self, data: bytes) -> None:
        self._crc = zlib.crc32(data, self._crc)
        self._file.write(data)


def read_summary(path: Path) -> PartSummary:
    """The footer alone; DamagedPart if the file is not whole."""
    with path.open("rb") as file:
        return _read_footer(file, path)[0]


def read_part(path: Path) -> Iterator[Block]:
    """The blocks of a part, each mapped into memory once; DamagedPart if a byte of it changed."""
    with path.open("rb") as file:
        _, end, expected = _read_footer(file, path)
        size = os.fstat(file.fileno()).st_size
        file.seek(0)
        crc = 0
        while file.tell() < end:
            raw = file.read(_HEAD.size)
            crc = zlib.crc32(raw, crc)
            num_samples, num_tokens, num_details, _ = _HEAD.unpack(raw)
            columns = []
            for dtype, count in (
                *((np.dtype("<i4"), num_samples),) * 4,
                (KEY_DTYPE, num_samples),
                (np.dtype("<i4"), num_tokens),
                (np.dtype(np.uint8), num_tokens),
                (np.dtype(np.uint8), num_details),
            ):
                if count < 0 or file.tell() + count * dtype.itemsize > end:
                    raise DamagedPart(path)
                raw = file.read(count * dtype.itemsize)
                crc = zlib.crc32(raw, crc)
                columns.append(np.frombuffer(raw, dtype=dtype))
            yield Block(*columns)
        footer = file.read(size - _TAIL.size - end)
        if zlib.crc32(footer, crc) != expected:
            raise DamagedPart(path)


def _read_footer(file: BinaryIO, path: Path) -> tuple[PartSummary, int, int]:
    """(summary, where the blocks end, checksum)."""
    size = os.fstat(file.fileno()).st_size
    if size < _TAIL.size:
        raise DamagedPart(path)
    file.seek(size - _TAIL.size)
    length, crc, magic = _TAIL.unpack(file.read(_TAIL.size))
    start = size - _TAIL.size - length
    if magic != _MAGIC or length < 0 or start < 0:
        raise DamagedPart(path)
    file.seek(start)
    try:
        summary = PartSummary.from_json(
            json.loads(file.read(length).decode("utf-8", "surrogatepass"))
        )
    except (ValueError, KeyError, TypeError):
        raise DamagedPart(path) from None
    return summary, start, crc
