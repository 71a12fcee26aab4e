"""A config is valid as a whole or refused as a whole, with every problem at its place."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
from pydantic import Field, ValidationError

from pegboard.component import (
    CollatorComponent,
    ComponentConfig,
    DatasetComponent,
    LossComponent,
    LRScheduleComponent,
    ModelComponent,
    OptimizerComponent,
    PackerComponent,
    Problem,
    SaverComponent,
    TokenizeFnComponent,
    TokenizerComponent,
    TrackerComponent,
)
from pegboard.component_field import rewrite_errors
from pegboard.config_schema import run_config_schema
from pegboard.errors import ConfigError
from pegboard.registry import Registry
from pegboard.run_config import ComponentOf, LoadedConfig, RunConfig, load_run_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


class Rope(ComponentConfig):
    """Rotary positions."""

    theta: float = Field(default=1e4, description="Base.")
    scale: float = Field(default=1.0, description="Factor.")


class TextNet(ModelComponent):
    """A text model."""

    hf_model_types = ("text_net",)
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "text-net-small": {"hidden_size": 8, "num_layers": 2, "rope": {"theta": 5.0, "scale": 2.0}}
    }
    weight_fields = frozenset({"hidden_size", "vocab_size"})

    class Config(ComponentConfig):
        hidden_size: int = Field(gt=0, description="Width.")
        num_layers: int = Field(default=1, description="Layers.")
        vocab_size: int = Field(default=16, description="Rows.")
        resize_embeddings: bool = Field(default=False, description="Larger than the weights.")
        rope: Rope = Field(default=Rope(), description="Rope.")

    config: Config

    def build(self) -> Any: ...

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> dict[str, Any]:
        if "odd" in hf_config:
            raise ConfigError("can't honour 'odd'")
        names = ("hidden_size", "num_layers", "vocab_size")
        return {name: hf_config[name] for name in names if name in hf_config}


class PictureNet(ModelComponent):
    """A vision-language model around any text model."""

    requires = frozenset({"pixel_values"})
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "picture-net": {"text_config": {"class_name": "TextNet", "preset": "text-net-small"}}
    }

    class Config(ComponentConfig):
        text_config: Annotated[ModelComponent, ComponentOf("model")] = Field(description="Text.")
        image_size: int = Field(default=4, description="Side.")

    config: Config

    def build(self) -> Any: ...


class Lines(DatasetComponent):
    """Lines of a file."""

    class Config(ComponentConfig):
        anno_path: str = Field(description="File.")
        size: Annotated[int, Field(ge=1)] | str = Field(default=1, description="A union.")

    config: Config

    def build(self, name: str) -> Any: ...

    def check(self, run: RunConfig, path: tuple[str | int, ...]) -> Iterable[Problem]:
        if "missing" in self.config.anno_path:
            yield Problem((*path, "anno_path"), f"no file (seed {run.seed})")


class Chat(TokenizeFnComponent):
    """Chats."""

    class Config(ComponentConfig):
        max_length: int = Field(default=4096, gt=0, description="Longest.")

    config: Config

    def build(self, tokenizer: Any, model: Any) -> Any: ...


class HFTokenizer(TokenizerComponent):
    """A folder's tokenizer."""

    class Config(ComponentConfig):
        path: str = Field(description="Folder.")

    config: Config

    def build(self, *, trust_remote_code: bool = False) -> Any: ...


class ExpandSoftPacker(PackerComponent):
    """Packs."""

    def build(self) -> Any: ...


class AllCollator(CollatorComponent):
    """Text and pictures."""

    provides = frozenset({"pixel_values"})

    def build(self, *, pad_token_id: int) -> Any: ...


class SFTLLMCollator(CollatorComponent):
    """Text."""

    def build(self, *, pad_token_id: int) -> Any: ...


class ChunkedCrossEntropy(LossComponent):
    """Loss."""

    def build(self) -> Any: ...


class AdamW(OptimizerComponent):
    """Adam."""

    class Config(ComponentConfig):
        lr: float = Field(default=1e-5, gt=0, description="Rate.")
        betas: tuple[float, float] = Field(default=(0.9, 0.95), description="Betas.")
        fused: bool = Field(default=True, description="Fused.")

    config: Config

    def build(self, groups: Any) -> Any: ...


