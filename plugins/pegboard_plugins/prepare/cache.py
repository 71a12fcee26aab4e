"""The token stores of a cache folder: what is there, whether it is whole, what can go.

A folder with `meta.json` is a store; `.NAME.HASH.draft` is one being built, or left by a build that
was killed; anything else that a killed process left ends in `.gone`. Plans of epochs are in `plans`.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pegboard.command import print_text
from pegboard.errors import ConfigError, DataError
from pegboard.file_claims import is_alive_here
from pegboard.json_source import load_layers
from pegboard.stored_samples import META_FILE, USED_FILE, damaged_files, open_store
from pegboard.token_store import DRAFT_SUFFIX

__all__ = ["CacheEntry", "find_cache", "list_cache", "prune_cache", "scan_cache", "verify_cache"]

_PLANS = "plans"
_DAY_S = 86_400.0
_ABANDONED_S = 3600.0
"""A draft of another machine that has not changed for so long is nobody's."""


class CacheEntry(NamedTuple):
    """One thing in a cache folder."""

    folder: Path
    state: str
    """`ready`, `plan`, `building`, `abandoned`, `leftover`, or `damaged: why`."""
    num_samples: int
    num_tokens: int
    num_bytes: int
    idle_s: float
    """Seconds since it was last opened, or for a draft, written to."""
    origin: str
    """The first data file, and how many more there are."""


def find_cache(where: str) -> Path:
    """The cache folder that a command line means: itself, or that of a run config.

    Raises:
        ConfigError: there is no such folder.
    """
    path = Path(where)
    if path.is_file() and path.suffix == ".json":
        data = load_layers(path, ()).data
        named = (
            data.get("cache_dir") or Path(str(data.get("work_dir", "work_dirs"))) / ".token_store"
        )
        path = Path(named)
    if not path.is_dir():
        raise ConfigError(f"{path}: no cache folder there (relative to {Path.cwd()})")
    return path


def scan_cache(cache: Path) -> Iterator[CacheEntry]:
    """Everything in a cache folder, by name."""
    for folder in sorted(cache.iterdir()):
        if not folder.is_dir():
            continue
        if folder.name.endswith(".gone"):
            yield _other(folder, "leftover")
        elif folder.name.endswith(DRAFT_SUFFIX):
            yield _other(folder, "building" if _has_living_owner(folder) else "abandoned")
        elif folder.name == _PLANS:
            for plan in sorted(path for path in folder.iterdir() if path.is_dir()):
                yield _other(plan, "plan")
        elif (folder / META_FILE).exists():
            yield _store(folder)


def list_cache(cache: Path) -> int:
    """Print a line for each entry, and the sum."""
    entries = list(scan_cache(cache))
    rows = [("store", "state", "samples", "tokens", "size", "idle", "from")]
    for entry in entries:
        rows.append(
            (
                str(entry.folder.relative_to(cache)),
                entry.state,
                f"{entry.num_samples:,}",
                f"{entry.num_tokens:,}",
                _size(entry.num_bytes),
                _age(entry.idle_s),
                entry.origin,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if 2 <= column <= 5 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    total = sum(entry.num_bytes for entry in entries)
    lines.append(f"{len(entries)} in {cache}, {_size(total)}")
    print_text("\n".join(lines))
    return 0


def verify_cache(cache: Path) -> int:
    """Read every store against its checksums; 0 if all are whole, else 2."""
    wrong = 0
    for folder in sorted(cache.iterdir()):
        if not (folder / META_FILE).is_file():
            continue
        try:
            damaged = damaged_files(folder)
            problem = f"damaged: {', '.join(damaged)}; delete the folder" if damaged else ""
        except DataError as error:
            problem = str(error)
        print_text(f"{folder}: {problem or 'whole'}")
        wrong += bool(problem)
    return 2 if wrong else 0


def prune_cache(cache: Path, *, days: float, dry_run: bool) -> int:
    """Delete what is damaged, abandoned, or was not opened for `days`."""
    freed = 0
    for entry in scan_cache(cache):
        if entry.state == "building":
            continue
        why = entry.state
        if entry.state in ("ready", "plan"):
            if entry.idle_s < days * _DAY_S:
                continue
            why = f"not {'opened' if entry.state == 'ready' else 'made'} for {_age(entry.idle_s)}"
        print_text(f"{'would delete' if dry_run else 'deleted'} {entry.folder} ({why})")
        freed += entry.num_bytes
        if not dry_run:
            # Its name first, so that nobody opens half of it.
            gone = entry.folder.with_name(f"{entry.folder.name}.gone")
            with suppress(OSError):
                entry.folder.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
            shutil.rmtree(entry.folder, ignore_errors=True)
    print_text(f"{_size(freed)} {'would be ' if dry_run else ''}freed in {cache}")
    return 0


def _store(folder: Path) -> CacheEntry:
    num_bytes, changed = _measure(folder)
    with suppress(OSError):
        changed = (folder / USED_FILE).stat().st_mtime
    try:
        meta = open_store(folder).meta
    except DataError as error:
        reason = str(error).removeprefix(f"{folder}: ")
        return CacheEntry(folder, f"damaged: {reason}", 0, 0, num_bytes, _since(changed), "")
    files = meta["data_files"]
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return CacheEntry(
        folder,
        "ready",
        meta["num_samples"],
        meta["num_tokens"],
        num_bytes,
        _since(changed),
        f"{files[0]}{more}" if files else "",
    )


def _other(folder: Path, state: str) -> CacheEntry:
    num_bytes, changed = _measure(folder)
    return CacheEntry(folder, state, 0, 0, num_bytes, _since(changed), "")


def _measure(folder: Path) -> tuple[int, float]:
    """(bytes, time of the last change) of a folder that others may be changing."""
    num_bytes, changed = 0, 0.0
    with suppress(OSError):
        changed = folder.stat().st_mtime
    for path in folder.rglob("*"):
        with suppress(OSError):
            stat = path.stat()
            num_bytes += stat.st_size
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


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def _age(seconds: float) -> str:
    for size, unit in ((_DAY_S, "days"), (3600.0, "hours"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
