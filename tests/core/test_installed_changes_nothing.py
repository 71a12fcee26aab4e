"""What is merely installed changes no run: every shipped config resolves to the same, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pegboard.errors import ConfigError
from pegboard.json_source import ConfigSource, load_layers, parse_json
from pegboard.plugin_manager import load_plugins
from pegboard.registry import Registry
from pegboard.run_config import validate_run_config

Install = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(p for p in (ROOT / "configs").glob("*.json") if "schema" not in p.name)
EAGER = '''
import random, warnings
import pegboard

random.seed(7)
warnings.simplefilter("ignore")

class AAACollator(pegboard.CollatorComponent):
    """First by name, and says that it provides everything."""
    provides = frozenset({"pixel_values", "image_flags", "anything"})
    def build(self, *, pad_token_id):
        return None

class AAALoss(pegboard.LossComponent):
    """First by name."""
    def build(self):
        return None

class AAAFormat(pegboard.RecordFormatComponent):
    """Reads everything."""
    def build(self):
        return None

class AAASaver(pegboard.SaverComponent):
    """First by name."""
    def build(self):
        return None

@pegboard.hookimpl
def register_collators(register):
    register(AAACollator)

@pegboard.hookimpl
def register_losses(register):
    register(AAALoss)

@pegboard.hookimpl
def register_record_formats(register):
    register(AAAFormat)

@pegboard.hookimpl
def register_savers(register):
    register(AAASaver)
'''


DATA = str(ROOT / "configs" / "data" / "quickstart_chat.jsonl")


def _outcome(source: ConfigSource, registry: Registry) -> str:
    """The whole resolved config, or every problem of it."""
    try:
        return json.dumps(validate_run_config(source, registry).resolved, indent=1)
    except ConfigError as error:
        return f"refused: {error}"


@pytest.mark.parametrize("config", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_every_config_means_the_same_with_and_without_a_package(
    config: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    source = load_layers(config)
    without = _outcome(source, load_plugins().registry)
    install("peg-eager", EAGER)
    plugins = load_plugins()
    assert "AAACollator" in plugins.registry.names("collator")
    assert _outcome(source, plugins.registry) == without
    # Data of the others is not in the repository: their problems are the same ones.
    assert without.startswith("{") or "no file or folder" in without or "load_from" in without


def test_a_collator_that_is_installed_takes_no_built_in_ones_place(install: Install) -> None:
    data = json.loads((ROOT / "configs" / "quickstart_vlm.json").read_text())
    del data["dataloader"]["collator"]
    for entry in data["datasets"]:
        entry["dataset"] |= {"anno_path": DATA, "media_root": str(ROOT)}
    source = parse_json(json.dumps(data))
    without = _outcome(source, load_plugins().registry)
    install("peg-eager", EAGER)
    assert _outcome(source, load_plugins().registry) == without
    assert json.loads(without)["dataloader"]["collator"]["class_name"] == "SFTVLMCollator"


def test_of_several_foreign_collators_the_config_names_one(install: Install) -> None:
    model = '''
import pegboard

class PegModel(pegboard.ModelComponent):
    """Needs what no built-in collator provides."""
    requires = frozenset({"anything"})
    def build(self):
        return None

@pegboard.hookimpl
def register_models(register):
    register(PegModel)
'''
    install("peg-model", model)
    install("peg-eager", EAGER)
    data = json.loads((ROOT / "configs" / "quickstart.json").read_text())
    data["model"] = {"class_name": "PegModel"}
    del data["dataloader"]["collator"]
    data["datasets"][0]["dataset"]["anno_path"] = DATA
    source = parse_json(json.dumps(data))
    one = json.loads(_outcome(source, load_plugins().registry))
    assert one["dataloader"]["collator"]["class_name"] == "AAACollator"
    install("peg-second", EAGER.replace("AAA", "BBB"))
    assert (
        "dataloader.collator: AAACollator, BBBCollator provide what the model requires; name one"
        in _outcome(source, load_plugins().registry)
    )
