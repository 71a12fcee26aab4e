"""JSON Schemas that parts bring along: which are taken, and what stands where in them.

References are pointers into the schema itself, so a schema is whole by itself: nothing is ever fetched. The package
jsonschema is imported only where a value or a whole schema is checked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from pegboard.errors import PluginError

__all__ = [
    "all_of",
    "check_schema",
    "check_schema_form",
    "child_schema",
    "known_properties",
    "map_subschemas",
    "properties_of",
    "validator_of",
]

DIALECTS = (
    "https://json-schema.org/draft/2020-12/schema",
    "https://json-schema.org/draft/2019-09/schema",
    "http://json-schema.org/draft-07/schema",
)
"""Values of `$schema`; the first is meant where there is none."""

_IN_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_IN_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_ALONE = (
    "additionalItems",
    "additionalProperties",
    "contains",
    "else",
    "if",
    "items",
    "not",
    "propertyNames",
    "then",
    "unevaluatedItems",
    "unevaluatedProperties",
)
"""Keywords under which schemas stand; anything else is data."""

_REFUSED = ("$anchor", "$dynamicAnchor", "$dynamicRef", "$recursiveAnchor", "$recursiveRef", "$id")
"""Other ways to name a schema than a pointer; `$id` of the root says only where it is published."""


def check_schema_form(schema: Any, taken: Iterable[str]) -> None:
    """What can be said of a part's schema without the package jsonschema.

    Args:
        taken: keys that the core takes out before the part's config is read.

    Raises:
        PluginError: it is no object, or has a property that is never set or that nobody explains, or says nothing
        of unknown keys.
    """
    if not isinstance(schema, dict):
        raise PluginError(
            f"config_schema is of type {type(schema).__name__}; expected a JSON Schema, a dict"
        )
    if schema.get("type") != "object":
        raise PluginError('config_schema: "type" is not "object"; a part\'s config is one')
    if not {"additionalProperties", "unevaluatedProperties"} & schema.keys():
        raise PluginError(
            'config_schema says nothing of unknown keys; write "additionalProperties": False, so '
            "that a misspelt one is an error"
        )
    properties = schema.get("properties", {})
    if not isinstance(properties, dict):
        raise PluginError('config_schema: "properties" is not a dict')
    for name, of_name in properties.items():
        if name in taken:
            raise PluginError(
                f"config_schema: property '{name}' is read by the core; give it another name"
            )
        if not isinstance(of_name, dict) or not str(of_name.get("description", "")).strip():
            raise PluginError(f"config_schema: property '{name}' has no \"description\"")


def check_schema(schema: Any) -> None:
    """Check a whole schema; imports jsonschema.

    Raises:
        PluginError: it is no JSON Schema of a known draft, refers to anything outside itself, has a pattern that is
        none, or a default that doesn't fit its own property.
    """
    import jsonschema

    if not isinstance(schema, dict):
        raise PluginError(f"expected a dict, found {type(schema).__name__}")
    dialect = schema.get("$schema", DIALECTS[0])
    if not isinstance(dialect, str) or dialect.rstrip("#") not in DIALECTS:
        raise PluginError(f'"$schema" is {dialect!r}; expected one of {", ".join(DIALECTS)}')
    try:
        json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PluginError(f"not JSON: {error}") from None
    try:
        _validator_class(schema).check_schema(schema)
    except jsonschema.SchemaError as error:
        raise PluginError(f"{error.json_path}: {error.message}") from None
    for path, inner in _subschemas(schema, "$"):
        _check_names(schema, path, inner)
    for path, inner in _subschemas(schema, "$"):
        if "default" in inner:
            for misfit in validator_of(schema, inner).iter_errors(inner["default"]):
                raise PluginError(f"{path}: its default does not fit it: {misfit.message}")


def known_properties(schema: Any, path: tuple[str | int, ...]) -> list[str]:
    """Keys that the object at `path` of a config may have, as far as the schema names them."""
    found = [schema]
    for step in path:
        found = [
            inner
            for one in found
            for part in all_of(one, schema)
            if (inner := child_schema(part, step)) is not None
        ]
    names = {name for one in found for part in all_of(one, schema) for name in properties_of(part)}
    return sorted(names)


def map_subschemas(schema: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """A copy in which every schema right below is changed; data (const, enum, default, ...) stays."""
    result = dict(schema)
    for key, value in schema.items():
        if key in _IN_MAPS and isinstance(value, Mapping):
            result[key] = {name: change(one) for name, one in value.items()}
        elif key in _IN_LISTS and isinstance(value, list):
            result[key] = [change(one) for one in value]
        elif key in _ALONE:
            result[key] = change(value)
    return result


def all_of(schema: Any, root: Any) -> list[Mapping[str, Any]]:
    """The schemas that always apply where this one does: itself, what it refers to, its allOf."""
    found: list[Mapping[str, Any]] = []
    todo = [schema]
    while todo:
        one = todo.pop(0)
        if not isinstance(one, Mapping) or any(one is known for known in found):
            continue
        found.append(one)
        todo += [_target(root, one.get("$ref")), *one.get("allOf", ())]
    return found


def properties_of(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Its own properties, by name."""
    properties: Mapping[str, Any] = schema.get("properties", {})
    return properties


