"""What lies in a cache folder, thing by thing, and whether each is whole.

NAME/ with meta.json         a token store
.NAME.HASH.draft/            one being built, or left by a build that was killed
plans/FINGERPRINT/           plans of epochs
file_hashes/HASH.json        hashes of the content of data files
HASH.jsonl + HASH.note.json  an unpacked data file, in a folder of those (`unpack_dir`)
*.gone, *.part               what a killed process left
"""

from __future__ import annotations

import json
import re
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pegboard.epoch_plan import damaged_plan_files
from pegboard.errors import DataError
from pegboard.file_claims import is_alive_here
from pegboard.preparation import HASHES_FOLDER, PLANS_FOLDER
from pegboard.stored_samples import META_FILE, USED_FILE, damaged_files, open_store
from pegboard.token_store import DRAFT_SUFFIX
from pegboard_plugins.records.compressed_lines import NOTE_SUFFIX

__all__ = ["CacheEntry", "damage_of", "scan_cache"]

_ABANDONED_S = 3600.0
"""What has not changed for so long, and whose owner can't be asked, is nobody's."""
_UNPACKED = re.compile(r"[0-9a-f]{32}\.jsonl")
_LEFTOVER = re.compile(r".*\.(part|new|dead|claim)")


class CacheEntry(NamedTuple):
    """One thing in a cache folder."""

    place: Path
    """A folder or a file."""
    state: str
    """`ready` (a store), `plan`, `unpacked`, `hashes`, `building`, `abandoned`, `leftover`,
    `outdated`, or `damaged: why`."""
    num_samples: int
    num_tokens: int
    num_bytes: int
    idle_s: float
    """Seconds since it was last opened, or for a draft, written to."""
    origin: str
    """The first data file, and how many more there are."""


def scan_cache(cache: Path) -> Iterator[CacheEntry]:
    """Everything in a cache folder, by name."""
    for place in sorted(cache.iterdir()):
        if place.is_file():
            if _UNPACKED.fullmatch(place.name):
                yield _unpacked(place)
            elif _is_leftover(place):
                yield _other(place, "leftover")
        elif place.name.endswith(".gone"):
            yield _other(place, "leftover")
        elif place.name.endswith(DRAFT_SUFFIX):
            yield _other(place, "building" if _has_living_owner(place) else "abandoned")
        elif place.name == PLANS_FOLDER:
            for plan in sorted(path for path in place.iterdir() if path.is_dir()):
                yield _other(plan, "leftover" if plan.name.endswith(".gone") else "plan")
        elif place.name == HASHES_FOLDER:
            for path in sorted(path for path in place.iterdir() if path.is_file()):
                if path.suffix == ".json":
                    yield _hashes(path)
                elif _is_leftover(path):
                    yield _other(path, "leftover")
        elif (place / META_FILE).exists():
            yield _store(place)


def damage_of(entry: CacheEntry) -> str | None:
    """What is wrong with it, empty if nothing; None if there is nothing to hold it against. Reads
    all of it."""
    if entry.state.startswith("damaged: "):
        return entry.state.removeprefix("damaged: ")
    if entry.state == "ready":
        try:
            wrong = damaged_files(entry.place)
        except DataError as error:
            return str(error)
    elif entry.state == "plan":
        epochs = [path for path in sorted(entry.place.glob("epoch_*")) if path.is_dir()]
        wrong = [f"{path.name}/{name}" for path in epochs for name in damaged_plan_files(path)]
    elif entry.state == "unpacked":
        return _damage_of_unpacked(entry.place)
    else:
        return None
    return ", ".join(wrong)


def _damage_of_unpacked(place: Path) -> str | None:
    note = _note_of(place)
    if not note:
        return None
    size = crc = 0
    with place.open("rb") as file:
        while block := file.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    if [size, crc] != [note.get("bytes"), note.get("crc")]:
        return f"not what {note.get('file')} was unpacked to"
    return ""


def _store(folder: Path) -> CacheEntry:
    num_bytes, changed = _measure(folder)
    with suppress(OSError):
        changed = (folder / USED_FILE).stat().st_mtime
    try:
        meta = open_store(folder).meta
    except DataError as error:
        reason = str(error).removeprefix(f"{folder}: ")
        return CacheEntry(folder, f"damaged: {reason}", 0, 0, num_bytes, _since(changed), "")
    return CacheEntry(
        folder,
        "ready",
        meta["num_samples"],
        meta["num_tokens"],
        num_bytes,
        _since(changed),
        _first_of(meta["data_files"]),
    )


def _unpacked(place: Path) -> CacheEntry:
    note = _note_of(place)
    num_bytes, changed = _measure(place)
    state = "unpacked"
    if note and note.get("bytes") != num_bytes:
        state = f"damaged: {num_bytes} bytes, expected {note.get('bytes')}"
    return CacheEntry(place, state, 0, 0, num_bytes, _since(changed), str(note.get("file", "")))


def _note_of(place: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        note = json.loads(place.with_suffix(NOTE_SUFFIX).read_text(encoding="utf-8"))
        if isinstance(note, dict):
            return note
    return {}


def _hashes(path: Path) -> CacheEntry:
    """Hashes of files; outdated when none of the files is there any more: nothing else ever needs
    to be read again because they were deleted."""
    num_bytes, changed = _measure(path)
    try:
        files = list(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return CacheEntry(path, "damaged: not JSON", 0, 0, num_bytes, _since(changed), "")
    state = "hashes" if any(Path(file).exists() for file in files) else "outdated"
    return CacheEntry(path, state, 0, 0, num_bytes, _since(changed), _first_of(files))


def _other(place: Path, state: str) -> CacheEntry:
    num_bytes, changed = _measure(place)
    return CacheEntry(place, state, 0, 0, num_bytes, _since(changed), "")


def _first_of(files: list[str]) -> str:
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return f"{files[0]}{more}" if files else ""


def _is_leftover(path: Path) -> bool:
    """Whether a file is of a process that was killed: nobody writes one for so long."""
    left = bool(_LEFTOVER.fullmatch(path.name))
    if path.name.endswith(NOTE_SUFFIX):
        left = not path.with_name(path.name.removesuffix(NOTE_SUFFIX) + ".jsonl").exists()
    return left and _since(_measure(path)[1]) > _ABANDONED_S


def _measure(place: Path) -> tuple[int, float]:
    """(bytes, time of the last change) of a file, or of a folder that others may be changing."""
    num_bytes, changed = 0, 0.0
    for path in (place, *place.rglob("*")):
        with suppress(OSError):
            stat = path.stat()
            num_bytes += 0 if path == place and path.is_dir() else stat.st_size
            changed = max(changed, stat.st_mtime)
    return num_bytes, changed


def _has_living_owner(draft: Path) -> bool:
    """Whether some process still works on a draft."""
    for claim in draft.glob("*.claim"):
        try:
            alive = is_alive_here(json.loads(claim.read_bytes()))
        except (OSError, ValueError):
            alive = None
        if alive or (alive is None and _since(_measure(draft)[1]) < _ABANDONED_S):
            return True
    return False


def _since(when: float) -> float:
    return max(0.0, time.time() - when)