class CosineSchedule(LRScheduleComponent):
    """Cosine."""

    class Config(ComponentConfig):
        min_lr: float = Field(default=0.0, description="Floor.")

    config: Config

    def build(self, total_steps: int) -> Any: ...


class CheckpointSaver(SaverComponent):
    """Checkpoints."""

    class Config(ComponentConfig):
        every_steps: int | None = Field(default=None, ge=1, description="Steps.")

    config: Config

    def build(self) -> Any: ...


class HFSaver(SaverComponent):
    """Exports."""

    class Config(ComponentConfig):
        folder_name: str = Field(default="export", description="Folder.")

    config: Config

    def build(self) -> Any: ...


class Board(TrackerComponent):
    """A board."""

    def build(self, run_dir: Path) -> Any: ...


PARTS = (
    TextNet, PictureNet, Lines, Chat, HFTokenizer, ExpandSoftPacker, AllCollator, SFTLLMCollator,
    ChunkedCrossEntropy, AdamW, CosineSchedule, CheckpointSaver, HFSaver, Board,
)  # fmt: skip


@pytest.fixture
def registry() -> Registry:
    registry = Registry()
    for part in PARTS:
        registry.add(part.kind, part, "test_parts")
    return registry


def minimal() -> dict[str, Any]:
    return {
        "tokenizer": {"class_name": "HFTokenizer", "path": "tok"},
        "model": {"class_name": "TextNet", "hidden_size": 8},
        "datasets": [
            {
                "dataset": {"class_name": "Lines", "anno_path": "data/chats.jsonl"},
                "tokenize_fn": {"class_name": "Chat"},
            }
        ],
        "total_steps": 3,
    }


