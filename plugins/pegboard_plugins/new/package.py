"""Write a package from templates: real files in which a few words stand for names.

`templates/every_kind/` is in every package; `templates/KIND/` has the part, its tests and its
example. A file keeps its place and loses `.template`; `dot_` at the front of a name is a dot. What
a new kind needs is a folder here.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from pegboard.component import COMPONENT_KINDS
from pegboard.errors import ConfigError
from pegboard.registry import HOOKS

from .names import PackageNames, names_for

__all__ = ["render_package", "template_kinds", "write_package"]

_EVERY_KIND = "every_kind"
_SUFFIX = ".template"


def write_package(distribution: str, kind: str, folder: str | Path = ".") -> str:
    """Write `folder/distribution`, whole or not at all; returns what a person is to read.

    Raises:
        ConfigError: a name that won't do, no such folder, or the package's folder is there already.
    """
    names = names_for(distribution, kind)
    parent = Path(folder)
    if not parent.is_dir():
        raise ConfigError(
            f"--folder: no folder '{folder}' (relative to {Path.cwd()}); make it first"
        )
    target = parent / distribution
    if target.exists() or target.is_symlink():
        raise ConfigError(
            f"{target}: is there already, and nothing in it is touched; "
            "take another NAME or another --folder"
        )
    files = render_package(names)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{distribution}.") as draft:
        made = Path(draft) / distribution
        for place, text in files.items():
            file = made / place
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        shutil.move(made, target)
    what = f"a {kind.replace('_', ' ')}, {names.part_name}"
    steps = [f"cd {target}", 'pip install -e ".[dev]"', "pytest", *_commands(names).splitlines()]
    return "\n".join([f"wrote {target}: {what}, in {len(files)} files. Next:", *_indented(steps)])


def render_package(names: PackageNames) -> dict[str, str]:
    """Place in the package -> text, of every file, in the order of their places."""
    templates = {**_templates_of(_EVERY_KIND), **_templates_of(names.kind)}
    about = templates.pop("about.md").strip()
    words = {
        "ABOUT": about,
        "COMMANDS": _commands(names),
        "EXAMPLE": templates["example/run.json"].strip(),
    }
    # What these stand for holds words that stand for names.
    pairs = [*words.items(), *_words(names).items()]
    files = {}
    for place in sorted(templates):
        files[_replaced(place, pairs)] = _replaced(templates[place], pairs)
    return files


def template_kinds() -> frozenset[str]:
    """Kinds that have a folder of templates."""
    return frozenset(entry.name for entry in _root().iterdir() if entry.is_dir()) - {_EVERY_KIND}


def _words(names: PackageNames) -> Mapping[str, str]:
    return {
        "DIST_NAME": names.distribution,
        "PACKAGE_NAME": names.package,
        "PART_CLASS": names.part_class,
        "PART_WORD": names.part_word,
        "PART_NAME": names.part_name,
        "KIND_WORDS": names.kind.replace("_", " "),
        "KIND": names.kind,
        "HOOK": HOOKS[names.kind],
    }


def _commands(names: PackageNames) -> str:
    if names.kind in COMPONENT_KINDS:
        return "pegboard check example/run.json\npegboard train example/run.json"
    return f"pegboard {names.part_word} example/run.json"


def _replaced(text: str, pairs: list[tuple[str, str]]) -> str:
    for word, value in pairs:
        text = text.replace(word, value)
    return text


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _root() -> Traversable:
    return resources.files(__package__).joinpath("templates")


def _templates_of(folder: str) -> dict[str, str]:
    """Place -> text."""
    found: dict[str, str] = {}

    def walk(entry: Traversable, place: str) -> None:
        for child in entry.iterdir():
            name = child.name.replace("dot_", ".", 1) if child.name[:4] == "dot_" else child.name
            inner = f"{place}/{name}" if place else name
            if child.is_dir():
                walk(child, inner)
            elif name.endswith(_SUFFIX):
                found[inner.removesuffix(_SUFFIX)] = child.read_text(encoding="utf-8")

    walk(_root().joinpath(folder), "")
    return found
