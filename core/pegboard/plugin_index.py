"""Which package offers a name that no installed plugin does.

The project's index is `known_plugins.json` beside this file. A package adds one through an entry
point of group `pegboard.index`, `acme = acme_pegboard:index.json`: the file `index.json` in the
folder of the top-level package `acme_pegboard`, which is read and never imported. Nothing is read
before a name is missing.

    {"packages": [{"name": "acme-pegboard", "install": "pip install acme-pegboard",
                   "parts": {"model": ["AcmeModel"], "command": ["acme-report"]}}]}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from pegboard.plugin_sources import distributions_with, name_and_version, plain_name

__all__ = ["INDEX_GROUP", "KnownPackage", "PluginIndex", "read_index"]

INDEX_GROUP = "pegboard.index"
_OWN = Path(__file__).with_name("known_plugins.json")


class KnownPackage(NamedTuple):
    """A package that an index names."""

    name: str
    """Of its distribution."""
    install: str
    """How to get it, in words."""
    parts: Mapping[str, tuple[str, ...]]
    """Kind -> names that it offers; `model_type` and `preset` are what its models say they know."""
    says: str
    """Distribution whose index says so; empty for the project's own."""


class PluginIndex:
    """The project's index and those of installed packages."""

    def __init__(self, *, third_party: bool = True) -> None:
        self._third_party = third_party

    def hint(self, kind: str, name: str, left_out: Mapping[str, str]) -> str:
        """A sentence on who offers a missing name; empty if no index knows.

        Args:
            left_out: name -> reason of plugins that are installed and were not loaded.
        """
        sentences = []
        for package in self._packages():
            if name not in package.parts.get(kind, ()):
                continue
            reasons = [why for n, why in left_out.items() if _is_of(n, package.name)]
            if reasons:
                sentences.append(f"'{package.name}' offers it, and {reasons[0]}.")
            elif not self._third_party and _installed(package.name):
                sentences.append(f"'{package.name}' offers it, and --no-third-party leaves it out.")
            elif _installed(package.name):
                sentences.append(
                    f"'{package.name}' should offer it and is installed, but does not: "
                    "another version may."
                )
            else:
                says = f" (says the index of '{package.says}')" if package.says else ""
                sentences.append(f"{package.name} offers it{says}: {package.install}.")
        return " ".join(dict.fromkeys(sentences))

    def install_of(self, distribution: str) -> str | None:
        """How to install a distribution; None if no index knows it."""
        for package in self._packages():
            if plain_name(package.name) == plain_name(distribution):
                return package.install
        return None

    def _packages(self) -> Iterator[KnownPackage]:
        yield from read_index(_OWN)
        for distribution in distributions_with(INDEX_GROUP) if self._third_party else ():
            try:
                points = list(distribution.entry_points.select(group=INDEX_GROUP))
            except (TypeError, ValueError):
                continue
            for point in points:
                file = _file_of(point.value)
                if file is not None:
                    owner = name_and_version(distribution)[0]
                    yield from read_index(file, owner or point.name)


def read_index(path: Path, says: str = "") -> list[KnownPackage]:
    """Packages of an index file; entries that are not of its form, or an unreadable file, give none.

    It is asked while another error is explained, so it raises nothing.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    entries = data.get("packages") if isinstance(data, dict) else None
    found = []
    for entry in entries if isinstance(entries, list) else ():
        package = _package_of(entry, says)
        if package is not None:
            found.append(package)
    return found


def _package_of(entry: Any, says: str) -> KnownPackage | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("parts"), dict):
        return None
    name, install = entry.get("name"), entry.get("install")
    if not (_is_line(name) and _is_line(install)):
        return None
    parts = {
        kind: tuple(n for n in names if isinstance(n, str))
        for kind, names in entry["parts"].items()
        if isinstance(names, list)
    }
    return KnownPackage(name, install, parts, says)


def _is_line(text: Any) -> TypeGuard[str]:
    """It is printed within a message: no control characters that could repaint a terminal."""
    return isinstance(text, str) and 0 < len(text) <= 200 and text.isprintable()


def _file_of(value: str) -> Path | None:
    """`package:file.json` as a path, without importing the package."""
    package, _, file = value.partition(":")
    if not package.isidentifier() or not file or "/" in file or "\\" in file:
        return None
    try:
        spec = util.find_spec(package)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / file


def _is_of(plugin: str, distribution: str) -> bool:
    """Whether a plugin's name (`peg-llama` or `peg-llama:models`) is of a distribution."""
    return plain_name(plugin.split(":", 1)[0]) == plain_name(distribution)


def _installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except (metadata.PackageNotFoundError, ValueError):
        return False
    return True
