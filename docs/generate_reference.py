"""Write the pages that say what the code says: config reference, schema, public API, gallery.

Run it after a config field or a public name changes: `python docs/generate_reference.py`. A test holds the files
to it. With `--release`, as part of a release, today's public names become those that later changes are told by.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "core"), str(ROOT / "plugins"), str(ROOT / "docs")]

from gallery import gallery_page  # noqa: E402
from public_api import api_page, surface  # noqa: E402

from pegboard.component import COMPONENT_KINDS  # noqa: E402
from pegboard.config_schema import run_config_schema  # noqa: E402
from pegboard.plugin_manager import load_plugins  # noqa: E402

HEADER = """# Config reference

Every field of a run config, generated from the schema that `pegboard schema` prints; an installed plugin's
parts appear there too. A part's own fields stand beside its `class_name`. `$comment` is ignored anywhere,
`"extends": "base.json"` takes the rest from another config.
"""


def generated_files() -> dict[Path, str]:
    """Path -> text of each generated file."""
    plugins = load_plugins(third_party=False)
    schema = run_config_schema(plugins.registry)
    return {
        ROOT / "docs" / "config_reference.md": _reference(schema),
        ROOT / "configs" / "run_config.schema.json": json.dumps(schema, indent=1) + "\n",
        ROOT / "docs" / "api.md": api_page(),
        ROOT / "docs" / "gallery.md": gallery_page(plugins),
        ROOT / "docs" / "public_api.txt": surface(),
    }


def _reference(schema: Mapping[str, Any]) -> str:
    definitions = schema["definitions"]
    parts = [HEADER, "## The run\n", _table(schema, schema["then"])]
    sections = sorted(name for name in definitions if name.startswith("run."))
    for name in sections:
        parts += [f"### {name.removeprefix('run.')}\n", _table(definitions[name])]
    for kind, what in COMPONENT_KINDS.items():
        parts.append(f"## {kind}: `{what.section}`\n")
        for name in sorted(definitions):
            head, _, rest = name.partition(".")
            if head != kind:
                continue
            description = definitions[name].get("description", "")
            parts += [
                f"### {rest}\n",
                description + "\n" if description else "",
                _table(definitions[name], definitions.get(f"complete.{name}", {}).get("then", {})),
            ]
    return "\n".join(part for part in parts if part).rstrip() + "\n"


def _table(schema: Mapping[str, Any], complete: Mapping[str, Any] | None = None) -> str:
    required = {*schema.get("required", ()), *(complete or {}).get("required", ())}
    hidden = {"$comment", "$schema", "class_name", "plugin", "extends"}
    rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for name, field in schema.get("properties", {}).items():
        if name in hidden or not isinstance(field, Mapping):
            continue
        default = "required" if name in required else ""
        if "default" in field:
            default = f"`{json.dumps(field['default'])}`"
        meaning = _text(str(field.get("description", "")))
        rows.append(f"| `{name}` | {_type(field)} | {default} | {meaning} |")
    return "\n".join(rows) + "\n" if len(rows) > 2 else "No fields.\n"


def _text(description: str) -> str:
    """For a cell of a table; `<image>` outside of code is no HTML."""
    parts = description.replace("|", "\\|").split("`")
    return "`".join(
        part if number % 2 else part.replace("<", "&lt;") for number, part in enumerate(parts)
    )


def _type(field: Mapping[str, Any]) -> str:
    if "enum" in field:
        return " or ".join(f"`{json.dumps(value)}`" for value in field["enum"])
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    for key in ("anyOf", "allOf"):
        if key in field:
            return " or ".join(_type(choice) for choice in field[key])
    if "$ref" in field:
        target = str(field["$ref"]).rsplit("/", 1)[-1]
        if target.startswith("kind."):
            return f"{target.removeprefix('kind.')} part"
        return target.rsplit(".", 1)[-1]
    if field.get("type") == "array":
        items = field.get("items", {})
        return f"list of {_type(items)}" if isinstance(items, Mapping) else "list"
    return str(field.get("type", "any"))


if __name__ == "__main__":
    for path, text in generated_files().items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    if "--release" in sys.argv[1:]:
        (ROOT / "docs" / "public_api_released.txt").write_text(surface(), encoding="utf-8")
        print("wrote docs/public_api_released.txt")
