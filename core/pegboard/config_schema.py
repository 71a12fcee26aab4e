"""JSON Schema of run configs over the installed parts, for editors.

Written as if/then per kind, not oneOf: editors offer every class name, and the chosen one's fields.
Draft 7, which editors know best. A config that extends another may leave out what the other holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic.json_schema import GenerateJsonSchema

from pegboard.component import COMPONENT_KINDS, Component, ComponentConfig, ModelComponent
from pegboard.component_field import DATASET_OPTIONS
from pegboard.errors import PluginError
from pegboard.json_schema import check_schema, map_subschemas
from pegboard.run_config import RunConfig
from pegboard.schema_config import SchemaConfig

if TYPE_CHECKING:
    from pegboard.registry import Registry

__all__ = ["run_config_schema"]

JsonSchema = dict[str, Any]
_COMMENT: JsonSchema = {"description": "Ignored."}
_PLUGIN: JsonSchema = {"type": "string", "description": "Plugin to take the class from."}
_REQUIRED_OF_ROOT = {"datasets"}
"""Model and tokenizer may follow from load_from."""
_COMPLETE = "complete.model"
"""What a model must have that neither a preset nor the config.json of load_from fills up."""


def run_config_schema(registry: Registry) -> JsonSchema:
    """The schema, draft-07; its root is a whole config, its definitions are kinds and classes."""
    definitions: dict[str, JsonSchema] = {}
    root = _of_model(RunConfig, "run", definitions)
    for kind in COMPONENT_KINDS:
        definitions[f"kind.{kind}"] = _kind_schema(kind, registry, definitions)
    _move_dataset_options(definitions)
    for schema in (root, *definitions.values()):
        _allow_comments(schema)
    del root["required"]
    # One of the two lengths; the other may be null, as in a full dump.
    lengths = [
        {"required": [key], "properties": {key: {"type": "integer"}}}
        for key in ("epoch_num", "total_steps")
    ]
    source = {"required": ["load_from"], "properties": {"load_from": {"type": "string"}}}
    root["properties"] |= {
        "$schema": {"type": "string", "description": "Schema for the editor; ignored."},
        "extends": {
            "type": "string",
            "description": "Config below this one, relative to this file.",
        },
    }
    root["if"] = {"not": {"required": ["extends"]}}
    root["then"] = {
        "required": sorted(_REQUIRED_OF_ROOT),
        "anyOf": lengths,
        "if": {"not": source},
        "then": {
            "required": ["model", "tokenizer"],
            "properties": {"model": {"$ref": f"#/definitions/{_COMPLETE}"}},
        },
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Pegboard run config",
        **root,
        "definitions": dict(sorted(definitions.items())),
    }


def _kind_schema(kind: str, registry: Registry, definitions: dict[str, JsonSchema]) -> JsonSchema:
    """An object whose class_name picks the fields."""
    names = list(registry.names(kind))
    summaries, branches = [], []
    for name in names:
        classes = [cls for cls in registry.classes(kind) if cls.__name__ == name]
        summaries.append((classes[0].__doc__ or "").strip().split("\n", 1)[0])
        if len(classes) > 1:
            continue  # contested: which fields it has depends on "plugin"
        definitions[f"{kind}.{name}"] = _class_schema(classes[0], kind, definitions)
        branches.append(
            {
                "if": {"required": ["class_name"], "properties": {"class_name": {"const": name}}},
                "then": {"$ref": f"#/definitions/{kind}.{name}"},
            }
        )
    class_name = {"type": "string", "enum": names, "enumDescriptions": summaries}
    schema: JsonSchema = {
        "type": "object",
        "required": ["class_name"],
        "properties": {"class_name": class_name},
    }
    if not names:  # enum and allOf can't be empty
        schema["properties"]["class_name"] = False
    if branches:
        schema["allOf"] = branches
    if kind == "model":
        definitions[_COMPLETE] = _complete_model(names, definitions)
    presets = list(registry.preset_names()) if kind == "model" else []
    if presets:
        # A preset names the class; its other fields are then checked by the run, not by the editor.
        del schema["required"]
        schema["properties"]["preset"] = {"type": "string", "enum": presets}
        schema["anyOf"] = [{"required": ["class_name"]}, {"required": ["preset"]}]
    return schema


def _class_schema(
    cls: type[Component], kind: str, definitions: dict[str, JsonSchema]
) -> JsonSchema:
    config: type[ComponentConfig] = cls.Config
    try:
        if issubclass(config, SchemaConfig):
            schema = _of_schema(config.json_schema, f"#/definitions/{kind}.{cls.__name__}")
        else:
            schema = _of_model(config, f"{kind}.{cls.__name__}", definitions)
    except Exception as error:  # noqa: BLE001 - a stranger's types; the other parts have schemas
        schema = {"type": "object", "$comment": f"no schema: {type(error).__name__}: {error}"}
    schema["description"] = (cls.__doc__ or "").strip().split("\n", 1)[0]
    schema.setdefault("properties", {})
    schema["properties"] |= {"class_name": {"const": cls.__name__}, "plugin": _PLUGIN}
    if issubclass(cls, ModelComponent):
        schema["properties"]["preset"] = {"type": "string", "enum": sorted(cls.presets)}
        definitions[f"{_COMPLETE}.{cls.__name__}"] = {
            "if": {"not": {"required": ["preset"]}},
            "then": {
                "required": schema.pop("required", []),
                "properties": {
                    name: {"$ref": f"#/definitions/{_COMPLETE}"}
                    for name, field in schema["properties"].items()
                    if _holds_model(field)
                },
            },
        }
    return schema


def _complete_model(names: list[str], definitions: Mapping[str, JsonSchema]) -> JsonSchema:
    """What each class requires, where nothing else can give it; a class of a contested name is left out."""
    branches = [
        {
            "if": {"required": ["class_name"], "properties": {"class_name": {"const": name}}},
            "then": {"$ref": f"#/definitions/{_COMPLETE}.{name}"},
        }
        for name in names
        if f"{_COMPLETE}.{name}" in definitions
    ]
    return {"allOf": branches} if branches else {}


def _holds_model(field: Any) -> bool:
    choices = [field, *field.get("allOf", ()), *field.get("anyOf", ())]
    return any(choice.get("$ref") == "#/definitions/kind.model" for choice in choices)


def _of_model(model: type[Any], prefix: str, definitions: dict[str, JsonSchema]) -> JsonSchema:
    """Pydantic's schema of a config class, its own definitions moved under `prefix`."""
    schema = model.model_json_schema(
        ref_template=f"#/definitions/{prefix}.{{model}}", schema_generator=_Generator
    )
    for name, definition in schema.pop("$defs", {}).items():
        definitions[f"{prefix}.{name}"] = _resolved(definition)
    result = _resolved(schema)
    assert isinstance(result, dict)
    return result