class Loader:
    def __init__(self, folder: Path, registry: Registry) -> None:
        self.folder, self.registry = folder, registry

    def __call__(self, config: Any, *overrides: str) -> LoadedConfig:
        (self.folder / "c.json").write_text(
            config if isinstance(config, str) else json.dumps(config, indent=2), encoding="utf-8"
        )
        return load_run_config("c.json", overrides, self.registry)

    def problems(self, config: Any, *overrides: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            self(config, *overrides)
        return str(caught.value).splitlines()


@pytest.fixture
def load(tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Loader:
    monkeypatch.chdir(tmp_path)
    return Loader(tmp_path, registry)


def test_a_minimal_config_gets_every_default(load: Loader) -> None:
    run = load(minimal()).run
    assert (run.work_dir, run.seed, run.global_batch_size, run.max_grad_norm) == (
        "work_dirs", 42, 1, 1.0,
    )  # fmt: skip
    assert isinstance(run.loss, ChunkedCrossEntropy)
    assert isinstance(run.optimizer, AdamW) and run.optimizer.config.betas == (0.9, 0.95)
    assert isinstance(run.dataloader.collator, SFTLLMCollator)
    assert [type(saver).__name__ for saver in run.savers] == ["CheckpointSaver", "HFSaver"]
    entry = run.datasets[0]
    assert (entry.name, entry.sample_ratio, entry.on_bad_record) == ("chats", 1.0, "error")
    assert isinstance(entry.dataset, Lines) and isinstance(entry.tokenize_fn, Chat)


def test_the_resolved_dump_names_every_part_and_loads_to_the_same(load: Loader) -> None:
    config = minimal()
    config["datasets"][0]["dataset"] |= {"sample_ratio": 2, "name": "x", "on_bad_record": "skip"}
    config["model"] = {"preset": "picture-net"}
    config["optimizer"] = {"class_name": "AdamW", "plugin": "test_parts"}
    config["eval"] = {"datasets": copy.deepcopy(config["datasets"]), "every_steps": 5}
    config["trackers"] = [{"class_name": "Board"}]
    config["$comment"] = ["kept out"]
    resolved = load(config).resolved
    assert load(resolved).resolved == resolved
    assert resolved["datasets"][0]["dataset"] == {
        "class_name": "Lines", "name": "x", "sample_ratio": 2.0, "on_bad_record": "skip",
        "record_schema": None, "sample_draw": "rotate", "token_weight": None,
        "anno_path": "data/chats.jsonl", "size": 1,
    }  # fmt: skip
    assert resolved["model"]["text_config"]["class_name"] == "TextNet"
    assert resolved["optimizer"]["plugin"] == "test_parts"
    assert resolved["dataloader"]["collator"] == {"class_name": "AllCollator"}
    assert set(resolved) == set(RunConfig.model_fields)


MANY_MISTAKES = """{
  "work_dirr": "x",
  "seed": "42",
  "seed": 43.5,
  "tokenizer": {"class_name": "HFTokeniser", "path": "tok"},
  "model": {"class_name": "PictureNet", "imageSize": 3,
    "text_config": {"class_name": "TextNet", "hidden_sise": 8, "hidden_size": 0,
      "rope": {"thetta": 1}}},
  "datasets": [
    {"dataset": {"class_name": "Lines", "anno_path": 3, "sample_ratio": 0},
     "tokenize_fn": {"class_name": "Lines"}},
    {"dataset": {"class_name": "Lines", "anno_path": "a", "on_bad_record": "skipp", "size": 0}}
  ],
  "dataloader": {"pack_max_length": -1, "collator": {"class_name": "SFTLLMCollator"}},
  "optimizer": {"class_name": "AdamW", "lr": "1e-5", "betas": [0.9], "fused": 1},
  "lr_schedule": {},
  "precision": {"compute_dtype": "bf16"},
  "activation_checkpointing": {"mode": "ratio"},
  "savers": [{"class_name": "HFSaver"}, {"class_name": "CheckpointSaver", "every_steps": true}],
  "epoch_num": 1, "total_steps": 2
}"""


def test_every_mistake_of_a_file_is_reported_at_its_place_in_one_go(load: Loader) -> None:
    expected = [
        (2, 3, "work_dirr: unknown key 'work_dirr'. Did you mean 'work_dir'?"),
        (4, 3, "seed: duplicate key 'seed', first at c.json:3:3"),
        (4, 11, "seed: expected an integer"),
        (5, 31, "tokenizer.class_name: no tokenizer named 'HFTokeniser'. Did you mean 'HFTokenizer'?"),
        (6, 41, "model.imageSize: unknown key 'imageSize'. Did you mean 'image_size'?"),
        (7, 46, "model.text_config.hidden_sise: unknown key 'hidden_sise'. Did you mean 'hidden_size'?"),
        (7, 79, "model.text_config.hidden_size: expected greater than 0, found 0"),
        (8, 16, "model.text_config.rope.thetta: unknown key 'thetta'. Did you mean 'theta'?"),
        (10, 54, "datasets[0].dataset.anno_path: expected a string, found 3"),
        (10, 73, "datasets[0].dataset.sample_ratio: expected greater than 0, found 0"),
        (11, 36, "datasets[0].tokenize_fn.class_name: no tokenize fn named 'Lines'"),
        (12, 5, "datasets[1].tokenize_fn: 'tokenize_fn' is missing"),
        (12, 76, "datasets[1].dataset.on_bad_record: expected 'error' or 'skip', or an object, found \"skipp\""),
        (12, 93, "datasets[1].dataset.size: expected greater than or equal to 1, or a string, found 0"),
        (14, 37, "dataloader.pack_max_length: expected greater than 0, found -1"),
        (14, 68, "dataloader.collator.class_name: SFTLLMCollator does not provide pixel_values, "
                 "which PictureNet requires; use AllCollator"),
        (15, 46, "optimizer.lr: expected a number, found \"1e-5\"; write it without quotes"),
        (15, 63, "optimizer.betas[1]: item [1] is missing"),
        (15, 79, "optimizer.fused: expected a boolean, found 1"),
        (16, 18, 'lr_schedule: "class_name" is missing; lr_schedule can be: CosineSchedule'),
        (17, 34, "precision.compute_dtype: expected 'bfloat16', 'float32' or 'float64'"),
        (18, 31, "activation_checkpointing: mode 'ratio' needs \"ratio\""),
        (19, 90, "savers[1].every_steps: expected an integer, found true"),
        (20, 34, "total_steps: epoch_num and total_steps are both set"),
    ]  # fmt: skip
    lines = load.problems(MANY_MISTAKES)
    for line, column, message in expected:
        start = f"c.json:{line}:{column}: {message}"
        assert any(one.startswith(start) for one in lines), f"{start}\n---\n" + "\n".join(lines)
    assert len(lines) == len(expected)
    assert lines == sorted(lines, key=lambda one: [int(n) for n in one.split(":")[1:3]])


@pytest.mark.parametrize(
    "override",
    ['optimizer.lr="1e-5"', "optimizer.fused=1", 'optimizer.fused="yes"', "seed=3.0", 'seed="3"'],
)
def test_nothing_is_coerced(load: Loader, override: str) -> None:
    config = minimal() | {"optimizer": {"class_name": "AdamW"}}
    (line,) = load.problems(config, override)
    assert line.startswith(f"--set {override}: {override.split('=')[0]}: expected")


def test_an_override_is_cited_and_a_typo_in_its_path_is_caught(load: Loader) -> None:
    (line,) = load.problems(minimal(), "parallel.replicatesize=2")
    assert line == (
        "--set parallel.replicatesize=2: parallel.replicatesize: unknown key 'replicatesize'. "
        "Did you mean 'replicate_size'?"
    )
    assert load(minimal(), "parallel.replicate_size=2").run.parallel.replicate_size == 2


def test_json_wins_over_the_published_config_and_that_over_the_preset(load: Loader) -> None:
    (load.folder / "weights").mkdir()
    published = {"model_type": "text_net", "hidden_size": 8, "num_layers": 5}
    (load.folder / "weights" / "config.json").write_text(json.dumps(published))
    config = minimal() | {"load_from": "weights", "model": {"preset": "text-net-small"}}
    del config["tokenizer"]
    run = load(config).run
    assert isinstance(run.model, TextNet)
    assert (run.model.config.num_layers, run.model.config.rope.theta) == (5, 5.0)
    assert run.tokenizer.config.path == "weights"
    config["model"] |= {"num_layers": 7, "rope": {"theta": 3.0}}
    resolved = load(config).resolved
    model = resolved["model"]
    assert (model["num_layers"], model["rope"]) == (7, {"theta": 3.0, "scale": 2.0})
    assert load(resolved).resolved == resolved
    del config["model"]
    assert load(config).resolved["model"]["num_layers"] == 5
    config["model"] = {"class_name": "TextNet", "hidden_size": 16, "vocab_size": 32}
    (line,) = load.problems(config)
    assert "model.hidden_size: 16 does not fit the weights: weights/config.json has 8" in line
    published["model_type"] = "other"
    (load.folder / "weights" / "config.json").write_text(json.dumps(published))
    (line,) = load.problems(config)
    assert "model_type \"other\", but TextNet reads 'text_net'" in line
    del config["model"]
    assert any("no installed model reads model_type" in line for line in load.problems(config))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            {"preset": "text-net-smal"},
            "model.preset: no model preset named 'text-net-smal'. Did you",
        ),
        ({"preset": "picture-net", "class_name": "TextNet"}, "'picture-net' is a PictureNet"),
        (
            {"class_name": "TextNet", "hidden_size": 8, "plugin": "no"},
            "plugin 'no' offers no model",
        ),
        ("TextNet", "model: expected an object"),
        ({"class_name": 3}, "model.class_name: expected a string"),
        ({"class_name": "AdamW"}, "There is a optimizer of that name"),
    ],
)
def test_a_model_that_can_not_be_named_is_refused(load: Loader, model: Any, words: str) -> None:
    lines = load.problems(minimal() | {"model": model})
    assert any(words in line for line in lines), lines


