"""Which plugins made a checkpoint: package, version and a hash of the code, part by part.

Only plugins whose parts the run uses count. When a run is resumed, what nobody announced is refused
(a part that comes from another package, other code under the version that an installed package
had), and what was announced is told: another version, an edited `--plugin` file, checkout or editable
install. `"on_changed_plugins": "continue"` turns a refusal into a warning.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pegboard.errors import CheckpointError
from pegboard.plugin_sources import plain_name

if TYPE_CHECKING:
    from pegboard.plugin_manager import LoadedPlugins, PluginRecord
    from pegboard.run_config import RunConfig

__all__ = [
    "MadeBy",
    "PluginChanges",
    "check_made_by",
    "compare_plugins",
    "identify_plugins",
    "newest_run",
    "offered_then",
]

MadeBy = dict[str, dict[str, Any]]
"""Plugin -> package, version, content, released, parts; JSON-able."""

_BUILT_IN = "pegboard"
_CODE = frozenset({".py", ".so", ".pyd", ".json", ".jinja", ".toml"})
"""Endings of files that can change what a part does; data that it downloads is not code."""


class PluginChanges(NamedTuple):
    """What is not as it was, in words."""

    refused: tuple[str, ...]
    told: tuple[str, ...]


def identify_plugins(run: RunConfig, plugins: LoadedPlugins) -> MadeBy:
    """The plugins that a run uses; call it early, as files may change while the run goes on."""
    from pegboard.run_config import parts_of

    owners = {entry.cls: entry.plugin for entry in plugins.registry.entries()}
    parts: dict[str, set[str]] = {}
    for component, _ in parts_of(run):
        owner = owners.get(type(component))
        if owner is not None:
            parts.setdefault(owner, set()).add(f"{component.kind} {type(component).__name__}")
    records = {record.name: record for record in plugins.plugins}
    return {name: _identity(records[name], sorted(parts[name])) for name in sorted(parts)}


def compare_plugins(saved: MadeBy, ours: MadeBy) -> PluginChanges:
    """What changed from the checkpoint's plugins to this run's."""
    refused, told = [], []
    before, now = _by_part(saved), _by_part(ours)
    for part in sorted(before.keys() & now.keys()):
        old, new = before[part], now[part]
        if _package(old) != _package(new):
            refused.append(f"{part} came from {_spell(old)} and now comes from {_spell(new)}")
    by_package = {_package(one): one for one in saved.values()}
    for name, new in ours.items():
        old = saved.get(name, by_package.get(_package(new), {}))
        if not old or _package(old) != _package(new):
            continue
        if old["version"] != new["version"]:
            told.append(f"{new['package']} {old['version'] or '?'} -> {new['version'] or '?'}")
        elif old["content"] != new["content"]:
            silent = old["released"] and new["released"]
            words = f"the code of plugin '{name}' changed"
            if silent:
                refused.append(f"{words} and its version is {_spell(new)} as before")
            else:
                told.append(f"{words} ({_spell(new)})")
    for part in sorted(before.keys() - now.keys()):
        told.append(f"{part} of {_spell(before[part])} is no longer used")
    for part in sorted(now.keys() - before.keys()):
        told.append(f"{part} of {_spell(now[part])} is new")
    return PluginChanges(tuple(refused), tuple(dict.fromkeys(told)))


def check_made_by(saved: MadeBy | None, ours: MadeBy, folder: Path, *, go_on: bool) -> None:
    """Tell what changed since a checkpoint, or refuse it. Collective.

    Args:
        saved: what `identify_plugins` gave then; None in checkpoints of before it was kept.
        go_on: warn of what would be refused.

    Raises:
        CheckpointError: on all ranks, where a change on any of their machines is refused.
    """
    from loguru import logger

    from pegboard.commit import gather_from_ranks

    if saved is None:
        logger.warning(f"{folder}: does not say which plugins made it; nothing to compare")
        return
    if not _is_made_by(saved):
        raise CheckpointError(
            f"{folder}: what it says of the plugins that made it can't be read; resume from another"
        )
    changes = compare_plugins(saved, ours)
    refused = next((one for one in gather_from_ranks(changes.refused) if one), ())
    if refused and not go_on:
        raise CheckpointError(
            f"{folder}: was made with other plugins: {'; '.join(refused)}; bring back what made it, or "
            'set on_changed_plugins to "continue" if you trust the change'
        )
    for words in (*changes.refused, *changes.told):
        logger.warning(f"plugins changed since {folder}: {words}")


def newest_run(data: Mapping[str, Any]) -> Path | None:
    """Folder of the run that `--resume` would go on with, by a config that may not be valid."""
    work_dir, name = data.get("work_dir", "work_dirs"), data.get("run_name")
    if not isinstance(work_dir, str):
        return None
    if isinstance(name, str):
        return Path(work_dir) / name
    runs = [path.parent for path in Path(work_dir).glob("*/checkpoints")]
    return max(runs, key=lambda run: run.stat().st_mtime, default=None)


def offered_then(run_dir: Path, report: str) -> list[str]:
    """Lines on parts that a config error misses and that a run's own plugins.json had.

    Args:
        run_dir: folder of the run that is to go on.
        report: the error; it has missing names in single quotes.
    """
    file = run_dir / "plugins.json"
    try:
        then = json.loads(file.read_text(encoding="utf-8"))
        found = [
            (part["kind"].replace("_", " "), part["class_name"], record)
            for record in then
            for part in record["parts"]
        ]
        return [
            f"{file}: {kind} '{name}' came from plugin '{record['name']}' "
            f"({record['origin']} {record['version']}".rstrip()
            + ") when this run began"
            for kind, name, record in found
            if f"no {kind} named '{name}'" in report
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # it only adds to another error


def _identity(record: PluginRecord, parts: list[str]) -> dict[str, Any]:
    kind, _, where = record.origin.partition(" ")
    package, version = where, record.version
    if kind == "built-in":
        package = _BUILT_IN
        try:
            version = metadata.version(_BUILT_IN)
        except metadata.PackageNotFoundError:
            version = ""
    elif kind == "file":
        package = f"file {Path(where).name}"  # it may have moved
    home = Path(record.home) if record.home else None
    return {
        "package": package,
        "version": version,
        "content": _content_hash(home) if home else "",
        "released": kind != "file" and home is not None and _is_released(package, home),
        "parts": parts,
    }


def _content_hash(home: Path) -> str:
    """SHA-256 over the names and contents of the code files of a folder, or of one file."""
    files = [home] if home.is_file() else sorted(p for p in home.rglob("*") if p.suffix in _CODE)
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            name = file.relative_to(home).as_posix() if file != home else file.name
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{name}\0{content}\0".encode())
    return digest.hexdigest()


def _is_released(package: str, home: Path) -> bool:
    """Whether the code is what a wheel put there: a version then stands for it."""
    try:
        root = Path(str(metadata.distribution(package).locate_file(""))).resolve()
    except metadata.PackageNotFoundError:
        return False
    # A checkout with metadata of its own (an old-style develop install) has no RECORD.
    recorded = metadata.distribution(package).read_text("RECORD") is not None
    return recorded and home.is_relative_to(root)


def _is_made_by(value: Any) -> bool:
    fields = {"package": str, "version": str, "content": str, "released": bool, "parts": list}
    return isinstance(value, dict) and all(
        isinstance(one, dict)
        and all(isinstance(one.get(name), kind) for name, kind in fields.items())
        and all(isinstance(part, str) for part in one["parts"])
        for one in value.values()
    )


def _by_part(made_by: MadeBy) -> dict[str, dict[str, Any]]:
    return {part: one for one in made_by.values() for part in one["parts"]}


def _package(one: Mapping[str, Any]) -> str:
    package = str(one["package"])
    return package if package.startswith("file ") else plain_name(package)


def _spell(one: Mapping[str, Any]) -> str:
    return f"{one['package']} {one['version']}".strip()
