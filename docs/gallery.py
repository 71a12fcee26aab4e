"""docs/gallery.md: every built-in part by kind, and the example packages, each with what it says of itself."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from pegboard.component import COMPONENT_KINDS

if TYPE_CHECKING:
    from pegboard.plugin_manager import LoadedPlugins

__all__ = ["gallery_page"]

DOCS = Path(__file__).resolve().parent

HEADER = """# Gallery

Every part that ships, by kind, with its plugin and what it says of itself. Built-in parts are plugins like any other:
each folder of `plugins/pegboard_plugins/` can be read as an example. `pegboard plugins` prints this list for what is
installed, third-party parts included.
"""


def gallery_page(plugins: LoadedPlugins) -> str:
    """The page as Markdown."""
    parts = [HEADER]
    entries = list(plugins.registry.entries())
    for kind, what in COMPONENT_KINDS.items():
        rows = [
            f"| [`{entry.class_name}`](config_reference.md#{entry.class_name.lower()}) "
            f"| `{entry.plugin}` | {_summary(entry.cls.__doc__)} |\n"
            for entry in sorted(entries, key=lambda entry: entry.class_name)
            if entry.kind == kind
        ]
        title = f"## {kind.replace('_', ' ').capitalize()}\n"
        hook = (
            f"Named by `{what.section}`, offered through [`{what.hook}`](hooks/{what.hook}.md).\n"
        )
        table = "| class | plugin | what it is |\n|---|---|---|\n" + "".join(rows)
        parts += [title, hook, table if rows else "None ships.\n"]
    commands = [
        f"| `{cls.name}` | {_summary(cls.__doc__)} |\n" for cls in plugins.registry.commands()
    ]
    parts += [
        "## Command\n",
        "Offered through [`register_commands`](hooks/register_commands.md).\n",
        "| command | what it does |\n|---|---|\n" + "".join(commands),
    ]
    examples = sorted(DOCS.glob("examples/*/pyproject.toml"))
    if examples:
        parts += ["## Packages of their own\n", _EXAMPLES, "".join(map(_package, examples))]
    return "\n".join(parts).rstrip() + "\n"


_EXAMPLES = """Each is a whole distribution, as a third party would write it, and is tested with the wheel alone.
"""


def _package(path: Path) -> str:
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    readme = path.parent / "README.md"
    name = (
        f"[{project['name']}]({readme.relative_to(DOCS)})" if readme.is_file() else project["name"]
    )
    return f"- {name}: {project['description']}.\n"


def _summary(doc: str | None) -> str:
    return (doc or "").strip().split("\n", 1)[0].replace("|", "\\|").replace("<", "&lt;")