def test_a_text_model_inside_takes_presets_and_its_own_fields(load: Loader) -> None:
    text = {"class_name": "TextNet", "preset": "text-net-small", "vocab_size": 99}
    run = load(minimal() | {"model": {"class_name": "PictureNet", "text_config": text}}).run
    assert run.model.config.text_config.config.vocab_size == 99
    assert run.model.config.text_config.config.rope.scale == 2.0
    assert isinstance(run.dataloader.collator, AllCollator)


def test_rules_between_parts_speak_beside_other_mistakes(load: Loader) -> None:
    config = minimal()
    del config["tokenizer"], config["total_steps"]
    second = copy.deepcopy(config["datasets"][0])
    second["tokenize_fn"]["max_length"] = 5000
    second["dataset"]["anno_path"] = "missing/chats.jsonl"
    config["datasets"].append(second)
    config |= {"load_from": "./none", "sead": 1}
    text = "\n".join(load.problems(config))
    for words in (
        'length of the run is missing; write "epoch_num" or "total_steps"',
        "datasets[1].tokenize_fn.max_length: 5000 is more than dataloader.pack_max_length 4096",
        "datasets[1].dataset.name: two datasets are called 'chats' (the other is [0])",
        'load_from: no folder "./none"',
        "sead: unknown key 'sead'. Did you mean 'seed'?",
        "datasets[1].dataset.anno_path: no file (seed 42)",
    ):
        assert words in text, text


