"""Lines of a .gz or .zst file, or records of a .json list, by number.

None of these can be entered in the middle, so the file is unpacked once into a cache folder, under
a name made of its path, size and times, and read there; messages name the file itself. Several
processes may do so at once: each writes a file of its own, and renaming it is atomic. A note beside
it says what it was unpacked from, with a checksum, for `pegboard cache`; its time of change says when
it was last opened. One that was deleted meanwhile is unpacked again.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tempfile
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pegboard.errors import DataError
from pegboard_plugins.records.file_kinds import missing_package
from pegboard_plugins.records.json_array import iter_array_lines
from pegboard_plugins.records.line_index import LineIndex, parse_json_line

__all__ = ["NOTE_SUFFIX", "CompressedLines"]

NOTE_SUFFIX = ".note.json"
"""Of the note beside an unpacked file: `file`, `bytes`, `crc`."""

_BLOCK_BYTES = 4 << 20


class CompressedLines:
    """Lines of one compressed file; the same methods as `LineIndex`.

    Args:
        path: a file whose name ends in .gz or .zst, or a list of records in .json.
        unpack_dir: folder of unpacked files; made where missing.

    Raises:
        DataError: the file can't be read or unpacked, or holds no line that isn't blank.
    """

    def __init__(self, path: str, unpack_dir: str) -> None:
        self.path = path
        self._unpack_dir = unpack_dir
        self._unpacked = _unpack(path, unpack_dir)
        with self._naming_the_compressed_file():
            self._lines = LineIndex(self._unpacked)

    def __len__(self) -> int:
        return len(self._lines)

    def read_bytes(self, index: int) -> bytes:
        """Line `index` (from 0) as it is in the unpacked file, its line end included."""
        with self._naming_the_compressed_file():
            try:
                return self._lines.read_bytes(index)
            except DataError as error:
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
            # Somebody emptied the folder; of a file that has changed since, the place is another.
            if _unpack(self.path, self._unpack_dir) != self._unpacked:
                raise DataError(f"{self.path}: the file changed while it was read; start again")
            return self._lines.read_bytes(index)

    def place_of(self, index: int) -> dict[str, str | int]:
        """Where the bytes of line `index` (from 0) are in the unpacked file."""
        return self._lines.place_of(index)

    def read_record(self, index: int) -> dict[str, Any]:
        """Line `index` (from 0) as JSON; DataError starts with `file:line:`."""
        return parse_json_line(self.read_bytes(index), f"{self.path}:{index + 1}")

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        self._lines.close()

    @contextmanager
    def _naming_the_compressed_file(self) -> Iterator[None]:
        try:
            yield
        except DataError as error:
            message = str(error)
            if not message.startswith(self._unpacked):
                raise
            raise DataError(self.path + message[len(self._unpacked) :]) from error


def _unpack(path: str, unpack_dir: str) -> str:
    """Path of the unpacked file, which is made if it is not there."""
    if (problem := missing_package(path)) is not None:
        raise DataError(f"{path}: {problem}")
    errors: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
    if path.endswith(".json"):
        errors = (ValueError, RecursionError)
    if path.endswith(".zst"):
        import zstandard

        errors = (EOFError, zstandard.ZstdError)
    try:
        stat = os.stat(path)
        # The time of the status too: a program can put the other back, as rsync and tar do.
        times = f"{stat.st_mtime_ns}\0{stat.st_ctime_ns}"
        identity = f"{os.path.realpath(path)}\0{stat.st_size}\0{times}"
        digest = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        target = Path(unpack_dir) / f"{digest}.jsonl"
        if _is_whole(target):
            with suppress(OSError):  # a folder of somebody else's
                os.utime(target)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            _write_whole(path, target)
    except errors as error:
        if path.endswith(".json"):
            raise DataError(f"{path}: it is no whole JSON list of records: {error}") from error
        raise DataError(f"{path}: can't unpack it, it is damaged or cut off: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: can't unpack it: {error.strerror or error}") from error
    return str(target)


def _is_whole(target: Path) -> bool:
    """Whether the unpacked file is there with all of its bytes: a power cut can leave it short."""
    try:
        size = target.stat().st_size
        note = json.loads(target.with_suffix(NOTE_SUFFIX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return target.exists()
    except ValueError:
        return False
    return isinstance(note, dict) and note.get("bytes") == size


def _write_whole(path: str, target: Path) -> None:
    if path.endswith(".json"):
        blocks = iter_array_lines(path)
    else:
        blocks = _gzip_blocks(path) if path.endswith(".gz") else _zstd_blocks(path)
    with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".part", delete=False) as draft:
        try:
            size = crc = 0
            for block in blocks:
                draft.write(block)
                size, crc = size + len(block), zlib.crc32(block, crc)
            draft.flush()
            _write_note(target, {"file": os.path.realpath(path), "bytes": size, "crc": crc})
            os.replace(draft.name, target)
        except BaseException:
            os.unlink(draft.name)
            raise


def _write_note(target: Path, note: dict[str, Any]) -> None:
    place = target.with_suffix(NOTE_SUFFIX)
    draft = place.with_name(f"{place.name}.{uuid.uuid4().hex[:8]}.part")
    draft.write_text(json.dumps(note), encoding="utf-8", errors="surrogateescape")
    os.replace(draft, place)


def _gzip_blocks(path: str) -> Iterator[bytes]:
    with gzip.open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            yield block


def _zstd_blocks(path: str) -> Iterator[bytes]:
    """NOTE: zstandard's own readers take a file that was cut off for one that ended."""
    import zstandard

    unpacker = zstandard.ZstdDecompressor()
    frame = None
    with open(path, "rb") as file:
        while packed := file.read(_BLOCK_BYTES):
            while packed:
                frame = frame or unpacker.decompressobj()
                yield frame.decompress(packed)
                packed = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = None
    if frame is not None:
        raise EOFError("the last frame does not end")