def child_schema(schema: Mapping[str, Any], step: str | int) -> Any:
    """What the schema says of a key or an item; None if nothing."""
    if isinstance(step, str):
        return properties_of(schema).get(step)
    items = schema.get("prefixItems", schema.get("items"))
    if isinstance(items, list):
        return items[step] if step < len(items) else None
    return schema.get("items")


def _validator_class(schema: Mapping[str, Any]) -> Any:
    import jsonschema

    return jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)


def validator_of(root: Mapping[str, Any], schema: Mapping[str, Any]) -> Any:
    """Of a schema inside `root`; its references start at the root."""
    import referencing

    # An empty registry: jsonschema would fetch a reference by http otherwise.
    whole = _validator_class(root)(root, registry=referencing.Registry())
    return whole.evolve(schema=schema)


def _subschemas(schema: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place in words, schema) of a schema and of all that stand in it; booleans are left out."""
    if not isinstance(schema, Mapping):
        return
    yield path, schema
    for key, value in schema.items():
        if key in _IN_MAPS and isinstance(value, Mapping):
            for name, one in value.items():
                yield from _subschemas(one, f"{path}.{key}.{name}")
        elif key in _IN_LISTS and isinstance(value, list):
            for index, one in enumerate(value):
                yield from _subschemas(one, f"{path}.{key}[{index}]")
        elif key in _ALONE:
            yield from _subschemas(value, f"{path}.{key}")


def _check_names(root: Mapping[str, Any], path: str, schema: Mapping[str, Any]) -> None:
    for key in _REFUSED:
        if key in schema and not (key == "$id" and schema is root):
            raise PluginError(
                f'{path}: {key!r} is not taken; name a schema under "$defs" and point to it'
            )
    reference = schema.get("$ref")
    if reference is None:
        return
    if not isinstance(reference, str) or not re.match(r"#(/|$)", reference):
        raise PluginError(
            f'{path}: reference {reference!r} leads out of the schema; write what it means under "$defs" '
            'and "#/$defs/..." here'
        )
    seen = [reference]
    while True:
        target = _target(root, reference)
        if target is None:
            raise PluginError(f"{path}: reference {reference!r} leads nowhere")
        reference = target.get("$ref") if isinstance(target, Mapping) else None
        if reference is None:
            return
        if reference in seen:
            raise PluginError(f"{path}: reference {reference!r} leads to itself")
        seen.append(reference)


def _target(root: Any, reference: Any) -> Any:
    """What a local reference points to; None if it is nothing."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    node = root
    for word in unquote(reference).removeprefix("#").split("/")[1:]:
        step = word.replace("~1", "/").replace("~0", "~")
        if isinstance(node, Mapping) and step in node:
            node = node[step]
        elif isinstance(node, list) and step.isdecimal() and int(step) < len(node):
            node = node[int(step)]
        else:
            return None
    return node
