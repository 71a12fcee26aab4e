"""The schema that `pegboard schema` writes takes every config of ours and refuses what people get wrong.

It says the same as `pegboard check`: what one refuses, the other refuses.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from config_mistakes import BASE, MISTAKES, with_mistake
from fenced_blocks import Block, blocks_of, config_blocks
from third_party import ROOT, install_lantern_parts, written_schema

from pegboard.config_schema import run_config_schema
from pegboard.errors import ConfigError
from pegboard.plugin_manager import LoadedPlugins, load_plugins
from pegboard.run_config import load_run_config


def needs_a_package(path: Path) -> bool:
    """Whether the parts it names come from an example package, which is not installed here."""
    return any(part.startswith("pegboard-") for part in path.relative_to(ROOT).parts)


CONFIGS = [
    path
    for folder in ("configs", "docs")
    for path in sorted((ROOT / folder).rglob("*.json"))
    if not needs_a_package(path) and "datasets" in json.loads(path.read_text(encoding="utf-8"))
]
BLOCKS = [block for block in config_blocks() if not needs_a_package(block.page)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    install_lantern_parts(folder)
    return folder


@pytest.fixture(scope="module")
def validator(site: Path) -> Any:
    schema = written_schema(site)
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


@pytest.fixture(scope="module")
def plugins(site: Path) -> Iterator[LoadedPlugins]:
    before = list(sys.path)
    yield load_plugins(extra_files=[site / "lantern_parts.py"], third_party=False)
    # The file's folder holds metadata too: later tests would find a distribution there.
    sys.path[:] = before


def errors(validator: Any, config: Any) -> list[str]:
    return [error.message for error in validator.iter_errors(config)]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_config_of_ours_is_valid(path: Path, validator: Any) -> None:
    assert errors(validator, json.loads(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_every_config_in_the_docs_is_valid_beside_the_parts_of_its_page(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    files = []
    for part in blocks_of(block.page):
        if part.language == "python" and "@pegboard.hookimpl" in part.text:
            # A module has one name in a process: the config's line tells the cases apart.
            files.append(tmp_path / f"{block.page.stem}_{block.line}_{part.line}.py")
            files[-1].write_text(part.text, encoding="utf-8")
    registry = load_plugins(extra_files=files, third_party=False).registry
    validator = jsonschema.Draft7Validator(run_config_schema(registry))
    assert errors(validator, json.loads(block.text)) == []


def test_the_base_of_the_mistakes_is_right(
    validator: Any, plugins: LoadedPlugins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert errors(validator, BASE) == []
    assert problems(BASE, plugins, tmp_path, monkeypatch) == ""


def test_there_are_sixty_mistakes_and_no_two_are_alike() -> None:
    made = {(place, json.dumps(value, default=str)) for _, place, value in MISTAKES}
    assert len(made) == len(MISTAKES) >= 60


@pytest.mark.parametrize(
    ("place", "value"), [item[1:] for item in MISTAKES], ids=[item[0] for item in MISTAKES]
)
def test_a_mistake_is_refused(
    place: str,
    value: Any,
    validator: Any,
    plugins: LoadedPlugins,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = with_mistake(place, value)
    assert errors(validator, config) != []
    assert problems(config, plugins, tmp_path, monkeypatch) != ""


@pytest.mark.parametrize(
    ("model", "complete"),
    [
        ({"class_name": "Qwen3"}, False),
        ({"preset": "qwen3-8b"}, True),
        ({"class_name": "InternS1", "vision_config": {}}, False),
        ({"class_name": "InternS1", "text_config": {"class_name": "Qwen3"}}, False),
        ({"class_name": "InternS1", "text_config": {"preset": "qwen3-8b"}}, True),
        ({"preset": "intern-s1-mini", "text_config": {"class_name": "Qwen3"}}, True),
    ],
)
def test_a_model_is_complete_by_itself_or_through_its_weights(
    model: Any, complete: bool, validator: Any
) -> None:
    config = {**BASE, "model": model}
    assert (errors(validator, config) == []) == complete
    assert errors(validator, {**config, "load_from": "models/some"}) == []


def test_third_party_parts_are_there_when_installed_and_only_then(validator: Any) -> None:
    without = json.dumps(written_schema(None))
    assert "Lantern" not in without and "Glow" not in without
    definitions = validator.schema["definitions"]
    fields = definitions["dataset.LanternDataset"]["properties"]
    assert fields["nights"]["description"] == "Nights to read, from the last one back."
    assert "GlowLoss" in definitions["kind.loss"]["properties"]["class_name"]["enum"]


def problems(
    config: Any, plugins: LoadedPlugins, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """What `pegboard check` says of it, with the files there that it names."""
    monkeypatch.chdir(folder)
    for name in ("data/media/a.jsonl", "data/held_out.jsonl"):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('{"messages": []}\n')
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    try:
        load_run_config(path, (), plugins.registry)
    except ConfigError as error:
        return str(error)
    return ""
