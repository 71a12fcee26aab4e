"""Import plugins one at a time, and let each offer its parts.

All or nothing: a plugin that can't be imported or breaks the contract is recorded as broken with its
origin, the reason and how to block it, and the rest go on. What is blocked or not allowed is listed
and never imported.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import pluggy

from pegboard import hookspecs
from pegboard.errors import PluginError
from pegboard.plugin_faults import check_hooks, describe_fault, signature_fault
from pegboard.plugin_guard import guarded
from pegboard.plugin_index import PluginIndex
from pegboard.plugin_sources import ENTRY_POINT_GROUP, PluginSource, find_plugins, plain_name
from pegboard.plugin_trace import implementation_place, trace_hooks, trace_import
from pegboard.registry import HOOKS, Registry, check_offer, nearest, offered_name

__all__ = [
    "ENTRY_POINT_GROUP",
    "HookImplementation",
    "LoadedPlugins",
    "PluginRecord",
    "load_plugins",
]

Status = Literal["loaded", "blocked", "not allowed", "broken"]


class PluginRecord(NamedTuple):
    """One plugin that was found, whatever became of it."""

    name: str
    """What `--block` and `"plugin"` take."""
    origin: str
    """`built-in`, `distribution NAME` or `file PATH`."""
    version: str
    """Version of its distribution; empty if it has none."""
    status: Status
    reason: str
    """Why it is broken or not allowed; empty otherwise."""
    home: str = ""
    """Folder of its package, or its file; empty if it is not loaded."""


class HookImplementation(NamedTuple):
    """One function of a loaded plugin that a hook called."""

    hook: str
    plugin: str
    place: str
    """`file:line`; empty for what is no Python function."""
    offered: tuple[str, ...]
    """Names that it registered."""


@dataclass(frozen=True)
class LoadedPlugins:
    """What `load_plugins` found."""

    registry: Registry
    plugins: tuple[PluginRecord, ...]
    """In load order."""
    hooks: tuple[HookImplementation, ...]
    """In call order."""
    warnings: tuple[str, ...]
    """One line for each broken plugin, each that changed what all code shares or has a deprecated
    hook, and each name that blocked or allowed nothing."""

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


def load_plugins(
    extra_files: Iterable[str | Path] = (),
    block: Iterable[str] = (),
    third_party: bool = True,
    allow: Collection[str] | None = None,
    trace: bool = False,
) -> LoadedPlugins:
    """Find and load every plugin into a new registry.

    Args:
        extra_files: `--plugin` files; each is imported as the module of its stem, with its folder
            at the end of `sys.path` (so that spawned workers can import it too).
        block: names of plugins to leave out, unimported.
        third_party: whether to look for entry points.
        allow: distributions whose plugins may be imported; None: any. Built-ins and files always may.
        trace: print every import and hook call to stderr.

    Raises:
        PluginError: an extra file does not exist. A plugin that is there but broken raises nothing.
    """
    registry = Registry(PluginIndex(third_party=third_party))
    loader = _Loader(registry, trace)
    blocked, allowed = set(block), None if allow is None else set(map(plain_name, allow))
    sources = find_plugins(tuple(extra_files), third_party=third_party)
    records = [loader.load(source, _left_out(source, blocked, allowed)) for source in sources]
    found = [source.name for source in sources]
    for name in sorted(blocked.difference(found)):
        near = nearest(name, found)
        hint = f" Did you mean '{near}'?" if near else ""
        loader.warnings.append(f"--block {name}: no plugin of that name is installed.{hint}")
    if third_party and allow:
        loader.warnings += _allowed_for_nothing(allow, sources)
    return LoadedPlugins(registry, tuple(records), tuple(loader.hooks), tuple(loader.warnings))


def _left_out(
    source: PluginSource, blocked: Collection[str], allowed: Collection[str] | None
) -> tuple[Status, str] | None:
    """Status and reason of a plugin that must not be imported; None if it may."""
    if source.name in blocked:
        return "blocked", ""
    if allowed is None or source.distribution is None:
        return None
    if plain_name(source.distribution) in allowed:
        return None
    return "not allowed", '"plugins.allow" of the config does not name it'


def _allowed_for_nothing(allow: Collection[str], sources: Sequence[PluginSource]) -> list[str]:
    installed = {s.distribution for s in sources if s.distribution is not None}
    plain = set(map(plain_name, installed))
    lines = []
    for name in allow:
        if plain_name(name) not in plain:
            near = nearest(name, installed)
            hint = f" Did you mean '{near}'?" if near else ""
            lines.append(f"plugins.allow: no distribution '{name}' offers a plugin here.{hint}")
    return lines


class _Loader:
    """Loads one plugin after another into one registry."""

    def __init__(self, registry: Registry, trace: bool) -> None:
        self.registry = registry
        self.hooks: list[HookImplementation] = []
        self.warnings: list[str] = []
        self._trace = trace
        self._manager = pluggy.PluginManager("pegboard")
        self._manager.add_hookspecs(hookspecs)
        if trace:
            trace_hooks(self._manager)

    def load(self, source: PluginSource, left_out: tuple[Status, str] | None) -> PluginRecord:
        """Load one plugin, or only record why it is not."""
        if left_out is not None:
            status, reason = left_out
            self.registry.note_left_out(source.name, f"is {status}")
            return PluginRecord(source.name, source.origin, source.version, status, reason)
        status, reason, home, notes = "loaded", "", "", []
        try:
            with guarded(source) as notes:
                home = self._load(source, notes)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - a stranger's code, SystemExit included
            status, reason = "broken", describe_fault(error)
            self.registry.note_left_out(source.name, f"could not be loaded: {reason}")
            self.warnings.append(f"plugin {source} is left out: {reason}. {source.remedy}")
        if notes:
            self.warnings.append(f"plugin {source}: {'; '.join(notes)}. {source.remedy}")
        return PluginRecord(source.name, source.origin, source.version, status, reason, home)

    def _load(self, source: PluginSource, notes: list[str]) -> str:
        """Import one plugin and call its hooks; the registry changes only if all of it is sound.

        Returns its home.
        """
        with trace_import(source.name) if self._trace else nullcontext():
            plugin = source.load()
        earlier = self._manager.get_name(plugin)
        if earlier is not None:
            raise PluginError(f"it is the same module as plugin '{earlier}'; offer it once")
        offers: list[_Register] = []
        try:
            self._register(plugin, source.name, notes)
            everyone_else = [other for other in self._manager.get_plugins() if other is not plugin]
            for kind, hook_name in HOOKS.items():
                register = _Register(kind)
                self._manager.subset_hook_caller(hook_name, everyone_else)(register=register)
                offers.append(register)
        except BaseException:
            # pluggy keeps a plugin that it has just refused.
            if self._manager.is_registered(plugin):
                self._manager.unregister(plugin)
            raise
        for register in offers:
            for cls in register.classes:
                self.registry.add(register.kind, cls, source.name)
            self._note_implementations(plugin, source.name, register)
        return _home(plugin, source)

    def _register(self, plugin: object, name: str, notes: list[str]) -> None:
        """Register and verify; what pluggy warns of (a deprecated hook) is a note, never an error."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                self._manager.register(plugin, name)
            except pluggy.PluginValidationError as error:
                raise signature_fault(plugin, error) from error
            check_hooks(plugin, self._manager)
        notes += [f"{one.filename}:{one.lineno}: {one.message}" for one in caught]

    def _note_implementations(self, plugin: object, name: str, register: _Register) -> None:
        hook = HOOKS[register.kind]
        for implementation in getattr(self._manager.hook, hook).get_hookimpls():
            if implementation.plugin is plugin:
                place = implementation_place(implementation.function)
                self.hooks.append(HookImplementation(hook, name, place, tuple(register.names)))


class _Register:
    """What a hook calls with each class: it is checked then and there, at the line that offers it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.names: list[str] = []
        self.classes: list[type[Any]] = []

    def __call__(self, cls: type[Any]) -> None:
        check_offer(self.kind, cls)
        name = offered_name(self.kind, cls)
        if name in self.names:
            what = self.kind.replace("_", " ")
            raise PluginError(f"{what} '{name}' is registered twice; keep one")
        self.names.append(name)
        self.classes.append(cls)


def _home(plugin: object, source: PluginSource) -> str:
    """Folder of the plugin's package (the whole of a distribution's), or its file."""
    owner = plugin if isinstance(plugin, ModuleType) else sys.modules.get(type(plugin).__module__)
    name = owner.__name__ if owner is not None else ""
    if source.distribution is not None:
        steps = name.split(".")
        # A namespace package has no file and is shared with others.
        prefixes = [".".join(steps[: count + 1]) for count in range(len(steps))]
        name = next((p for p in prefixes if getattr(sys.modules.get(p), "__file__", None)), name)
    file = getattr(sys.modules.get(name), "__file__", None)
    if not file:
        return ""
    path = Path(file).resolve()
    return str(path.parent if path.name == "__init__.py" else path)
