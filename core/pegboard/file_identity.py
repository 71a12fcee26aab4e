"""What a data file holds, told by its content without reading it at every start.

A file's hash is worked out once, by threads over ranges of bytes, and kept in a ledger beside what the
system says of the file: size, times of change and of status, inode. While all of that is the same,
so is the hash. A change that came too close to the reading to show in the times is never trusted.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from pegboard.errors import DataError
from pegboard.file_claims import do_once, open_claims

__all__ = ["content_hashes"]

_RANGE_BYTES = 64 << 20
_READ_BYTES = 1 << 20
_QUIET_S = 2.0
"""Times of files may be this coarse."""
_LARGE_BYTES = 256 << 20
_MAX_THREADS = 8


def content_hashes(
    files: Sequence[str],
    ledger: Path,
    tell: Callable[[int, int], None] | None = None,
) -> list[str]:
    """A hash of the content of each file.

    Processes that ask for the same files at the same time share the ledger: one reads them.

    Args:
        files: paths.
        ledger: folder of the ledgers, made where missing.
        tell: called with (bytes read, bytes to read) while files are read.

    Raises:
        DataError: a file can't be read.
    """
    if not files:
        return []
    places = [os.path.abspath(file) for file in files]
    name = hashlib.sha256("\0".join(places).encode("utf-8", "surrogatepass")).hexdigest()[:24]
    path = ledger / f"{name}.json"
    known = _look_up(places, _read(path))
    if all(known):
        return [hash_ for hash_ in known if hash_]
    ledger.mkdir(parents=True, exist_ok=True)
    found: list[str] = []

    def work() -> None:
        found[:] = _hash_missing(places, path, tell)

    def is_done() -> bool:
        known = _look_up(places, _read(path))
        if all(known):
            found[:] = [hash_ for hash_ in known if hash_]
        return bool(found)

    with open_claims(ledger) as claims:
        do_once(claims, name, is_done, work)
    return found


def _hash_missing(
    places: Sequence[str], path: Path, tell: Callable[[int, int], None] | None
) -> list[str]:
    entries = _read(path)
    known = _look_up(places, entries)
    missing = [place for place, hash_ in zip(places, known, strict=True) if not hash_]
    try:
        sizes = [os.stat(place).st_size for place in missing]
        # A file that large takes longer to read than to wait until its time of change can be trusted.
        if sum(sizes) > _LARGE_BYTES:
            time.sleep(max(0.0, min(_QUIET_S, max(map(_unrest_s, missing)))))
        total, done = sum(sizes), 0
        with ThreadPoolExecutor(_num_threads(), thread_name_prefix="pegboard-hash") as threads:
            for place in missing:
                began = time.time()
                stat = os.stat(place)
                ranges = range(0, stat.st_size, _RANGE_BYTES)
                digest = hashlib.sha256(str(stat.st_size).encode())
                for part in threads.map(
                    lambda start, place=place: _hash_range(place, start), ranges
                ):
                    digest.update(part)
                    done += _RANGE_BYTES
                    if tell is not None:
                        tell(min(done, total), total)
                entries[place] = [*_describe(stat), began, digest.hexdigest()]
    except OSError as error:
        raise DataError(
            f"{error.filename}: can't read the file: {error.strerror or error}"
        ) from error
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.new")
    draft.write_text(json.dumps(entries), encoding="utf-8")
    os.replace(draft, path)
    return [str(entries[place][-1]) for place in places]


def _hash_range(place: str, start: int) -> bytes:
    digest = hashlib.sha256()
    with open(place, "rb", buffering=0) as file:
        end = start + _RANGE_BYTES
        while data := os.pread(file.fileno(), min(_READ_BYTES, end - start), start):
            digest.update(data)
            start += len(data)
    return digest.digest()


def _look_up(places: Sequence[str], entries: dict[str, Any]) -> list[str | None]:
    """The hash of each file whose entry still fits it."""
    found: list[str | None] = []
    for place in places:
        entry = entries.get(place)
        hash_ = None
        with suppress(OSError, TypeError, ValueError):
            stat = os.stat(place)
            *described, began, kept = entry  # type: ignore[misc]
            changed = max(stat.st_mtime, stat.st_ctime)
            if described == _describe(stat) and changed + _QUIET_S < began:
                hash_ = str(kept)
        found.append(hash_)
    return found


def _describe(stat: os.stat_result) -> list[int]:
    # NOTE: ctime can't be set by a program, so a write that puts mtime back still shows.
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _unrest_s(place: str) -> float:
    """Seconds until the file has been left alone for long enough."""
    stat = os.stat(place)
    return max(stat.st_mtime, stat.st_ctime) + _QUIET_S - time.time() + 0.01


def _read(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _num_threads() -> int:
    return max(1, min(_MAX_THREADS, len(os.sched_getaffinity(0))))
