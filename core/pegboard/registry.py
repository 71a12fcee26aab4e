"""From (kind, class_name) to a class and the plugin that offers it.

A class is checked when it is added, so the guilty line of the plugin is in the traceback. Two
plugins may offer one name: that is an error only when the name is used without `"plugin"`. There is
no global registry: the plugin manager fills one and hands it on.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

from pegboard.command import Command, check_command
from pegboard.component import (
    COMPONENT_KINDS,
    TAKEN_OUT,
    Component,
    ComponentConfig,
    ModelComponent,
)
from pegboard.errors import ConfigError, PluginError
from pegboard.json_schema import check_schema_form
from pegboard.plugin_index import PluginIndex
from pegboard.schema_config import SchemaConfig

__all__ = [
    "HOOKS",
    "Entry",
    "Registry",
    "check_component",
    "check_offer",
    "nearest",
    "offered_name",
]

_COMMAND = "command"
_OWN_PART = (
    "A part of your own must be registered, in a --plugin file or an installed package, "
    "by a function marked @pegboard.hookimpl."
)
HOOKS: Mapping[str, str] = {
    **{kind: entry.hook for kind, entry in COMPONENT_KINDS.items()},
    _COMMAND: "register_commands",
}
"""The hook that offers each kind, commands included."""

_TAKEN_FIELDS = frozenset({"class_name", "plugin"})
"""Keys of a part's JSON that the core reads itself: a Config field of that name is never set."""


class Entry(NamedTuple):
    """One class that a JSON file can name, or a command."""

    kind: str
    class_name: str
    """Of a command, its word on the command line."""
    plugin: str
    cls: type[Any]

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.cls) or "").split("\n", 1)[0].strip()


