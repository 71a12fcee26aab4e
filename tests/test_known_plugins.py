"""What the index of known packages says of an example package is true."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from pegboard.plugin_index import read_index
from pegboard.plugin_manager import load_plugins

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("pegboard-*/pyproject.toml"))
KNOWN = {package.name: package for package in read_index(ROOT / "core/pegboard/known_plugins.json")}


def _project(file: Path) -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    return project


@pytest.mark.parametrize("file", EXAMPLES, ids=[file.parent.name for file in EXAMPLES])
def test_an_example_registers_what_the_index_says(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = _project(file)
    name = project["name"]
    info = tmp_path / f"{name.replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {project['version']}\n"
    )
    points = project["entry-points"]["pegboard"].items()
    (info / "entry_points.txt").write_text(
        "\n".join(["[pegboard]", *(f"{point} = {value}" for point, value in points), ""])
    )
    source = file.parent / "src" if (file.parent / "src").is_dir() else file.parent
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(source), *sys.path])
    plugins = load_plugins()
    assert [line for line in plugins.warnings if name in line] == []
    offered = {
        (entry.kind, entry.class_name)
        for entry in plugins.registry.entries()
        if entry.plugin.split(":")[0] == name
    }
    offered |= {
        pair
        for entry in plugins.registry.entries()
        if entry.plugin.split(":")[0] == name and entry.kind == "model"
        for pair in (
            *(("model_type", word) for word in entry.cls.hf_model_types),
            *(("preset", word) for word in entry.cls.presets),
        )
    }
    known = {(kind, one) for kind, names in KNOWN[name].parts.items() for one in names}
    assert known and known <= offered


@pytest.mark.parametrize("name", KNOWN)
def test_the_way_to_install_leads_to_a_folder_of_the_repository(name: str) -> None:
    folder = f"./docs/examples/{name}"
    assert folder in KNOWN[name].install
    if (ROOT / folder).exists():
        assert _project(ROOT / folder / "pyproject.toml")["name"] == name
