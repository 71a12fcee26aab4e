"""Tokenized samples on disk: written once, memory-mapped by every rank.

A store is a folder of flat files, one per column, and `meta.json` with counts, sizes and checksums.
It is written under another name and renamed when complete, so one that exists is whole; nothing in it
depends on who wrote it or when. Opening it reads `meta.json` and maps the rest: no copy in RAM.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pegboard.contracts import Example, SampleKey
from pegboard.errors import DataError
from pegboard.sample_files import FORMAT_VERSION, KEY_DTYPE, BadRecord, read_part, read_summary

__all__ = [
    "META_FILE",
    "USED_FILE",
    "TokenStore",
    "damaged_files",
    "open_store",
    "write_store",
]

META_FILE = "meta.json"
USED_FILE = "last_used"
"""Its time of change says when the store was last opened; empty."""
MAX_LISTED_BAD_RECORDS = 1000
_BAD_RECORDS_FILE = "bad_records.jsonl"
_COLUMNS: Mapping[str, np.dtype[Any]] = {
    "ids": np.dtype("<i4"),
    "mask": np.dtype(np.uint8),
    "lengths": np.dtype("<i4"),
    "targets": np.dtype("<i4"),
    "offsets": np.dtype("<i8"),
    "keys": KEY_DTYPE,
    "tiles": np.dtype("<i4"),
    "details": np.dtype(np.uint8),
    "detail_offsets": np.dtype("<i8"),
}
_PLACES = ("keys.bin", _BAD_RECORDS_FILE)
"""Files that say where records stand, not what they say."""
_OPTIONAL = ("tiles", "details", "detail_offsets")
"""Columns that a store of plain text does not have."""


class TokenStore:
    """An immutable sequence of tokenized samples; open it with `open_store`. Pickles as its folder.

    Attributes:
        folder: where it lives.
        name: the dataset's name in the config, for sample keys.
        meta: what `meta.json` says: `fingerprint`, `num_records`, `num_samples`, `num_tokens`,
            `num_supervised` (tokens that are predicted), `dropped` (count by reason), `num_bad` and
            `bad_records` (messages, at most 1000), `events` (the tokenize function's counts).
        lengths: (num_samples,) int32 tokens of each sample, mapped.
        num_targets: (num_samples,) int32 supervised tokens of each sample, mapped; not its first,
            which nothing predicts.
        num_tiles: (num_samples,) int32 vision tiles of each sample, mapped; None if there are none.
    """

    def __init__(self, folder: Path, meta: Mapping[str, Any], name: str) -> None:
        self.folder = folder
        self.name = name
        self.meta = meta
        columns = {
            column: np.asarray(np.memmap(folder / f"{column}.bin", dtype=dtype, mode="r"))
            for column, dtype in _COLUMNS.items()
            if f"{column}.bin" in meta["files"]
        }
        self.lengths = columns["lengths"]
        self.num_targets = columns["targets"]
        self.num_tiles: np.ndarray | None = columns.get("tiles")
        self._ids = columns["ids"]
        self._mask = columns["mask"].view(np.bool_)
        self._offsets = columns["offsets"]
        self._keys = columns["keys"]
        self._details = columns.get("details")
        self._detail_offsets = columns.get("detail_offsets")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        """Sample `index`; its arrays are read-only views of the files."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, end = self._offsets[index : index + 2].tolist()
        example = Example(
            input_ids=self._ids[start:end], loss_mask=self._mask[start:end], key=self.key(index)
        )
        if self._details is not None and self._detail_offsets is not None:
            start, end = self._detail_offsets[index : index + 2].tolist()
            if end > start:
                details = json.loads(self._details[start:end].tobytes())
                example.media, example.extras = details.get("media", {}), details.get("extras", {})
        if self.num_tiles is not None:
            example.num_tiles = int(self.num_tiles[index])
        return example

    def key(self, index: int) -> SampleKey:
        """Where sample `index` comes from."""
        line, file, part = self._keys[index].tolist()
        return SampleKey(self.name, self.meta["data_files"][file], line, part)

    def content_identity(self) -> str:
        """Changes with the samples, whatever the data's files are called and wherever they lie."""
        files = self.meta["files"]
        samples = {name: check for name, check in files.items() if name not in _PLACES}
        counts = [self.meta[name] for name in ("num_samples", "num_tokens", "num_supervised")]
        text = json.dumps([FORMAT_VERSION, samples, counts], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def bad_records(self) -> Iterable[BadRecord]:
        """Every record that could not be used, in the order of the data."""
        with (
            suppress(FileNotFoundError),
            open(self.folder / _BAD_RECORDS_FILE, encoding="utf-8") as file,
        ):
            for line in file:
                yield BadRecord(*json.loads(line))

    def __reduce__(self) -> tuple[Callable[[Path, str], TokenStore], tuple[Path, str]]:
        return open_store, (self.folder, self.name)


def open_store(folder: str | Path, name: str | None = None) -> TokenStore:
    """The store in `folder`; DataError if there is none, or a damaged or foreign one.

    Args:
        name: of the dataset, for sample keys; None: the folder's name.
    """
    folder = Path(folder)
    try:
        meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{folder}: no token store there ({META_FILE} is missing); delete the folder"
        ) from None
    except ValueError as error:
        raise DataError(f"{folder}: {META_FILE} is damaged ({error}); delete the folder") from None
    version = meta.get("format_version") if isinstance(meta, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{folder}: token store of format {version}, expected {FORMAT_VERSION}; "
            "delete the folder"
        )
    for file, (expected, _) in meta["files"].items():
        path = folder / file
        found = path.stat().st_size if path.exists() else None
        if found != expected:
            raise DataError(
                f"{path}: {found} bytes, expected {expected}; delete the folder {folder}"
            )
    try:
        return TokenStore(folder, meta, folder.name if name is None else name)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: damaged ({error}); delete the folder") from error


def damaged_files(folder: Path) -> list[str]:
    """Files of a store whose bytes are not what was written; reads all of it.

    Raises:
        DataError: as `open_store`.
    """
    store = open_store(folder)
    wrong = []
    for file, (_, expected) in store.meta["files"].items():
        crc = 0
        with open(folder / file, "rb") as opened:
            while data := opened.read(1 << 22):
                crc = zlib.crc32(data, crc)
        if crc != expected:
            wrong.append(file)
    return wrong


def write_store(folder: Path, parts: Sequence[Path], fingerprint: str) -> None:
    """Put parts together, in order, in an empty folder; `meta.json` comes last.

    Raises:
        DataError: a part is damaged.
    """
    counts = _Totals()
    for part in parts:
        counts.add(part)
    with ExitStack() as stack:
        files = _Files(folder, stack, counts)
        for part, file_numbers in zip(parts, counts.file_numbers, strict=True):
            for block in read_part(part):
                files.append(block._asdict(), file_numbers)
        checks = files.finish()
    (folder / USED_FILE).touch()
    meta = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "num_records": counts.num_records,
        "num_samples": counts.num_samples,
        "num_tokens": counts.num_tokens,
        "num_supervised": counts.num_supervised,
        "num_tiles": counts.num_tiles,
        "dropped": dict(sorted(counts.dropped.items())),
        "events": dict(sorted(counts.events.items())),
        "num_bad": counts.num_bad,
        "bad_records": [str(record) for record in counts.bad],
        "data_files": list(counts.data_files),
        "files": checks,
    }
    with open(folder / META_FILE, "w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


class _Totals:
    """Sums over the footers of parts."""

    def __init__(self) -> None:
        self.num_records = self.num_samples = self.num_tokens = 0
        self.num_supervised = self.num_tiles = self.detail_bytes = self.num_bad = 0
        self.dropped: Counter[str] = Counter()
        self.events: Counter[str] = Counter()
        self.bad: list[BadRecord] = []
        self.data_files: dict[str, int] = {}
        self.file_numbers: list[np.ndarray] = []
        """Of each part: its numbers of files -> the store's."""
        self.parts: list[Path] = []

    def add(self, path: Path) -> None:
        part = read_summary(path)
        self.num_records += part.num_records
        self.num_samples += part.num_samples
        self.num_tokens += part.num_tokens
        self.num_supervised += part.num_supervised
        self.num_tiles += part.num_tiles
        self.detail_bytes += part.detail_bytes
        self.num_bad += len(part.bad)
        self.bad += part.bad[: MAX_LISTED_BAD_RECORDS - len(self.bad)]
        self.dropped.update(part.dropped)
        self.events.update(part.events)
        numbers = [self.data_files.setdefault(file, len(self.data_files)) for file in part.files]
        self.file_numbers.append(np.array(numbers, dtype="<i4"))
        self.parts.append(path)


class _Files:
    """The columns of a store being written, with the checksum of each."""

    def __init__(self, folder: Path, stack: ExitStack, totals: _Totals) -> None:
        columns = [name for name in _COLUMNS if name not in _OPTIONAL]
        if totals.num_tiles:
            columns.append("tiles")
        if totals.detail_bytes:
            columns += ["details", "detail_offsets"]
        names = [f"{column}.bin" for column in columns]
        if totals.num_bad:
            names.append(_BAD_RECORDS_FILE)
        self._files: dict[str, BinaryIO] = {
            name: stack.enter_context(open(folder / name, "wb")) for name in names
        }
        self._checks = {name: [0, 0] for name in names}
        self._ends = {"offsets": 0, "detail_offsets": 0}
        for column in self._ends:
            self._write(f"{column}.bin", np.zeros(1, dtype="<i8"))
        if totals.num_bad:
            for path in totals.parts:
                for record in read_summary(path).bad:
                    self._write_bytes(_BAD_RECORDS_FILE, f"{json.dumps(record)}\n".encode())

    def append(self, block: dict[str, np.ndarray], file_numbers: np.ndarray) -> None:
        """A block's columns behind the ones before."""
        keys = block["keys"].copy()
        keys["file"] = file_numbers[keys["file"]]
        for column in ("ids", "mask", "lengths", "targets", "tiles", "details"):
            self._write(f"{column}.bin", block[column])
        self._write("keys.bin", keys)
        for column, lengths in (("offsets", "lengths"), ("detail_offsets", "detail_lengths")):
            ends = np.cumsum(block[lengths], dtype="<i8") + self._ends[column]
            self._ends[column] = int(ends[-1])
            self._write(f"{column}.bin", ends)

    def finish(self) -> dict[str, list[int]]:
        """Bring all to the disk; (bytes, checksum) of each file by name."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return dict(sorted(self._checks.items()))

    def _write(self, name: str, column: np.ndarray) -> None:
        if name in self._files:
            self._write_bytes(name, column.tobytes())

    def _write_bytes(self, name: str, data: bytes) -> None:
        self._files[name].write(data)
        check = self._checks[name]
        check[0] += len(data)
        check[1] = zlib.crc32(data, check[1])