def _of_schema(schema: JsonSchema, place: str) -> JsonSchema:
    """A part's own schema, in draft-07 and with its references where it stands now.

    One that can't be used leaves the part without fields, and says why: the others are not at fault.
    """
    try:
        check_schema(schema)
    except PluginError as error:
        return {"type": "object", "$comment": f"its config_schema can't be used: {error}"}
    whole: JsonSchema = _in_draft_7(schema, place)
    # What counts or names all keys would take those of the core for the part's.
    for key in ("$schema", "$id", "title", "minProperties", "maxProperties", "propertyNames"):
        whole.pop(key, None)
    return whole


def _in_draft_7(schema: Any, place: str) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    result = map_subschemas(schema, lambda inner: _in_draft_7(inner, place))
    if "prefixItems" in result:
        if "items" in result:
            result["additionalItems"] = result["items"]
        result["items"] = result.pop("prefixItems")
    dependencies = {**result.pop("dependentRequired", {}), **result.pop("dependentSchemas", {})}
    if dependencies:
        result["dependencies"] = {**result.get("dependencies", {}), **dependencies}
    if "required" in result:
        # What has a default may be left out.
        fields = result.get("properties", {})
        result["required"] = [
            name
            for name in result["required"]
            if not (isinstance(fields.get(name), Mapping) and "default" in fields[name])
        ]
    if "$ref" in result:
        reference = {"$ref": place + result.pop("$ref").removeprefix("#")}
        if not result:
            return reference
        result["allOf"] = [*result.get("allOf", ()), reference]  # siblings of $ref are ignored
    return result


class _Generator(GenerateJsonSchema):
    """Leaves out defaults that are parts' JSON or config objects, which editors show badly, and those
    that JSON can't write."""

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> JsonSchema:
        """What has no JSON Schema, such as a function, may be anything: its part stays listed."""
        del schema
        return {"$comment": f"no schema: {error_info}"}

    def default_schema(self, schema: Any) -> JsonSchema:
        result = super().default_schema(schema)
        default = result.get("default")
        items = default if isinstance(default, list) else [default]
        given = schema.get("default")
        numbers = given if isinstance(given, list | tuple) else [given]
        endless = any(isinstance(one, float) and not math.isfinite(one) for one in numbers)
        if endless or any(isinstance(item, dict | list) for item in items):
            result.pop("default", None)
        return result


def _resolved(schema: Any) -> Any:
    """Draft-07 spellings: kinds become references, tuples `items`, and siblings of $ref go."""
    if isinstance(schema, list):
        return [_resolved(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    if "x-kind" in schema:
        return _with_reference(schema, f"#/definitions/kind.{schema['x-kind']}")
    if "$ref" in schema and len(schema) > 1:
        return _with_reference(schema, schema["$ref"])
    result = {key: _resolved(value) for key, value in schema.items()}
    if "prefixItems" in result:
        result["items"] = result.pop("prefixItems")
    return result


def _with_reference(schema: Mapping[str, Any], reference: str) -> JsonSchema:
    rest = {key: schema[key] for key in ("title", "description") if key in schema}
    return {**rest, "allOf": [{"$ref": reference}]} if rest else {"$ref": reference}


def _move_dataset_options(definitions: dict[str, JsonSchema]) -> None:
    """An entry's own fields stand inside its dataset's object in JSON."""
    entry = definitions["run.DatasetEntry"]
    options = {key: entry["properties"].pop(key) for key in DATASET_OPTIONS}
    entry["required"] = [key for key in entry["required"] if key not in DATASET_OPTIONS]
    for name, schema in definitions.items():
        if name.startswith("dataset.") and name.count(".") == 1:
            schema["properties"] |= options


def _allow_comments(schema: Any) -> None:
    """`$comment` in every object that has fixed keys."""
    if isinstance(schema, list):
        for item in schema:
            _allow_comments(item)
    elif isinstance(schema, dict):
        for value in list(schema.values()):
            _allow_comments(value)
        if schema.get("additionalProperties") is False:
            schema.setdefault("properties", {})["$comment"] = _COMMENT
