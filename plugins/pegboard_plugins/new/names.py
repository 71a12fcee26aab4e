"""What the parts of a new package are called, all from its name and the kind of its part."""

from __future__ import annotations

import importlib.util
import keyword
import re
import sys
from typing import NamedTuple

from pegboard.command import CORE_COMMANDS
from pegboard.component import COMPONENT_KINDS
from pegboard.errors import ConfigError
from pegboard.registry import HOOKS, Registry, nearest

__all__ = ["PackageNames", "check_part_name", "names_for"]

_DISTRIBUTION = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?", re.IGNORECASE)
_COMMAND = "command"


class PackageNames(NamedTuple):
    """Names of one package."""

    distribution: str
    """What pip installs, and the folder: `pegboard-rivers`."""
    package: str
    """What Python imports: `pegboard_rivers`."""
    kind: str
    part_class: str
    """`RiversDataset`."""
    part_word: str
    """`rivers`: what a command is called on the command line."""

    @property
    def part_name(self) -> str:
        """What a config or a person names the part by."""
        return self.part_word if self.kind == _COMMAND else self.part_class


def names_for(distribution: str, kind: str) -> PackageNames:
    """All names of a package.

    Raises:
        ConfigError: no such kind, or the name can't be that of a distribution or of an import.
    """
    if kind not in HOOKS:
        near = nearest(kind, HOOKS)
        hint = f" Did you mean '{near}'?" if near else ""
        raise ConfigError(f"--kind: no kind named '{kind}'.{hint} Kinds: {', '.join(HOOKS)}")
    where = f"NAME: '{distribution}'"
    if not _DISTRIBUTION.fullmatch(distribution):
        raise ConfigError(
            f"{where} can't be the name of a distribution; expected letters, digits, '-', '_' and "
            "'.', with a letter or digit at both ends, such as 'pegboard-rivers'"
        )
    package = re.sub(r"[-_.]+", "_", distribution).lower()
    if not package.isidentifier() or keyword.iskeyword(package):
        raise ConfigError(
            f"{where} would be imported as '{package}', which Python can't; "
            "take a name that begins with a letter and is no keyword, such as 'pegboard-rivers'"
        )
    _check_free(where, package)
    words = [word for word in package.split("_") if word] or [package]
    if len(words) > 1 and words[0] == "pegboard":
        words = words[1:]  # every part of pegboard-x would begin with the same word
    part_class = _class_name(words, kind)
    part_word = "-".join(words)
    if kind == _COMMAND and not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", part_word):
        raise ConfigError(
            f"{where} would give a command called '{part_word}'; take a name that begins with a letter"
        )
    if kind == _COMMAND and part_word in CORE_COMMANDS:
        raise ConfigError(
            f"{where} would give a command called '{part_word}', which is one of the core's; "
            "take another name"
        )
    return PackageNames(distribution, package, kind, part_class, part_word)


def check_part_name(names: PackageNames, registry: Registry) -> None:
    """That no plugin here offers a part of that name: neither could then be named alone.

    Raises:
        ConfigError: one does.
    """
    for entry in registry.entries():
        if (entry.kind, entry.class_name) == (names.kind, names.part_name):
            raise ConfigError(
                f"NAME: '{names.distribution}' would call its {names.kind.replace('_', ' ')} "
                f"'{names.part_name}', which plugin '{entry.plugin}' offers; take another name"
            )


def _check_free(where: str, package: str) -> None:
    if package in sys.stdlib_module_names:
        taken_by = "Python itself"
    else:
        spec = importlib.util.find_spec(package)
        # A folder that happens to lie on the path is no package (it has no origin).
        if spec is None or spec.origin is None:
            return
        taken_by = spec.origin
    raise ConfigError(
        f"{where} would be imported as '{package}', which is taken by {taken_by}; take another name"
    )


def _class_name(words: list[str], kind: str) -> str:
    suffix = (
        "Command"
        if kind == _COMMAND
        else COMPONENT_KINDS[kind].base.__name__.removesuffix("Component")
    )
    stem = "".join(word[0].upper() + word[1:] for word in words)
    if stem[0].isdigit():
        stem = f"_{stem}"
    # `pegboard-rivers-dataset` makes a RiversDataset, not a RiversDatasetDataset.
    if stem.lower().endswith(suffix.lower()) and len(stem) > len(suffix):
        stem = stem[: -len(suffix)]
    return stem + suffix
