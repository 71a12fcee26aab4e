"""What `pegboard plugins` says: every part, one hook's implementations, or the contested names.

Each listing is given twice, as JSON values for `--json` and as lines for a person.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from pegboard.component import ModelComponent
from pegboard.errors import PluginError
from pegboard.registry import HOOKS, Entry, nearest

if TYPE_CHECKING:
    from pegboard.plugin_manager import LoadedPlugins

__all__ = ["list_conflicts", "list_hook", "list_parts"]

Listing: TypeAlias = "tuple[list[dict[str, Any]], list[str]]"
"""JSON values and lines."""


def list_parts(plugins: LoadedPlugins) -> Listing:
    """Every part that a config can name, then every plugin that is not loaded."""
    rows = [
        (entry.kind, entry.class_name, entry.plugin, entry.summary)
        for entry in plugins.registry.entries()
    ]
    lines = _aligned(rows)
    for record in plugins.plugins:
        if record.status != "loaded":
            reason = f": {record.reason}" if record.reason else ""
            lines.append(f"{record.status}: {record.name} ({record.origin}){reason}")
    return plugins.describe(), lines


def list_hook(plugins: LoadedPlugins, hook: str) -> Listing:
    """Who implements a hook, in call order.

    Raises:
        PluginError: there is no such hook.
    """
    known = list(HOOKS.values())
    if hook not in known:
        near = nearest(hook, known)
        hint = f"Did you mean '{near}'?" if near else f"Hooks: {', '.join(known)}."
        raise PluginError(f"--hook {hook}: there is no hook of that name. {hint}")
    values: list[dict[str, Any]] = [
        {
            "plugin": one.plugin,
            **_origin(plugins, one.plugin),
            "place": one.place,
            "offered": list(one.offered),
        }
        for one in plugins.hooks
        if one.hook == hook
    ]
    lines = _aligned(
        (v["plugin"], _from(v), v["place"], ", ".join(v["offered"]) or "nothing") for v in values
    )
    return values, lines or [f"no plugin implements {hook}"]


def list_conflicts(plugins: LoadedPlugins) -> Listing:
    """Names that several plugins offer: an error where a config uses one of them."""
    offers: dict[tuple[str, str], list[Entry]] = {}
    for entry in plugins.registry.entries():
        offers.setdefault((entry.kind, entry.class_name), []).append(entry)
        if issubclass(entry.cls, ModelComponent):
            for model_type in entry.cls.hf_model_types:
                offers.setdefault(("model_type", model_type), []).append(entry)
            for preset in entry.cls.presets:
                offers.setdefault(("preset", preset), []).append(entry)
    values, lines = [], []
    for (kind, name), entries in offers.items():
        if len(entries) < 2:
            continue
        found = [
            {
                "plugin": entry.plugin,
                **_origin(plugins, entry.plugin),
                "class_name": entry.cls.__name__,
                "place": _class_place(entry.cls),
            }
            for entry in entries
        ]
        values.append({"kind": kind, "name": name, "offers": found})
        lines.append(f"{kind} '{name}':")
        rows = [
            (f"  {one['plugin']}", _from(one), one["class_name"], one["place"]) for one in found
        ]
        lines += _aligned(rows)
    if lines:
        lines.append(
            'pick one with "plugin" beside "class_name", or leave one out with --block NAME'
        )
    return values, lines or ["no name is offered by several plugins"]


def _origin(plugins: LoadedPlugins, name: str) -> dict[str, str]:
    [record] = [record for record in plugins.plugins if record.name == name]
    return {"origin": record.origin, "version": record.version}


def _from(value: dict[str, Any]) -> str:
    return f"{value['origin']} {value['version']}".strip()


def _class_place(cls: type[Any]) -> str:
    """`file:line`; empty for a class that has no source."""
    try:
        return f"{inspect.getsourcefile(cls)}:{inspect.getsourcelines(cls)[1]}"
    except (OSError, TypeError):
        return ""


def _aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines with columns of one width; the last column as it is."""
    rows = list(rows)
    widths = [
        max((len(row[i]) for row in rows), default=0)
        for i in range(len(rows[0]) - 1 if rows else 0)
    ]
    return [
        "  ".join(
            (*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1])
        ).rstrip()
        for row in rows
    ]
