"""What a config says of plugins: which may be imported, and which must be there.

`plugins.allow` is read from the JSON before any third-party plugin is imported, so before the config
is validated; what is not a list of strings allows none, and validation then says so with its place.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pegboard.component import Problem
from pegboard.errors import ConfigError
from pegboard.json_source import load_layers
from pegboard.plugin_sources import plain_name

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from pegboard.plugin_manager import LoadedPlugins
    from pegboard.registry import Registry

__all__ = ["check_imported", "check_requires", "read_allowed", "read_allowed_of_words"]

_EXAMPLE = "'pegboard-sqlite>=1'"

_MAY_SAY = re.compile(r"""["'](plugins|extends)["']|\b(plugins|extends)\b[^\n]{0,3}[:=]""")
"""What only a config that says something of plugins, or that rests on another, has in its text."""
_ESCAPED = re.compile(r"\\u00([2-7][0-9a-fA-F])")


def read_allowed(
    path: str | os.PathLike[str], overrides: Sequence[str] = ()
) -> tuple[str, ...] | None:
    """Distributions that a config lets be imported; None: any. Nothing else of it is looked at.

    Raises:
        ConfigError: it can't be read as JSON.
    """
    section = load_layers(path, overrides).data.get("plugins")
    if section is None:
        return None
    allow = section.get("allow") if isinstance(section, dict) else ()
    if allow is None:
        return None
    if not isinstance(allow, list) or not all(isinstance(name, str) for name in allow):
        return ()
    return tuple(allow)


def read_allowed_of_words(words: Iterable[str], overrides: Sequence[str]) -> tuple[str, ...] | None:
    """As `read_allowed`, of a command line whose command is not known yet.

    Every word that is a file `*.json` counts; if several say something, only what all of them allow
    is allowed. What may be a config that says something, but can't be read, allows none.
    """
    allowed: tuple[str, ...] | None = None
    for word in words:
        if not word.endswith(".json") or not Path(word).is_file():
            continue
        try:
            one = read_allowed(word, overrides)
        except ConfigError:  # the command says what is wrong with it
            one = () if _may_say_what_is_allowed(Path(word), overrides) else None
        if one is not None:
            plain = set(map(plain_name, one))
            allowed = (
                one if allowed is None else tuple(n for n in allowed if plain_name(n) in plain)
            )
    return allowed


def _may_say_what_is_allowed(path: Path, overrides: Sequence[str]) -> bool:
    """Of a file that can't be read as a config, and is perhaps none: a file of records, say."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return True
    text = _ESCAPED.sub(lambda match: chr(int(match[1], 16)), text)
    return bool(_MAY_SAY.search(text)) or any(one.strip()[:7] == "plugins" for one in overrides)


def check_imported(plugins: LoadedPlugins, allow: Sequence[str] | None, path: Path) -> None:
    """That nothing was imported which the valid config does not allow.

    Raises:
        ConfigError: something was, as the command line did not show which file is the config.
    """
    if allow is None:
        return
    plain = set(map(plain_name, allow))
    for record in plugins.plugins:
        kind, _, distribution = record.origin.partition(" ")
        imported = kind == "distribution" and record.status in ("loaded", "broken")
        if imported and plain_name(distribution) not in plain:
            raise ConfigError(
                f"{path}: plugins.allow does not name '{distribution}', which was imported before "
                "this config was known; give the file a name that ends in .json, or use "
                f"--block {record.name}"
            )


def check_requires(data: Mapping[str, Any], registry: Registry) -> Iterator[Problem]:
    """Problems of `"requires": ["pegboard-sqlite>=1"]` with what is installed."""
    requires = data.get("requires")
    if not isinstance(requires, list):
        return
    for index, text in enumerate(requires):
        if isinstance(text, str):
            message = _unmet(text, registry)
            if message:
                yield Problem(("requires", index), message)


def _unmet(text: str, registry: Registry) -> str | None:
    """What is wrong with one requirement; None if it is met."""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        wanted = Requirement(text)
    except InvalidRequirement as error:
        reason = str(error).splitlines()[0]
        return (
            f"'{text}' is no requirement ({reason}); write a name and versions, such as {_EXAMPLE}"
        )
    if wanted.url or wanted.marker or wanted.extras:
        return f"'{text}': write a name and versions only, such as {_EXAMPLE}"
    try:
        installed = metadata.version(wanted.name)
        if not installed:  # whatever its type says: METADATA need not have one
            raise ValueError("no version")
        fits = wanted.specifier.contains(installed, prereleases=True)
    except metadata.PackageNotFoundError:
        return f"'{text}' is not installed; {_how_to_get(wanted, registry)}"
    except (KeyError, TypeError, ValueError):  # no METADATA, not a text, or a version that is none
        return (
            f"'{text}': the version of the installed {wanted.name} can't be read; install it anew"
        )
    if not fits:
        return f"'{text}', but {wanted.name} {installed} is installed; install a version that fits"
    for name, reason in registry.left_out.items():
        if plain_name(name.split(":", 1)[0]) == plain_name(wanted.name):
            return f"'{text}' is installed, but plugin '{name}' {reason}"
    return None


def _how_to_get(wanted: Requirement, registry: Registry) -> str:
    known = registry.index.install_of(wanted.name)
    if known:
        return known
    # The config may be a stranger's: no command to paste for a name that nobody here knows.
    return "install it if you trust who publishes that name"
