"""Find plugins, import them, and let each offer its parts.

Load order: built-ins by name, entry points of group `pegboard` by name, `--plugin` files in the
order given. Plugins go one at a time, and all or nothing: one that can't be imported or breaks the
contract is recorded as broken with its origin, the reason and how to block it, and the rest go on.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pluggy

from pegboard import hookspecs
from pegboard.errors import PegboardError, PluginError
from pegboard.registry import HOOKS, Registry, check_offer, nearest, offered_name

__all__ = ["ENTRY_POINT_GROUP", "LoadedPlugins", "PluginRecord", "load_plugins"]

ENTRY_POINT_GROUP = "pegboard"
_BUILT_INS = "pegboard_plugins"
"""Found by name: the core imports no plugin, and runs without any."""
_OUR_FRAMES = (str(Path(__file__).parent), str(Path(pluggy.__file__).parent), "<frozen ")


class PluginRecord(NamedTuple):
    """One plugin that was found, whatever became of it."""

    name: str
    """What `--block` and `"plugin"` take."""
    origin: str
    """`built-in`, `distribution NAME` or `file PATH`."""
    version: str
    """Version of its distribution; empty if it has none."""
    status: Literal["loaded", "blocked", "broken"]
    reason: str
    """Why it is broken; empty otherwise."""


@dataclass(frozen=True)
class LoadedPlugins:
    """What `load_plugins` found."""

    registry: Registry
    plugins: tuple[PluginRecord, ...]
    """In load order."""
    warnings: tuple[str, ...]
    """One line for each broken plugin and each block that blocked nothing."""

    def describe(self) -> list[dict[str, Any]]:
        """Every plugin and its parts as JSON values: for `plugins --json` and the run folder."""
        return [
            {
                **record._asdict(),
                "parts": [
                    {"kind": entry.kind, "class_name": entry.class_name, "summary": entry.summary}
                    for entry in self.registry.entries()
                    if entry.plugin == record.name
                ],
            }
            for record in self.plugins
        ]


@dataclass(frozen=True)
class _Source:
    """A plugin that has not been imported yet."""

    name: str
    origin: str
    version: str
    load: Callable[[], object]
    remedy: str
    """How to run without it."""


def load_plugins(
    extra_files: Iterable[str | Path] = (),
    block: Iterable[str] = (),
    third_party: bool = True,
) -> LoadedPlugins:
    """Find and load every plugin into a new registry.

    Args:
        extra_files: `--plugin` files; each is imported as the module of its stem, with its folder
        at the end
            of `sys.path` (so that spawned workers can import it too).
        block: names of plugins to leave out, unimported.
        third_party: whether to look for entry points.

    Raises:
        PluginError: an extra file does not exist. A plugin that is there but broken raises nothing.
    """
    registry = Registry()
    manager = pluggy.PluginManager("pegboard")
    manager.add_hookspecs(hookspecs)
    blocked = set(block)
    records: list[PluginRecord] = []
    warnings: list[str] = []
    for source in _sources(tuple(extra_files), third_party=third_party):
        status: Literal["loaded", "blocked", "broken"] = "loaded"
        reason = ""
        if source.name in blocked:
            status = "blocked"
        else:
            try:
                _load(source, manager, registry)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - a stranger's import
                status, reason = "broken", _describe(error)
                registry.note_broken(source.name, reason)
                version = f" {source.version}" if source.version else ""
                warnings.append(
                    f"plugin '{source.name}' ({source.origin}{version}) is left out: "
                    f"{reason}. {source.remedy}"
                )
        records.append(PluginRecord(source.name, source.origin, source.version, status, reason))
    found = [record.name for record in records]
    for name in sorted(blocked.difference(found)):
        near = nearest(name, found)
        hint = f" Did you mean '{near}'?" if near else ""
        warnings.append(f"--block {name}: no plugin of that name is installed.{hint}")
    return LoadedPlugins(registry, tuple(records), tuple(warnings))


def _sources(extra_files: tuple[str | Path, ...], *, third_party: bool) -> Iterator[_Source]:
    taken: set[str] = set()
    for source in _built_ins():
        taken.add(source.name)
        yield source
    for source in _entry_points(taken) if third_party else ():
        taken.add(source.name)
        yield source
    for source in _files(extra_files, taken):
        taken.add(source.name)
        yield source


def _built_ins() -> Iterator[_Source]:
    try:
        package = importlib.import_module(_BUILT_INS)
    except ModuleNotFoundError as error:
        if error.name != _BUILT_INS:
            raise
        return
    modules = sorted(pkgutil.iter_modules(package.__path__), key=lambda module: module.name)
    for module in modules:
        name = f"{_BUILT_INS}.{module.name}"
        if module.ispkg and _may_have_hooks(name):
            yield _Source(
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
    read = getattr(spec.loader if spec else None, "get_source", None)
    text = read(name) if read else None
    return text is None or "hookimpl" in text


def _entry_points(taken: set[str]) -> Iterator[_Source]:
    points = sorted(
        importlib.metadata.entry_points(group=ENTRY_POINT_GROUP),
        key=lambda point: (point.name, point.value),
    )
    owners = [point.dist.name if point.dist else point.name for point in points]
    alone = {owner for owner, count in Counter(owners).items() if count == 1}
    for point, owner in zip(points, owners, strict=True):
        name = owner if owner in alone and owner not in taken else f"{owner}:{point.name}"
        yield _Source(
            name,
            f"distribution {owner}",
            point.dist.version if point.dist else "",
            point.load,
            f"Run without it: --block {name}",
        )


def _files(files: tuple[str | Path, ...], taken: set[str]) -> Iterator[_Source]:
    for given in files:
        path = Path(given)
        if not path.is_file() or path.suffix != ".py":
            raise PluginError(f"--plugin {given}: no such Python file (relative to {Path.cwd()})")
        name = path.stem if path.stem not in taken else path.name
        yield _Source(
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


def _load(source: _Source, manager: pluggy.PluginManager, registry: Registry) -> None:
    """Import one plugin and call its hooks; the registry changes only if all of it is sound."""
    plugin = source.load()
    earlier = manager.get_name(plugin)
    if earlier is not None:
        raise PluginError(f"it is the same module as plugin '{earlier}'; offer it once")
    offered: list[tuple[str, type[Any]]] = []
    try:
        manager.register(plugin, source.name)
        _check_hooks(plugin, manager)
        everyone_else = [other for other in manager.get_plugins() if other is not plugin]
        for kind, hook_name in HOOKS.items():
            hook = manager.subset_hook_caller(hook_name, everyone_else)
            hook(register=_register(kind, offered))
    except BaseException:
        # pluggy keeps a plugin that it has just refused.
        if manager.is_registered(plugin):
            manager.unregister(plugin)
        raise
    for kind, cls in offered:
        registry.add(kind, cls, source.name)


def _register(kind: str, offered: list[tuple[str, type[Any]]]) -> Callable[[type[Any]], None]:
    def register(cls: type[Any]) -> None:
        check_offer(kind, cls)
        name = offered_name(kind, cls)
        if any((kind, name) == (other, offered_name(other, known)) for other, known in offered):
            raise PluginError(f"{kind.replace('_', ' ')} '{name}' is registered twice; keep one")
        offered.append((kind, cls))

    return register


def _check_hooks(plugin: object, manager: pluggy.PluginManager) -> None:
    callers = manager.get_hookcallers(plugin) or []
    if not callers:
        raise PluginError("it has no hooks; mark its register functions with @pegboard.hookimpl")
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        known = list(HOOKS.values())
        # Only this plugin can be at fault: each one before it passed the same check.
        for caller in callers:
            if not caller.has_spec():
                near = nearest(caller.name, known)
                hint = f" Did you mean '{near}'?" if near else f" Hooks: {', '.join(known)}."
                raise PluginError(f"there is no hook '{caller.name}'.{hint}") from error
        raise


def _describe(error: BaseException) -> str:
    """One line: the plugin's own place, then what happened there."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_OUR_FRAMES)
        and not frame.filename.startswith(str(Path(importlib.__file__).parent))
    ]
    place = f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""
    if isinstance(error, SyntaxError) and error.filename:
        place = f"{error.filename}:{error.lineno}: "
    text = " ".join(str(error).split())
    if isinstance(error, PegboardError):
        return f"{place}{text}"
    return f"{place}{type(error).__name__}: {text}"
