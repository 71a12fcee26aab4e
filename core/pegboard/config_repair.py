"""What is left of a config that has mistakes, so that the parts that are valid by themselves are checked beside them.

First without the keys that are wrong; if a section can't be without them, as far as its fields are
valid one by one. What is not there then has no attribute.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from pegboard.component import ComponentConfig
from pegboard.json_source import JsonPath

__all__ = ["ABSENT", "child_of", "what_is_valid"]

Section = TypeVar("Section", bound=ComponentConfig)
ABSENT: Any = object()
"""What stands where nothing does."""


def what_is_valid(
    section: type[Section], data: dict[str, Any], failed: Sequence[JsonPath], context: Any
) -> Section:
    """An instance without what is wrong; required fields that are wrong are no attributes of it.

    Items of lists keep their places: one of which nothing is valid is None.

    Args:
        section: class to make.
        data: its JSON; not changed.
        failed: paths that are wrong.
        context: what validators are given.
    """
    try:
        return section.model_validate_json(json.dumps(_without(data, failed)), context=context)
    except ValidationError:
        return _salvaged(section, data, context)


def child_of(node: Any, step: str | int) -> Any:
    """What stands in an object or a list; ABSENT if there is nothing."""
    if isinstance(node, dict):
        return node.get(str(step), ABSENT)
    if isinstance(node, list) and isinstance(step, int) and step < len(node):
        return node[step]
    return ABSENT


def _without(data: dict[str, Any], failed: Sequence[JsonPath]) -> dict[str, Any]:
    data = copy.deepcopy(data)
    for path in failed:
        holder: dict[str, Any] | None = None
        key, node = "", data
        for step in path:
            if isinstance(node, dict):
                holder, key = node, str(step)
            node = child_of(node, step)
        if holder is not None:
            holder.pop(key, None)
    return data


def _salvaged(section: type[Section], data: dict[str, Any], context: Any) -> Section:
    kept = {}
    for name, field in section.model_fields.items():
        if name in data:
            value = _valid_value(field, data[name], context)
            if value is not ABSENT:
                kept[name] = value
    return section.model_construct(**kept)


def _valid_value(field: FieldInfo, data: Any, context: Any) -> Any:
    annotation: Any = field.annotation
    whole: TypeAdapter[Any] = TypeAdapter(Annotated[annotation, field])
    try:
        return whole.validate_json(json.dumps(data), context=context)
    except ValidationError:
        pass
    inner = next((one for one in (annotation, *get_args(annotation)) if _is_section(one)), None)
    if inner is None:
        return ABSENT
    if get_origin(annotation) is tuple and isinstance(data, list):
        items = (_salvaged(inner, one, context) if isinstance(one, dict) else None for one in data)
        return tuple(items)
    return _salvaged(inner, data, context) if isinstance(data, dict) else ABSENT


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, ComponentConfig)
