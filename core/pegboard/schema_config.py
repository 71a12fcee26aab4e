"""A part's config by a JSON Schema of its own, instead of a pydantic `Config`.

`config_schema` of a component becomes a `Config` class whose one rule is the schema, so that everything else (places
of errors, dumps, overrides) is the same. References are pointers into the schema itself: nothing is ever fetched.
`default` of a property is written in where the key is missing, before the schema is asked.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from pydantic import ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from pegboard.component import ComponentConfig
from pegboard.errors import PluginError
from pegboard.json_schema import (
    all_of,
    check_schema,
    child_schema,
    properties_of,
    validator_of,
)

__all__ = ["SchemaConfig", "default_values", "of_schema"]


class SchemaConfig(ComponentConfig):
    """The config of a part that has a `config_schema`: `config["path"]` for each property.

    >>> from pegboard import LossComponent, SchemaConfig
    >>> class Focal(LossComponent):
    ...     "Weighs tokens by how wrong they are."
    ...     config_schema = {
    ...         "type": "object",
    ...         "additionalProperties": False,
    ...         "properties": {"gamma": {"type": "number", "default": 2.0, "description": "Power."}},
    ...     }
    >>> issubclass(Focal.Config, SchemaConfig)
    True
    >>> Focal.Config.model_validate_json("{}")["gamma"]
    2.0
    """

    model_config = ConfigDict(extra="allow")  # what there may be is the schema's matter
    json_schema: ClassVar[Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _fits(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        try:
            check_schema(cls.json_schema)
        except PluginError as error:
            # The part's author is at fault, the place is where the config names the part.
            raise ValidationError.from_exception_data(
                cls.__name__,
                [_details(("class_name",), f"its config_schema can't be used: {error}")],
            ) from None
        filled = _with_defaults(copy.deepcopy(dict(value)), cls.json_schema, cls.json_schema)
        if found := list(_problems(cls.json_schema, filled)):
            raise ValidationError.from_exception_data(cls.__name__, found)
        return filled

    def __getitem__(self, name: str) -> Any:
        """The value of a property; KeyError if it is not there and has no default."""
        return (self.__pydantic_extra__ or {})[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a property, or `default`."""
        return (self.__pydantic_extra__ or {}).get(name, default)


def of_schema(owner: type[Any], schema: Any) -> type[SchemaConfig]:
    """A `Config` class for the schema, as if it stood in `owner`; nothing is checked yet."""
    content = {
        "__doc__": f"Fields of {owner.__name__}.",
        "__module__": owner.__module__,
        "__qualname__": f"{owner.__qualname__}.Config",  # so that it pickles
        "json_schema": schema,
    }
    config: type[SchemaConfig] = type("Config", (SchemaConfig,), content)
    return config


def default_values(config: type[ComponentConfig]) -> dict[str, Any]:
    """Default of each field that a config has, of either sort; None where it has none."""
    if issubclass(config, SchemaConfig):
        schema = config.json_schema
        return {
            name: inner.get("default") if isinstance(inner, Mapping) else None
            for part in all_of(schema, schema)
            for name, inner in properties_of(part).items()
        }
    return {name: field.get_default() for name, field in config.model_fields.items()}


def _with_defaults(value: Any, schema: Any, root: Any) -> Any:
    """Fill what is missing in `value`, in place. Never inside a default, nor by a choice (anyOf and its like)."""
    given = set(value) if isinstance(value, dict) else set()
    for part in all_of(schema, root):
        if isinstance(value, dict):
            for name, inner in properties_of(part).items():
                if name in given:
                    _with_defaults(value[name], inner, root)
                elif name not in value and isinstance(inner, Mapping) and "default" in inner:
                    value[name] = copy.deepcopy(inner["default"])
        elif isinstance(value, list):
            for index, item in enumerate(value):
                _with_defaults(item, child_schema(part, index), root)
    return value