def test_what_other_trainers_call_a_field_is_answered_with_its_name_here(load: Loader) -> None:
    config = minimal()
    config |= {"total_epoch": 1, "fsdp_cfg": {}, "parallel": {"ep_size": 2}}
    config["optimizer"] = {"class_name": "AdamW", "learning_rate": 1e-5}
    text = "\n".join(load.problems(config))
    for key, name in (
        ("total_epoch", "epoch_num"),
        ("fsdp_cfg", "parallel"),
        ("ep_size", "expert_parallel_size"),
        ("learning_rate", "lr"),
    ):
        assert f"unknown key '{key}'. Did you mean '{name}'?" in text, text


def test_token_weights_are_for_all_datasets_or_none_and_instead_of_ratios(load: Loader) -> None:
    config = minimal()
    second = copy.deepcopy(config["datasets"][0])
    second["dataset"] |= {"name": "second", "token_weight": 2, "sample_ratio": 0.5}
    config["datasets"].append(second)
    text = "\n".join(load.problems(config))
    assert "datasets[0].dataset.token_weight: is missing, and [1] has one" in text
    assert "datasets[1].dataset.sample_ratio: sample_ratio and token_weight are both set" in text
    config["datasets"][0]["dataset"]["token_weight"] = 1
    del second["dataset"]["sample_ratio"]
    entries = load(config).run.datasets
    assert [entry.token_weight for entry in entries] == [1.0, 2.0]
    resolved = load(config).resolved
    assert load(resolved).resolved == resolved


def test_a_part_checks_its_surroundings_only_when_it_is_valid_itself(load: Loader) -> None:
    config = minimal()
    config["datasets"][0]["dataset"] |= {"anno_path": "missing", "sample_ration": 2}
    lines = load.problems(config)
    assert len(lines) == 1 and "sample_ration" in lines[0]
    del config["datasets"][0]["dataset"]["sample_ration"]
    (line,) = load.problems(config)
    assert "datasets[0].dataset.anno_path: no file" in line


def test_parts_are_checked_beside_a_wrong_item_of_a_list(load: Loader) -> None:
    config = minimal() | {"optimizer": {"class_name": "AdamW", "betas": [0.9, "x"]}}
    config["datasets"][0]["dataset"]["anno_path"] = "missing"
    lines = load.problems(config)
    assert [line.split(": ")[1] for line in lines] == [
        "datasets[0].dataset.anno_path",
        "optimizer.betas[1]",
    ]


def test_parts_are_checked_beside_a_part_that_the_run_cannot_be_without(load: Loader) -> None:
    config = minimal() | {"model": {"class_name": "TextNett"}}
    second = copy.deepcopy(config["datasets"][0])
    second["dataset"] |= {"name": "second", "anno_path": "missing"}
    config["datasets"][0]["dataset"]["class_name"] = "Linez"
    config["datasets"] += [second, "third"]
    lines = load.problems(config)
    assert sorted(line.split(": ")[1] for line in lines) == [
        "datasets[0].dataset.class_name",
        "datasets[1].dataset.anno_path",
        "datasets[2]",
        "model.class_name",
    ]