class Registry:
    """Every registered class, by kind and name, with its plugin."""

    def __init__(self, index: PluginIndex | None = None) -> None:
        self.index = index or PluginIndex(third_party=False)
        """Who else offers a name."""
        self._entries: dict[str, dict[str, list[Entry]]] = {kind: {} for kind in COMPONENT_KINDS}
        self._entries[_COMMAND] = {}
        self._left_out: dict[str, str] = {}

    def add(self, kind: str, cls: type[Any], plugin_name: str) -> None:
        """Offer `cls` under its own name.

        Raises:
            PluginError: `cls` breaks the contract of its kind, or the plugin offers the name twice.
        """
        check_offer(kind, cls)
        name = offered_name(kind, cls)
        offers = self._entries[kind].setdefault(name, [])
        if any(entry.plugin == plugin_name for entry in offers):
            raise PluginError(
                f"{_spell(kind)} '{name}' is registered twice by one plugin; keep one"
            )
        offers.append(Entry(kind, name, plugin_name, cls))

    def note_left_out(self, plugin_name: str, reason: str) -> None:
        """Remember a plugin that is not loaded: its parts may be what a config looks for.

        Args:
            reason: a clause such as "is blocked".
        """
        self._left_out[plugin_name] = reason

    @property
    def left_out(self) -> Mapping[str, str]:
        """Name -> reason of every plugin that is installed and not loaded."""
        return self._left_out

    def find(self, kind: str, class_name: str, plugin: str | None = None) -> type[Component]:
        """The class that a config names.

        Args:
            plugin: the plugin to take it from; needed only where several offer the name.

        Raises:
            ConfigError: no such name (with the near miss), or more than one plugin offers it.
        """
        return self._find(kind, class_name, plugin).cls

    def offered_elsewhere(self, kind: str, name: str) -> str:
        """`. X offers it: ...`, to end a message on a missing name; empty if no index knows it.

        Args:
            kind: a kind of part, `command`, or `model_type` and `preset` of models.
        """
        hint = self.index.hint(kind, name, self._left_out)
        return f". {hint}" if hint else ""

    def plugin_of(self, kind: str, class_name: str) -> str:
        """Name of the plugin that offers a class; raises ConfigError as `find` does."""
        return self._find(kind, class_name, None).plugin

    def names(self, kind: str) -> tuple[str, ...]:
        """Class names of a kind, sorted."""
        return tuple(sorted(self._of(kind)))

    def classes(self, kind: str) -> tuple[type[Component], ...]:
        """Classes of a kind in the order of their names; a contested name gives each of them."""
        return tuple(entry.cls for name in self.names(kind) for entry in self._of(kind)[name])

    def entries(self) -> tuple[Entry, ...]:
        """Everything, by kind (as in COMPONENT_KINDS), then by name, then in load order."""
        return tuple(
            entry
            for kind, by_name in self._entries.items()
            for name in sorted(by_name)
            for entry in by_name[name]
        )

    def commands(self) -> tuple[type[Command], ...]:
        """The commands of plugins in the order of their names, without contested ones."""
        offers = [self._entries[_COMMAND][name] for name in sorted(self._entries[_COMMAND])]
        return tuple(entries[0].cls for entries in offers if len(entries) == 1)

    def check_command_name(self, name: str) -> None:
        """ConfigError if several plugins offer a command of that name, or one that is not loaded may.

        A name that nobody knows passes: the argument parser says what there is.
        """
        offers = self._entries[_COMMAND].get(name, [])
        if not offers:
            elsewhere = self.index.hint(_COMMAND, name, self._left_out) or self._may_be_in()
            if elsewhere:
                raise ConfigError(f"there is no command '{name}'. {elsewhere}")
        if len(offers) > 1:
            owners = ", ".join(f"'{entry.plugin}'" for entry in offers)
            raise ConfigError(
                f"command '{name}' is offered by {owners}; leave one out with --block"
            )

    def for_hf_model_type(self, model_type: str) -> type[ModelComponent] | None:
        """The model class that a published config's `model_type` means; None if there is none.

        Raises:
            ConfigError: several classes claim it.
        """
        found = [cls for cls in self._models() if model_type in cls.hf_model_types]
        if len(found) > 1:
            raise ConfigError(self._contested(f"model_type '{model_type}'", found))
        return found[0] if found else None

    def for_preset(self, name: str) -> tuple[str, Mapping[str, Any]] | None:
        """(class name, fields) of a model preset; None if there is none.

        Raises:
            ConfigError: several classes have a preset of that name.
        """
        found = [cls for cls in self._models() if name in cls.presets]
        if len(found) > 1:
            raise ConfigError(self._contested(f"preset '{name}'", found))
        return (found[0].__name__, found[0].presets[name]) if found else None

    def preset_names(self) -> tuple[str, ...]:
        """Names of all model presets, sorted."""
        return tuple(sorted({name for cls in self._models() for name in cls.presets}))

    def _models(self) -> list[type[ModelComponent]]:
        return [cls for cls in self.classes("model") if issubclass(cls, ModelComponent)]

    def _contested(self, what: str, found: Iterable[type[Component]]) -> str:
        who = ", ".join(f"'{cls.__name__}' ({cls.__module__})" for cls in found)
        return (
            f'{what} is claimed by {who}; write "class_name" (and "plugin" where two have one name)'
        )

    def _of(self, kind: str) -> dict[str, list[Entry]]:
        if kind not in self._entries:
            raise KeyError(f"no kind '{kind}'; kinds are {', '.join(self._entries)}")
        return self._entries[kind]

    def _find(self, kind: str, class_name: str, plugin: str | None) -> Entry:
        offers = self._of(kind).get(class_name, [])
        if not offers:
            raise ConfigError(self._not_found(kind, class_name))
        chosen = [entry for entry in offers if plugin is None or entry.plugin == plugin]
        if not chosen:
            owners = ", ".join(f"'{entry.plugin}'" for entry in offers)
            raise ConfigError(
                f"plugin '{plugin}' offers no {_spell(kind)} '{class_name}'; {owners} does"
            )
        if len(chosen) > 1:
            owners = ", ".join(f"'{entry.plugin}'" for entry in chosen)
            raise ConfigError(
                f"{_spell(kind)} '{class_name}' is offered by {owners}; "
                f'write "plugin": "{chosen[0].plugin}" beside "class_name" to pick one, '
                "or leave one out with --block"
            )
        return chosen[0]

    def _not_found(self, kind: str, class_name: str) -> str:
        message = f"no {_spell(kind)} named '{class_name}'."
        others = [other for other in COMPONENT_KINDS if class_name in self._entries[other]]
        spellings = {
            spelling: name
            for name, offers in self._of(kind).items()
            for entry in offers
            for spelling in (*entry.cls.known_as, name)
        }
        near = nearest(class_name, spellings)
        likely = others or nearest(class_name, spellings, cutoff=0.8)
        elsewhere = self.index.hint(kind, class_name, self._left_out)
        if elsewhere:
            return f"{message} {elsewhere}"
        if others:
            section = COMPONENT_KINDS[others[0]].section
            message += f" There is a {_spell(others[0])} of that name, which belongs at {section}."
        elif near is not None:
            message += f" Did you mean '{spellings[near]}'?"
        if not others and near is None:
            known = ", ".join(self.names(kind)) or "none"
            message += f" Known: {known}."
        if not likely:
            message += f" {_OWN_PART}"
        return f"{message} {self._may_be_in()}".rstrip()

    def _may_be_in(self) -> str:
        names: dict[str, list[str]] = {}
        for name, reason in self._left_out.items():
            names.setdefault(reason, []).append(f"'{name}'")
        return " ".join(
            f"It may be in plugin {' or '.join(plugins)}, which {reason}."
            for reason, plugins in names.items()
        )


