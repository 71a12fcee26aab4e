"""The caches of runs: list what is there, verify that it is whole, prune what can go."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pegboard.command import print_text
from pegboard.errors import ConfigError
from pegboard.json_source import load_layers
from pegboard_plugins.prepare.cache_entries import CacheEntry, damage_of, scan_cache
from pegboard_plugins.records.compressed_lines import NOTE_SUFFIX
from pegboard_plugins.records.file_kinds import default_unpack_dir

__all__ = ["find_caches", "list_caches", "prune_caches", "verify_caches"]

_DAY_S = 86_400.0
_IN_USE = ("ready", "plan", "unpacked")
"""What goes when nobody has opened it for long."""


def find_caches(where: str) -> list[Path]:
    """The folders that a command line means: the one it names, or all that a run config keeps its
    data in: its cache folder, and where its compressed files are unpacked.

    Raises:
        ConfigError: there is none.
    """
    path = Path(where)
    found = [path]
    if path.is_file() and path.suffix == ".json":
        data = load_layers(path, ()).data
        named = (
            data.get("cache_dir") or Path(str(data.get("work_dir", "work_dirs"))) / ".token_store"
        )
        found = [Path(named)]
        found += [folder for folder in _unpack_dirs(data) if folder.is_dir()]
    if not found[0].is_dir():
        raise ConfigError(f"{found[0]}: no cache folder there (relative to {Path.cwd()})")
    return found


def _unpack_dirs(data: Mapping[str, object]) -> list[Path]:
    """Where the compressed files of a config's datasets are unpacked."""
    evaluation = data.get("eval")
    lists = [data.get("datasets")]
    lists.append(evaluation.get("datasets") if isinstance(evaluation, dict) else None)
    found: dict[Path, None] = {}
    for entries in lists:
        for entry in entries if isinstance(entries, list) else ():
            dataset = entry.get("dataset") if isinstance(entry, dict) else None
            if isinstance(dataset, dict):
                found[Path(str(dataset.get("unpack_dir") or default_unpack_dir()))] = None
    return list(found)


def list_caches(caches: Sequence[Path]) -> int:
    """Print a line for each entry, and a sum for each folder."""
    for number, cache in enumerate(caches):
        print_text("\n".join([*([""] if number else []), *_table(cache)]))
    return 0


def verify_caches(caches: Sequence[Path]) -> int:
    """Read everything against its checksums; 0 if all is whole, else 2."""
    wrong = 0
    for cache in caches:
        for entry in scan_cache(cache):
            try:
                damage = damage_of(entry)
            except FileNotFoundError:
                continue  # pruned, or published under its name, meanwhile
            if damage is None:
                continue
            what = "folder" if entry.place.is_dir() else "file"
            problem = f"damaged: {damage}; delete the {what}" if damage else "whole"
            print_text(f"{entry.place}: {problem}")
            wrong += bool(damage)
    return 2 if wrong else 0


def prune_caches(caches: Sequence[Path], *, days: float, dry_run: bool) -> int:
    """Delete what is damaged, abandoned or outdated, or was not opened for `days`."""
    for cache in caches:
        freed = 0
        for entry in scan_cache(cache):
            why = _why_it_goes(entry, days)
            if why is None:
                continue
            print_text(f"{'would delete' if dry_run else 'deleted'} {entry.place} ({why})")
            freed += entry.num_bytes
            if not dry_run:
                _delete(entry.place)
        print_text(f"{_size(freed)} {'would be ' if dry_run else ''}freed in {cache}")
    return 0


def _why_it_goes(entry: CacheEntry, days: float) -> str | None:
    if entry.state in ("building", "hashes"):
        return None
    if entry.state in _IN_USE:
        idle = entry.idle_s >= days * _DAY_S
        return f"not opened for {_age(entry.idle_s)}" if idle else None
    return "its data files are gone" if entry.state == "outdated" else entry.state


def _delete(place: Path) -> None:
    if place.is_dir():
        # Its name first, so that nobody opens half of it.
        gone = place.with_name(f"{place.name}.gone")
        with suppress(OSError):
            place.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
        shutil.rmtree(place, ignore_errors=True)
    else:
        with suppress(OSError):
            os.unlink(place)
        with suppress(OSError):
            os.unlink(place.with_suffix(NOTE_SUFFIX))


def _table(cache: Path) -> list[str]:
    entries = list(scan_cache(cache))
    rows = [("name", "state", "samples", "tokens", "size", "idle", "from")]
    for entry in entries:
        is_store = entry.state == "ready"
        rows.append(
            (
                str(entry.place.relative_to(cache)),
                entry.state,
                f"{entry.num_samples:,}" if is_store else "",
                f"{entry.num_tokens:,}" if is_store else "",
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
    return [*lines, f"{len(entries)} in {cache}, {_size(total)}"]


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