def test_weights_in_the_folder_that_the_run_moves_aside_are_refused(
    load: Loader, tmp_path: Path
) -> None:
    export = tmp_path / "work" / "chat" / "export"
    export.mkdir(parents=True)
    (export / "config.json").write_text("{}")
    config = minimal() | {"work_dir": str(tmp_path / "work"), "load_from": str(export)}
    (line,) = [one for one in load.problems(config | {"run_name": "chat"}) if "moved aside" in one]
    assert f"load_from: '{export}' lies in this run's own folder" in line
    assert not any("moved aside" in one for one in load.problems(config | {"run_name": "two"}))


def test_no_saver_may_take_the_place_of_another_or_of_the_run(load: Loader) -> None:
    def saver(folder: str) -> dict[str, Any]:
        return {"class_name": "HFSaver", "folder_name": folder}

    checkpoints = {"class_name": "CheckpointSaver"}
    for folder in ("checkpoints", "logs", "metrics.jsonl"):
        (line,) = load.problems(minimal() | {"savers": [checkpoints, saver(folder)]})
        assert f"savers[1].folder_name: '{folder}' would be replaced, the run writes there" in line
    (line,) = load.problems(minimal() | {"savers": [saver("a"), saver("b"), saver("a")]})
    assert "savers[2].folder_name: 'a' would be replaced, savers[0] writes there" in line
    assert len(load(minimal() | {"savers": [checkpoints, saver("a"), saver("b")]}).run.savers) == 3


def test_a_pack_is_no_longer_than_its_int32_bounds_can_say(load: Loader) -> None:
    config = minimal() | {"dataloader": {"pack_max_length": 2**31 - 1}}
    assert load(config).run.dataloader.pack_max_length == 2**31 - 1
    config["dataloader"]["pack_max_length"] = 2**31
    (line,) = load.problems(config)
    assert "dataloader.pack_max_length: expected less than 2147483648" in line


def test_no_config_whatever_it_holds_ends_in_anything_but_a_config_error(load: Loader) -> None:
    rng = random.Random(11)
    junk: list[Any] = [
        None, True, -1, 0, 3.5, "", "x", "1", [], [1], {}, {"class_name": "AdamW"}, [[]], [{}],
        {"class_name": None}, {"preset": 3}, {"class_name": "Lines", "name": []}, "picture-net",
    ]  # fmt: skip
    refused = 0
    for _ in range(150):
        resolved = copy.deepcopy(load(minimal()).resolved) if rng.random() < 0.5 else minimal()
        resolved |= {"eval": {"datasets": copy.deepcopy(resolved["datasets"]), "every_steps": 1}}
        for _ in range(rng.randint(1, 3)):
            node: Any = resolved
            while True:
                step = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
                if rng.random() < 0.5 or not isinstance(node[step], dict | list) or not node[step]:
                    break
                node = node[step]
            node[step] = copy.deepcopy(rng.choice(junk))
        try:
            load(resolved)
        except ConfigError as error:
            refused += 1
            assert all(re.match(r"c\.json:\d+:\d+: ", line) for line in str(error).splitlines())
    assert refused > 100


def test_options_of_a_dataset_stand_inside_its_object(load: Loader) -> None:
    config = minimal()
    config["datasets"][0]["sample_ratio"] = 2
    (line,) = load.problems(config)
    assert (
        "datasets[0].sample_ratio: unknown key 'sample_ratio'; write it inside \"dataset\"" in line
    )
    config = minimal()
    config["datasets"][0]["dataset"]["sample_ration"] = 2
    (line,) = load.problems(config)
    assert "Did you mean 'sample_ratio'?" in line


def test_a_tokenizer_or_load_from_is_needed(load: Loader) -> None:
    config = minimal()
    del config["tokenizer"]
    (line,) = load.problems(config)
    assert line.endswith('"tokenizer" is missing, and there is no load_from to take it from')


def test_a_default_part_that_is_not_installed_is_named(load: Loader) -> None:
    registry = Registry()
    for part in PARTS:
        if part is not AdamW:
            registry.add(part.kind, part, "test_parts")
    load.registry = registry
    (line,) = load.problems(minimal())
    assert "optimizer.class_name: no optimizer named 'AdamW'" in line


