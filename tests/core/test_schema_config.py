"""The claim: a part may give its config as a JSON Schema, and its user sees no difference: every problem in one
report with its place, defaults in the dump, the same in the editor. A schema that can't be used is its author's error,
named where the part is, and nothing is ever fetched."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jsonschema
import pytest
from pydantic import Field, TypeAdapter, ValidationError

import pegboard
from pegboard import PluginError
from pegboard.component import COMPONENT_KINDS
from pegboard.config_schema import run_config_schema
from pegboard.json_schema import check_schema
from pegboard.plugin_manager import load_plugins
from pegboard.registry import Registry, check_component
from pegboard.run_config import LoadedConfig, load_run_config
from pegboard.schema_config import SchemaConfig
from pegboard.testing import Case, checks_for

SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["path", "limit"],
    "properties": {
        "path": {"type": "string", "minLength": 2, "description": "A file."},
        "limit": {"type": "integer", "minimum": 1, "default": 5, "description": "Records."},
        "columns": {
            "description": "What is read.",
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"$ref": "#/$defs/Column"}},
            ],
        },
        "first": {"$ref": "#/$defs/Column", "description": "Another column."},
        "kind": {"enum": ["a", "b"], "description": "A kind."},
    },
    "$defs": {
        "Column": {
            "type": "object",
            "additionalProperties": False,
            "required": ["name"],
            "properties": {
                "name": {"type": "string"},
                "trim": {"type": "boolean", "default": True},
                "inner": {"$ref": "#/$defs/Column"},
            },
        }
    },
}


def dataset(schema: Any) -> type[Any]:
    class Table(pegboard.DatasetComponent):
        """Rows of a table."""

        config_schema = schema

        def build(self, name: str) -> Any:
            return name

    return Table


class Rows(pegboard.DatasetComponent):
    """Rows of a table."""

    config_schema: ClassVar[Any] = SCHEMA

    def build(self, name: str) -> Any:
        return name


def registry_with(*parts: type[Any]) -> Registry:
    registry = load_plugins(third_party=False).registry
    for part in parts:
        registry.add(part.kind, part, "tables")
    return registry


def config_with(folder: Path, **fields: Any) -> Path:
    entry = {
        "dataset": {"class_name": "Rows", "name": "rows", "sample_ratio": 2, **fields},
        "tokenize_fn": {"class_name": "TextTokenizeFn", "max_length": 64},
    }
    config = {
        "tokenizer": {"class_name": "ByteTokenizer"},
        "model": {"class_name": "Qwen3", "preset": "qwen3-8b"},
        "datasets": [entry],
        "total_steps": 1,
    }
    path = folder / "config.json"
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")
    return path


def load(folder: Path, *parts: type[Any], **fields: Any) -> LoadedConfig:
    return load_run_config(config_with(folder, **fields), (), registry_with(*(parts or (Rows,))))


def problems(folder: Path, *parts: type[Any], **fields: Any) -> list[str]:
    with pytest.raises(pegboard.ConfigError) as caught:
        load(folder, *parts, **fields)
    return [line.removeprefix(f"{folder}/config.json:") for line in str(caught.value).splitlines()]


def test_values_and_defaults_are_read_by_key_and_stand_in_the_dump(tmp_path: Path) -> None:
    loaded = load(tmp_path, path="a.db", first={"name": "x", "inner": {"name": "y"}})
    config = loaded.run.datasets[0].dataset.config
    assert isinstance(config, SchemaConfig)
    assert config["path"] == "a.db" and config["limit"] == 5 and config.get("kind") is None
    filled = {"name": "x", "trim": True, "inner": {"name": "y", "trim": True}}
    assert config["first"] == filled
    with pytest.raises(KeyError):
        config["kind"]
    with pytest.raises(ValidationError):
        config.path = "b.db"  # type: ignore[attr-defined]
    assert pickle.loads(pickle.dumps(config)) == config
    dumped = loaded.resolved["datasets"][0]["dataset"]
    assert dumped["class_name"] == "Rows" and dumped["sample_ratio"] == 2
    assert dumped["limit"] == 5 and dumped["first"] == filled
    assert load(tmp_path, **{k: v for k, v in dumped.items() if k != "class_name"}) is not None


def test_every_problem_is_in_one_report_with_its_place(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        limit="7",
        kind="c",
        columns=[{"name": 3}],
        first={"trim": 1},
        colums=2,
        sampel_ratio=1,
    )
    assert found == [
        "11:15: datasets[0].dataset.path: 'path' is missing",
        '15:14: datasets[0].dataset.limit: expected an integer, found "7"; write it without quotes',
        '16:13: datasets[0].dataset.kind: expected "a" or "b", found "c"',
        "19:15: datasets[0].dataset.columns[0].name: expected a string, found 3",
        "22:14: datasets[0].dataset.first.name: 'name' is missing",
        "23:14: datasets[0].dataset.first.trim: expected a boolean, found 1",
        "25:5: datasets[0].dataset.colums: unknown key 'colums'. Did you mean 'columns'?",
        "26:5: datasets[0].dataset.sampel_ratio: unknown key 'sampel_ratio'. "
        "Did you mean 'sample_ratio'?",
    ]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"path": "a"}, 'path: expected at least 2 characters, found "a"'),
        ({"limit": 0}, "limit: expected greater than or equal to 1, found 0"),
        ({"columns": 3}, "columns: expected a string or a list, found 3"),
        ({"first": {"name": "a", "nam": 1}}, "first.nam: unknown key 'nam'. Did you mean 'name'?"),
        ({"first": [1]}, "first: expected an object, found [1]"),
        ({"limit": None}, "limit: expected an integer, found null"),
    ],
)
def test_a_wrong_value_is_told_in_the_words_of_every_config(
    tmp_path: Path, fields: dict[str, Any], says: str
) -> None:
    (found,) = problems(tmp_path, **{"path": "a.db", **fields})
    assert found.endswith(f"datasets[0].dataset.{says}")


def nest(**changes: Any) -> dict[str, Any]:
    schema = copy.deepcopy(SCHEMA)
    schema["properties"]["limit"].update(changes)
    return schema


UNUSABLE: dict[str, tuple[dict[str, Any], str]] = {
    "no schema": (nest(type="integr"), "$.properties.limit.type: 'integr' is not valid under any"),
    "remote": (
        nest(**{"$ref": "http://127.0.0.1:9/x.json"}),
        "$.properties.limit: reference 'http://127.0.0.1:9/x.json' leads out of the schema; "
        'write what it means under "$defs" and "#/$defs/..." here',
    ),
    "file": (nest(**{"$ref": "other.json#/a"}), "reference 'other.json#/a' leads out"),
    "nowhere": (nest(**{"$ref": "#/$defs/None"}), "reference '#/$defs/None' leads nowhere"),
    "anchor": (nest(**{"$anchor": "a"}), "'$anchor' is not taken; name a schema under"),
    "circle": (
        {**SCHEMA, "$defs": {**SCHEMA["$defs"], "A": {"$ref": "#/$defs/A"}}},
        "$.$defs.A: reference '#/$defs/A' leads to itself",
    ),
    "default": (nest(default=0), "its default does not fit it: 0 is less than the minimum of 1"),
    "pattern": (nest(pattern="("), "$.properties.limit.pattern: '(' is not a 'regex'"),
    "patterns": ({**SCHEMA, "patternProperties": {"(": True}}, "'(' is not a 'regex'"),
    "dialect": ({**SCHEMA, "$schema": "http://x/y"}, "\"$schema\" is 'http://x/y'; expected one"),
    "values": (nest(default={1}), "not JSON: Object of type set is not JSON serializable"),
}


@pytest.mark.parametrize(("schema", "says"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_schema_that_cannot_be_used_is_an_error_where_the_part_is_named(
    schema: dict[str, Any], says: str, tmp_path: Path
) -> None:
    broken = dataset(schema)
    broken.__name__ = "Rows"
    (found,) = problems(tmp_path, broken, path="a.db")
    prefix = "12:19: datasets[0].dataset.class_name: its config_schema can't be used: "
    assert found.startswith(prefix) and says in found
    # Others go on: neither the list of parts nor the editor's schema is stopped by it.
    definitions = run_config_schema(registry_with(broken))["definitions"]
    assert says in definitions["dataset.Rows"]["$comment"]
    check = next(one for one in checks_for("dataset") if one.name == "config_schema_is_sound")
    with pytest.raises(AssertionError):
        check.run(Case(broken, {}, tmp_path))


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        (["type"], "config_schema is of type list; expected a JSON Schema, a dict"),
        (None, "config_schema is of type NoneType"),
        ({}, '"type" is not "object"'),
        ({"type": "object"}, 'says nothing of unknown keys; write "additionalProperties": False'),
        ({**SCHEMA, "properties": []}, '"properties" is not a dict'),
        (nest(description=" "), "property 'limit' has no \"description\""),
        (
            {**SCHEMA, "properties": {"name": {"description": "x"}}},
            "property 'name' is read by the core",
        ),
    ],
)
def test_a_schema_of_a_wrong_form_is_refused_when_it_registers(schema: Any, says: str) -> None:
    with pytest.raises(PluginError) as caught:
        check_component("dataset", dataset(schema))
    assert str(caught.value).startswith("dataset 'Table': ") and says in str(caught.value)


def test_a_part_has_one_config() -> None:
    class Both(pegboard.LossComponent):
        """A loss."""

        config_schema = SCHEMA

        class Config(pegboard.ComponentConfig):
            pass

        config: Config

        def build(self) -> Any:
            return None

    with pytest.raises(PluginError, match="loss 'Both' has a Config and a config_schema; keep one"):
        check_component("loss", Both)


@pytest.mark.parametrize("kind", COMPONENT_KINDS)
def test_a_part_of_every_kind_may_have_one(kind: str) -> None:
    body = {"__doc__": "A part.", "config_schema": SCHEMA, "build": lambda self: None}
    part: Any = type("Part", (COMPONENT_KINDS[kind].base,), body)
    registry = registry_with(part)
    adapter: Any = TypeAdapter(Annotated[Any, pegboard.ComponentOf(kind)])
    made = adapter.validate_python(
        {"class_name": "Part", "path": "a.db"}, context={"registry": registry}
    )
    assert made.config["limit"] == 5
    definition = run_config_schema(registry)["definitions"][f"{kind}.Part"]
    assert definition["properties"]["path"]["type"] == "string"


def test_a_subclass_takes_the_schema_or_gives_its_own() -> None:
    class More(Rows):
        """More rows."""

    class Other(Rows):
        """Other rows."""

        config_schema = nest(default=6)

    assert More.Config is Rows.Config
    assert Other.Config.model_validate({"path": "a.db"})["limit"] == 6  # type: ignore[index]
    check_component("dataset", More)
    check_component("dataset", Other)


def test_the_longest_example_of_a_tokenize_fn_is_read_from_its_schema(tmp_path: Path) -> None:
    class Long(pegboard.TokenizeFnComponent):
        """A tokenize function."""

        config_schema: ClassVar[Any] = {
            "type": "object",
            "additionalProperties": False,
            "properties": {"max_length": {"type": "integer", "default": 9999, "description": "x"}},
        }

        def build(self, tokenizer: Any, model: Any) -> Any:
            return None

    path = config_with(tmp_path, path="a.db")
    config = json.loads(path.read_text())
    config["datasets"][0]["tokenize_fn"] = {"class_name": "Long"}
    path.write_text(json.dumps(config))
    with pytest.raises(pegboard.ConfigError, match="max_length: 9999 is more than dataloader"):
        load_run_config(path, (), registry_with(Rows, Long))


def test_the_editors_schema_says_what_the_parts_own_does(tmp_path: Path) -> None:
    twin = dataset({**SCHEMA, "$defs": {"Column": {"type": "integer"}}})
    schema = run_config_schema(registry_with(Rows, twin))
    jsonschema.Draft7Validator.check_schema(schema)
    validator = jsonschema.Draft7Validator(schema)

    def fits(**fields: Any) -> bool:
        config = json.loads(config_with(tmp_path, **fields).read_text())
        fitting: bool = validator.is_valid(config)
        return fitting

    assert fits(path="a.db", on_bad_record="skip")
    assert fits(path="a.db", columns=[{"name": "x", "inner": {"name": "y"}}])
    assert not fits(path="a.db", columns=[{"name": "x", "inner": {"name": 1}}])
    assert not fits(path="a.db", first={"nam": "x"})
    assert not fits() and not fits(path="a.db", pat=1) and not fits(path="a.db", limit="1")
    # Each has its own "Column".
    assert fits(class_name="Table", path="a.db", first=1)
    assert not fits(class_name="Table", path="a.db", first={"name": "x"})
    for text in (
        json.dumps(schema["definitions"][f"dataset.{name}"]) for name in ("Rows", "Table")
    ):
        assert '"#/$defs' not in text


def test_a_default_that_json_cannot_write_is_left_out() -> None:
    class Limits(pegboard.DatasetComponent):
        """Records between limits."""

        class Config(pegboard.ComponentConfig):
            most: float = Field(default=math.inf, allow_inf_nan=True, description="A limit.")
            odd: float = Field(default=math.nan, allow_inf_nan=True, description="A number.")
            span: tuple[float, float] = Field(default=(-math.inf, 0.5), description="Limits.")
            least: float = Field(default=0.5, description="A limit.")

        config: Config

        def build(self, name: str) -> Any:
            return None

    schema = run_config_schema(registry_with(Limits))
    json.dumps(schema, allow_nan=False)
    fields = schema["definitions"]["dataset.Limits"]["properties"]
    assert fields["most"]["type"] == fields["odd"]["type"] == "number"
    names = ("most", "odd", "span", "least")
    assert [name for name in names if "default" in fields[name]] == ["least"]


def test_newer_words_become_those_that_editors_know(tmp_path: Path) -> None:
    newer = {
        "type": "object",
        "unevaluatedProperties": False,
        "propertyNames": {"pattern": "^p"},
        "maxProperties": 2,
        "dependentRequired": {"pair": ["path"]},
        "properties": {
            "path": {"type": "string", "description": "x"},
            "pair": {
                "type": "array",
                "prefixItems": [{"type": "string"}, {"const": {"$ref": "http://a"}}],
                "items": False,
                "description": "Data is no reference.",
            },
        },
    }
    check_schema(newer)
    part = dataset(newer)
    part.__name__ = "Rows"
    validator = jsonschema.Draft7Validator(run_config_schema(registry_with(part)))

    def fits(**fields: Any) -> bool:
        fitting: bool = validator.is_valid(json.loads(config_with(tmp_path, **fields).read_text()))
        return fitting

    pair = ["a", {"$ref": "http://a"}]
    assert fits(path="a", pair=pair) and not fits(pair=pair) and not fits(path="a", pair=[1])
    assert not fits(path="a", pair=[*pair, 1])
    load(tmp_path, part, path="a", pair=pair)
    (found,) = problems(tmp_path, part, path="a", pear=1)
    assert found.endswith("dataset.pear: unknown key 'pear'. Did you mean 'pair'?")


def test_a_part_with_a_schema_costs_jsonschema_only_where_it_is_named(tmp_path: Path) -> None:
    plugin = tmp_path / "tables_plugin.py"
    plugin.write_text(
        "import pegboard\n"
        "class Rows(pegboard.DatasetComponent):\n"
        '    """Rows."""\n'
        f"    config_schema = {SCHEMA!r}\n"
        "    def build(self, name):\n"
        "        return name\n"
        "@pegboard.hookimpl\n"
        "def register_datasets(register):\n"
        "    register(Rows)\n",
        encoding="utf-8",
    )
    code = (
        "import sys; from pegboard.cli import main\n"
        "assert main(['plugins', '--plugin', sys.argv[1]]) == 0\n"
        "assert 'jsonschema' not in sys.modules\n"
        "assert main(['check', sys.argv[2], '--plugin', sys.argv[1]]) == 0\n"
        "assert 'jsonschema' in sys.modules and 'torch' not in sys.modules\n"
    )
    words = [sys.executable, "-c", code, str(plugin), str(config_with(tmp_path, path="a.db"))]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