def check_offer(kind: str, cls: type[Any]) -> None:
    """Check what a plugin registers: a component of `kind`, or a command.

    Raises:
        PluginError: the first rule it breaks, and what to write instead.
    """
    if kind == _COMMAND:
        check_command(cls)
    else:
        check_component(kind, cls)


def offered_name(kind: str, cls: type[Any]) -> str:
    """The name under which a checked class is found."""
    return str(cls.name) if kind == _COMMAND else cls.__name__


def check_component(kind: str, cls: type[Any]) -> None:
    """Check what a class of `kind` must offer before a JSON file can name it.

    Raises:
        PluginError: the first rule it breaks, and what to write instead.
    """
    base = COMPONENT_KINDS[kind].base
    if not isinstance(cls, type):
        raise PluginError(
            f"register takes a class, not {cls!r}; write register({type(cls).__name__})"
        )
    who = f"{_spell(kind)} '{cls.__name__}'"
    if not issubclass(cls, base):
        _refuse_base(who, cls, base)
    if cls is base:
        raise PluginError(f"{who} is the base class itself; register a class derived from it")
    if not isinstance(cls.__doc__, str) or not cls.__doc__.strip():
        raise PluginError(
            f"{who} has no docstring; its first line is what `pegboard plugins` prints"
        )
    if getattr(cls, "build", None) is getattr(base, "build", None):
        raise PluginError(f"{who} has no build(); define it as {base.__name__} does")
    _check_names(who, cls)
    _check_config(who, cls)


def nearest(word: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The candidate most like `word` (lower-cased, without separators); None if none is close."""
    plain = {_plain(candidate): candidate for candidate in candidates}
    close = difflib.get_close_matches(_plain(word), plain, n=1, cutoff=cutoff)
    return plain[close[0]] if close else None


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()


def _spell(kind: str) -> str:
    return kind.replace("_", " ")


def _refuse_base(who: str, cls: type[Any], base: type[Component]) -> NoReturn:
    for other in COMPONENT_KINDS.values():
        if issubclass(cls, other.base):
            raise PluginError(
                f"{who} is a {other.base.__name__}, not a {base.__name__}; offer it in {other.hook}"
            )
    raise PluginError(
        f"{who} is not a {base.__name__}; write class {cls.__name__}({base.__name__}) "
        "with a Config and a build()"
    )


def _check_names(who: str, cls: type[Component]) -> None:
    """Class attributes that every lookup goes through, for other parts too."""
    for attribute in ("known_as", "hf_model_types"):
        words = getattr(cls, attribute, ())
        if not (isinstance(words, tuple) and all(isinstance(word, str) for word in words)):
            raise PluginError(f"{who}: {attribute} is {words!r}, expected a tuple of strings")
    presets = getattr(cls, "presets", {})
    if not (
        isinstance(presets, Mapping)
        and all(isinstance(n, str) and isinstance(f, Mapping) for n, f in presets.items())
    ):
        raise PluginError(f"{who}: presets is not a mapping of names to fields")
    for attribute in ("requires", "provides", "weight_fields"):
        words = getattr(cls, attribute, frozenset())
        if not isinstance(words, frozenset):
            raise PluginError(f"{who}: {attribute} is {words!r}, expected a frozenset of strings")


def _check_config(who: str, cls: type[Component]) -> None:
    config: type[ComponentConfig] = cls.Config
    if not (isinstance(config, type) and issubclass(config, ComponentConfig)):
        raise PluginError(
            f"{who}: Config is not a ComponentConfig; write class Config(ComponentConfig)"
        )
    if any(
        "config_schema" in vars(owner) and not issubclass(vars(owner)["Config"], SchemaConfig)
        for owner in cls.__mro__
        if owner is not Component and "Config" in vars(owner)
    ):
        raise PluginError(f"{who} has a Config and a config_schema; keep one of them")
    taken = {*_TAKEN_FIELDS, *TAKEN_OUT.get(cls.kind, ())}
    if issubclass(config, SchemaConfig):
        try:
            check_schema_form(config.json_schema, taken)
        except PluginError as error:
            raise PluginError(f"{who}: {error}") from None
        return
    for name, field in config.model_fields.items():
        if name in taken:
            raise PluginError(
                f"{who}: Config field '{name}' is read by the core; give it another name"
            )
        if not (field.description or "").strip():
            raise PluginError(
                f"{who}: Config field '{name}' has no description; write Field(description=...)"
            )
    if config is Component.Config:
        return  # no fields: nothing for a type checker to know
    # The annotation must be as near as the Config: an inherited one means the old Config.
    for owner in cls.__mro__:
        annotated = inspect.get_annotations(owner).get("config")
        if annotated is not None and owner is not Component:
            return
        if "Config" in vars(owner):
            break
    raise PluginError(
        f"{who} does not declare its config; write the line `config: Config` under class Config"
    )
