"""Where plugins are found, before any of them is imported.

Order: built-ins by name, entry points of group `pegboard` by name, `--plugin` files in the order
given. Finding reads metadata only, so what is blocked or not allowed never runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from itertools import chain, count
from pathlib import Path

from pegboard.errors import PluginError

__all__ = [
    "BUILT_INS",
    "ENTRY_POINT_GROUP",
    "PluginSource",
    "distributions_with",
    "find_plugins",
    "name_and_version",
    "plain_name",
]

ENTRY_POINT_GROUP = "pegboard"
BUILT_INS = "pegboard_plugins"
"""Found by name: the core imports no plugin, and runs without any."""


@dataclass(frozen=True)
class PluginSource:
    """A plugin that has not been imported yet."""

    name: str
    """What `--block` and `"plugin"` take."""
    origin: str
    """`built-in`, `distribution NAME` or `file PATH`."""
    version: str
    """Version of its distribution; empty if it has none."""
    load: Callable[[], object]
    remedy: str
    """How to run without it."""

    @property
    def distribution(self) -> str | None:
        """Name of its distribution; None for built-ins and files."""
        kind, _, name = self.origin.partition(" ")
        return name if kind == "distribution" else None

    def __str__(self) -> str:
        version = f" {self.version}" if self.version else ""
        return f"'{self.name}' ({self.origin}{version})"


def find_plugins(extra_files: Collection[str | Path], *, third_party: bool) -> list[PluginSource]:
    """Every plugin there is, in load order.

    Args:
        extra_files: `--plugin` files.
        third_party: whether to look for entry points.

    Raises:
        PluginError: an extra file does not exist.
    """
    taken: set[str] = set()
    found: list[PluginSource] = []
    # Lazily, one finder after the other: each gives names that the ones before it left free.
    finders = [_built_ins(), *([_entry_points(taken)] if third_party else ())]
    for source in chain(*finders, _files(extra_files, taken)):
        taken.add(source.name)
        found.append(source)
    return found


def plain_name(distribution: str) -> str:
    """A distribution's name as indexes compare it: `Peg_Llama` and `peg-llama` are one."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def distributions_with(group: str) -> Iterator[metadata.Distribution]:
    """Installed distributions with entry points of a group, the first of a name on `sys.path`.

    `metadata.entry_points` parses every distribution's, and one bad file anywhere stops it; here
    only the text is read of those that don't name the group.
    """
    seen: set[str] = set()
    for distribution in metadata.distributions():
        try:
            text = distribution.read_text("entry_points.txt")
        except (OSError, ValueError):  # not ours to judge: it can't be read as text
            continue
        if not text or not re.search(rf"^\s*\[\s*{re.escape(group)}\s*\]", text, re.MULTILINE):
            continue
        name = name_and_version(distribution)[0]
        if name and plain_name(name) in seen:
            continue
        seen.add(plain_name(name))
        try:
            first = metadata.distribution(name) if name else distribution
        except metadata.PackageNotFoundError:
            first = distribution
        yield first


def name_and_version(distribution: metadata.Distribution) -> tuple[str, str]:
    """Read once: each property parses the whole file. Empty strings if it says neither."""
    try:
        fields = distribution.metadata
    except (OSError, TypeError, ValueError):  # no METADATA, or not a text
        return "", ""
    name = fields["Name"] if "Name" in fields else ""
    return name, fields["Version"] if "Version" in fields else ""


def _built_ins() -> Iterator[PluginSource]:
    try:
        package = importlib.import_module(BUILT_INS)
    except ModuleNotFoundError as error:
        if error.name != BUILT_INS:
            raise
        return
    modules = sorted(pkgutil.iter_modules(package.__path__), key=lambda module: module.name)
    for module in modules:
        name = f"{BUILT_INS}.{module.name}"
        if module.ispkg and _may_have_hooks(name):
            yield PluginSource(
                module.name,
                "built-in",
                "",
                lambda name=name: importlib.import_module(name),  # type: ignore[misc]
                f"Run without it: --block {module.name}",
            )


def _may_have_hooks(name: str) -> bool:
    """Whether a built-in package is a plugin.

    A library for plugin authors (blocks, media) may import torch, so it is told apart by its text,
    before any import.
    """
    spec = importlib.util.find_spec(name)
    if spec is None:
        return True
    read = getattr(spec.loader, "get_source", None)
    if read is not None:
        text = read(name)
    elif spec.origin is not None and Path(spec.origin).is_file():
        # pytest's loader, which rewrites assertions, gives no source.
        text = Path(spec.origin).read_text(encoding="utf-8")
    else:
        text = None
    return text is None or "hookimpl" in text


def _entry_points(taken: set[str]) -> Iterator[PluginSource]:
    found: list[tuple[str, str, str, str, Callable[[], object]]] = []
    for distribution in distributions_with(ENTRY_POINT_GROUP):
        owner, version = name_and_version(distribution)
        try:
            points = list(distribution.entry_points.select(group=ENTRY_POINT_GROUP))
        except (TypeError, ValueError) as error:
            reason = f"its entry_points.txt can't be read: {error}"
            found.append(("?", "", owner or "?", version, partial(_refuse, reason)))
            continue
        found += [(p.name, p.value, owner or p.name, version, p.load) for p in points]
    found.sort(key=lambda one: one[:3])
    counts = Counter(owner for _, _, owner, _, _ in found)
    for point, _, owner, version, load in found:
        name = owner if counts[owner] == 1 and owner not in taken else f"{owner}:{point}"
        if name in taken:
            reason = (
                f"there is a plugin '{name}' before it; its entry points need names of their own"
            )
            name = _numbered(name, taken)
            if point != "?":  # that one has a reason of its own
                load = partial(_refuse, reason)
        yield PluginSource(
            name, f"distribution {owner}", version, load, f"Run without it: --block {name}"
        )


def _numbered(name: str, taken: Collection[str]) -> str:
    """A free name: `peg-pair:a#2`."""
    return next(free for n in count(2) if (free := f"{name}#{n}") not in taken)


def _refuse(reason: str) -> object:
    raise PluginError(reason)


def _files(files: Collection[str | Path], taken: set[str]) -> Iterator[PluginSource]:
    for given in files:
        path = Path(given)
        if not path.is_file() or path.suffix != ".py":
            raise PluginError(f"--plugin {given}: no such Python file (relative to {Path.cwd()})")
        name = path.stem if path.stem not in taken else path.name
        yield PluginSource(
            name,
            f"file {given}",
            "",
            lambda path=path: _import_file(path),  # type: ignore[misc]
            f"Correct the file, or run without --plugin {given}",
        )


def _import_file(path: Path) -> object:
    path = path.resolve()
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    importlib.invalidate_caches()
    module = importlib.import_module(path.stem)
    home = getattr(module, "__file__", None)
    if home is None or Path(home).resolve() != path:
        raise PluginError(
            f"the module name '{path.stem}' is taken by {home or 'Python'}; rename the file"
        )
    return module