def test_the_config_rooms_do_not_import_torch() -> None:
    code = (
        "import sys, pegboard.config_schema, pegboard.run_config, pegboard.json_source;"
        "sys.exit('torch' in sys.modules or 'jsonschema' in sys.modules)"
    )
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    assert (
        subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
    )


def schema_errors(schema: dict[str, Any], config: Any) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft7Validator.check_schema(schema)
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(config)]


def test_the_schema_accepts_what_loads(load: Loader) -> None:
    schema = run_config_schema(load.registry)
    text = json.dumps(schema)
    assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"
    assert "x-kind" not in text and "oneOf" not in text
    config = minimal() | {"$schema": "x", "$comment": "y"}
    config["optimizer"] = {"class_name": "AdamW", "$comment": ["z"], "lr": 1e-5}
    config["datasets"][0]["dataset"] |= {"sample_ratio": 2, "name": "x", "on_bad_record": "skip"}
    assert schema_errors(schema, config) == []
    assert schema_errors(schema, load(config).resolved) == []
    config["model"] = {"preset": "text-net-small"}
    assert schema_errors(schema, config) == []
    assert schema_errors(schema, {"extends": "base.json", "seed": 1}) == []
    del config["tokenizer"], config["model"]
    assert schema_errors(schema, config | {"load_from": "weights"}) == []


@pytest.mark.parametrize(
    "path_and_value",
    [
        ("sead", 1), ("seed", "1"), ("optimizer", {}), ("optimizer", {"class_name": "AdamWw"}),
        ("optimizer", {"class_name": "AdamW", "lrr": 1}), ("datasets", []), ("model", None),
        ("optimizer", {"class_name": "AdamW", "lr": "1e-5"}), ("model", {"class_name": "AdamW"}),
        ("model", {"class_name": "PictureNet", "text_config": {"class_name": "TextNet"}}),
        ("model", {"class_name": "TextNet"}), ("model", {"preset": "none"}), ("total_steps", None),
        ("dataloader", {"num_workers": -1}), ("savers", [{"class_name": "AdamW"}]),
    ],
)  # fmt: skip
def test_the_schema_refuses_what_does_not_load(load: Loader, path_and_value: Any) -> None:
    key, value = path_and_value
    config = minimal() | {key: value}
    load.problems(config)
    assert schema_errors(run_config_schema(load.registry), config) != []


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.json")), ids=lambda path: path.name)
def test_our_configs_load_by_the_schema_of_the_installed_parts(path: Path) -> None:
    if path.name.endswith("schema.json"):
        pytest.skip("a schema, not a config")
    from pegboard.plugin_manager import load_plugins

    registry = load_plugins(third_party=False).registry
    config = json.loads(path.read_text(encoding="utf-8"))
    missing = [
        name for name in re.findall(r'"class_name": "(\w+)"', path.read_text(encoding="utf-8"))
        if name != "FSDP2" and all(name != entry.class_name for entry in registry.entries())
    ]  # fmt: skip
    assert missing == []
    assert schema_errors(run_config_schema(registry), config) == []


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "", ".hidden"])
def test_a_run_name_cannot_leave_the_work_dir(name: str) -> None:
    from pydantic import ValidationError

    from pegboard.plugin_manager import load_plugins
    from pegboard.run_config import RunConfig

    context = {"registry": load_plugins(third_party=False).registry}
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate({"run_name": name}, context=context)
    assert any(error["loc"] == ("run_name",) for error in caught.value.errors())


def test_a_default_made_of_other_fields_adds_nothing_to_their_errors() -> None:
    class Halves(ComponentConfig):
        width: int = Field(description="Width.")
        half: int = Field(default_factory=lambda data: data["width"] // 2, description="Half.")

    assert Halves.model_validate_json('{"width": 6}').half == 3
    with pytest.raises(ValidationError) as caught:
        Halves.model_validate_json('{"width": "six"}')
    (problem,) = rewrite_errors(caught.value, Halves).errors()
    assert problem["loc"] == ("width",)