def _problems(schema: Mapping[str, Any], value: Any) -> Iterator[InitErrorDetails]:
    """Every problem of a config, in pydantic's words where it has them; one for each place."""
    from jsonschema.exceptions import best_match

    seen: set[tuple[str | int, ...]] = set()
    errors = [
        # Of the choice that fits best, what is wrong with it.
        best_match([error]) if error.validator in ("anyOf", "oneOf") else error
        for error in validator_of(schema, schema).iter_errors(value)
    ]
    for error in sorted(errors, key=lambda one: one.validator != "type"):
        for loc, kind in _places(error):
            if loc in seen:
                continue
            seen.add(loc)
            if kind == "other":
                yield _details(loc, _expected(error), error.instance)
            else:
                yield InitErrorDetails(type=kind, loc=loc, input=error.instance)


def _places(error: Any) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Where an error is to be shown, and pydantic's name of it or `other`."""
    path = tuple(error.absolute_path)
    if error.validator == "required":
        for key in error.validator_value:
            if key not in error.instance:
                yield (*path, key), "missing"
    elif (
        error.validator in ("additionalProperties", "unevaluatedProperties")
        and error.validator_value is False
    ):
        for key in _extra_keys(error):
            yield (*path, key), "extra_forbidden"
    else:
        yield path, "other"


def _extra_keys(error: Any) -> list[str]:
    if error.validator == "unevaluatedProperties":
        # Which keys were evaluated only the validator knows: it names them in its message.
        return [key for key in error.instance if repr(key) in error.message]
    known, patterns = error.schema.get("properties", {}), error.schema.get("patternProperties", {})
    return [
        key
        for key in error.instance
        if key not in known and not any(re.search(pattern, key) for pattern in patterns)
    ]


_TYPES = {
    "array": "a list",
    "boolean": "a boolean",
    "integer": "an integer",
    "null": "null",
    "number": "a number",
    "object": "an object",
    "string": "a string",
}
_EXPECTED: Mapping[str, Callable[[Any], str]] = {
    "type": lambda v: " or ".join(_TYPES[name] for name in ([v] if isinstance(v, str) else v)),
    "enum": lambda v: " or ".join(map(json.dumps, v)),
    "const": json.dumps,
    "minimum": lambda v: f"greater than or equal to {v}",
    "maximum": lambda v: f"less than or equal to {v}",
    "exclusiveMinimum": lambda v: f"greater than {v}",
    "exclusiveMaximum": lambda v: f"less than {v}",
    "multipleOf": lambda v: f"a multiple of {v}",
    "minLength": lambda v: f"at least {v} character" + ("s" if v != 1 else ""),
    "maxLength": lambda v: f"at most {v} character" + ("s" if v != 1 else ""),
    "pattern": lambda v: f"a text that matches {v}",
    "minItems": lambda v: f"at least {v} item" + ("s" if v != 1 else ""),
    "maxItems": lambda v: f"at most {v} item" + ("s" if v != 1 else ""),
    "uniqueItems": lambda v: "no item twice",
}


def _expected(error: Any) -> str:
    """What was expected; whoever rewrites errors adds what was found."""
    if error.validator in ("anyOf", "oneOf") and error.context:
        if all(one.validator == "type" and not one.relative_path for one in error.context):
            choices = [_EXPECTED["type"](one.validator_value) for one in error.context]
            return f"Input should be {' or '.join(dict.fromkeys(choices))}"
    words = _EXPECTED.get(error.validator)
    if words is None:
        return " ".join(str(error.message).split())
    return f"Input should be {words(error.validator_value)}"


def _details(loc: tuple[str | int, ...], message: str, found: Any = None) -> InitErrorDetails:
    kind: Any = "wrong_value" if message.startswith("Input should be") else "problem"
    return InitErrorDetails(
        type=PydanticCustomError(kind, "{text}", {"text": message}), loc=loc, input=found
    )
