"""A config field that holds a part: `text_config: Annotated[ModelComponent, ComponentOf("model")]`.

Its JSON is flat, `{"class_name": "Qwen3", "hidden_size": 64}`; its value is an instance of the
light class. The registry comes in through pydantic's context, no config class is built per registry.
Errors inside keep their whole path and are put in a config's words (near misses, found values).
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

from pegboard.component import COMPONENT_KINDS, TAKEN_OUT, Component, ModelComponent
from pegboard.errors import ConfigError
from pegboard.json_schema import known_properties
from pegboard.registry import nearest
from pegboard.schema_config import SchemaConfig

if TYPE_CHECKING:
    from pegboard.registry import Registry

__all__ = [
    "DATASET_OPTIONS",
    "ComponentOf",
    "component_to_json",
    "merge_fields",
    "model_fields_of",
    "rewrite_errors",
]

CORE_KEYS = ("class_name", "plugin")

DATASET_OPTIONS = TAKEN_OUT["dataset"]
"""Keys written inside a dataset's object that the core reads itself, for every dataset."""


class ComponentOf:
    """Annotation of a field that holds any registered part of a kind.

    Raises (while validating): every problem of the part's own config, under the field's path.

    >>> from typing import Annotated
    >>> from pegboard import ComponentConfig, ComponentOf, LossComponent
    >>> from pegboard.plugin_manager import load_plugins
    >>> class Config(ComponentConfig):
    ...     inner: Annotated[LossComponent, ComponentOf("loss")]
    >>> parts = {"registry": load_plugins(third_party=False).registry}
    >>> text = '{"inner": {"class_name": "ChunkedCrossEntropy"}}'
    >>> type(Config.model_validate_json(text, context=parts).inner).__name__
    'ChunkedCrossEntropy'
    """

    def __init__(self, kind: str) -> None:
        if kind not in COMPONENT_KINDS:
            raise ValueError(f"no kind {kind!r}; kinds are {', '.join(COMPONENT_KINDS)}")
        self.kind = kind

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        del source, handler
        return core_schema.with_info_plain_validator_function(
            self._validate,
            serialization=core_schema.plain_serializer_function_ser_schema(component_to_json),
        )

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        del schema, handler
        return {"x-kind": self.kind}

    def _validate(self, value: Any, info: core_schema.ValidationInfo) -> Component:
        base = COMPONENT_KINDS[self.kind].base
        if isinstance(value, base):
            return value
        if not isinstance(value, dict):
            raise _problem(f'expected an object {{"class_name": ...}}, found {shown(value)}')
        registry: Registry = (info.context or {})["registry"]
        fields = value
        if self.kind == "model":
            try:
                fields = model_fields_of(value, registry)
            except ConfigError as error:
                raise _problem_at("preset", str(error)) from None
        cls, plugin = self._find(fields, registry)
        own = {key: item for key, item in fields.items() if key not in CORE_KEYS}
        try:
            config = cls.Config.model_validate_json(json.dumps(own), context=info.context)
        except ValidationError as error:
            raise rewrite_errors(error, cls.Config, TAKEN_OUT.get(self.kind, ())) from None
        component = cls(config)
        component.plugin = plugin
        return component

    def _find(
        self, fields: Mapping[str, Any], registry: Registry
    ) -> tuple[type[Component], str | None]:
        class_name, plugin = fields.get("class_name"), fields.get("plugin")
        if class_name is None:
            known = ", ".join(registry.names(self.kind)) or "none installed"
            raise _problem(f'"class_name" is missing; {self.kind} can be: {known}')
        if not isinstance(class_name, str):
            raise _problem_at("class_name", f"expected a string, found {shown(class_name)}")
        if plugin is not None and not isinstance(plugin, str):
            raise _problem_at("plugin", f"expected a string, found {shown(plugin)}")
        try:
            return registry.find(self.kind, class_name, plugin), plugin
        except ConfigError as error:
            raise _problem_at("class_name", str(error)) from None


def component_to_json(component: Component) -> dict[str, Any]:
    """The part's JSON with every default written out; reloads to an equal part."""
    picked = {"plugin": component.plugin} if component.plugin else {}
    return {
        "class_name": type(component).__name__,
        **picked,
        **component.config.model_dump(mode="json"),
    }


def model_fields_of(fields: Mapping[str, Any], registry: Registry) -> dict[str, Any]:
    """A model's JSON with its `preset` replaced by the preset's fields, which lose against it.

    Raises:
        ConfigError: no such preset, or one of another class.
    """
    rest = dict(fields)
    preset = rest.pop("preset", None)
    if preset is None:
        return rest
    class_name = rest.get("class_name")
    if not isinstance(preset, str):
        raise ConfigError(f"expected a string, found {shown(preset)}")
    if isinstance(class_name, str) and class_name in registry.names("model"):
        plugin = rest.get("plugin")
        cls = registry.find("model", class_name, plugin if isinstance(plugin, str) else None)
        assert issubclass(cls, ModelComponent)
        if preset in cls.presets:
            return merge_fields(cls.presets[preset], rest)
    found = registry.for_preset(preset)
    if found is None:
        known = registry.preset_names()
        near = nearest(preset, known)
        hint = f"Did you mean '{near}'?" if near else f"Known: {', '.join(known) or 'none'}."
        elsewhere = registry.offered_elsewhere("preset", preset).removeprefix(". ")
        raise ConfigError(f"no model preset named '{preset}'. {elsewhere or hint}")
    if class_name is not None and class_name != found[0]:
        raise ConfigError(f"'{preset}' is a {found[0]}, but class_name is {shown(class_name)}")
    return merge_fields({"class_name": found[0], **found[1]}, rest)


def merge_fields(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`top` over `base` as `extends` merges: key by key, another class_name replaces."""
    if "class_name" in base and "class_name" in top and base["class_name"] != top["class_name"]:
        return dict(top)
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            value = merge_fields(below, value)
        merged[key] = value
    return merged


def rewrite_errors(
    error: ValidationError, model: type[BaseModel], also_known: tuple[str, ...] = ()
) -> ValidationError:
    """The same errors in a config's words; already rewritten ones pass unchanged.

    Error types of the result: `unknown_key`, `missing_key` or `problem`.

    Args:
        also_known: keys that the object may have beside the fields of `model`.
    """
    details = []
    for one in error.errors(include_url=False):
        loc, kind, message = one["loc"], "problem", one["msg"]
        if one["type"] in ("unknown_key", "missing_key", "problem"):
            kind = one["type"]
        elif one["type"] == "extra_forbidden":
            known = known_keys(model, loc[:-1])
            if len(loc) == 1:
                known += also_known
            kind, message = "unknown_key", _unknown_key(str(loc[-1]), known)
        elif one["type"] == "missing":
            what = f"item [{loc[-1]}]" if isinstance(loc[-1], int) else f"'{loc[-1]}'"
            kind, message = "missing_key", f"{what} is missing"
        elif one["type"] == "too_short" and len(one["input"]) >= one["ctx"]["min_length"]:
            continue  # pydantic counts valid items only, and their own errors are here
        elif one["type"] == "default_factory_not_called":
            continue  # the default is made of other fields, and their own errors are here
        elif one["type"] in ("too_short", "too_long"):
            message = f"expected {_item_count(one['ctx'])}, found {len(one['input'])}"
        elif one["type"] in ("value_error", "assertion_error"):
            message = message.split(", ", 1)[-1]
        else:
            message = _wrong_value(message, one["input"])
        details.append(InitErrorDetails(type=_problem(message, kind), loc=loc, input=one["input"]))
    return ValidationError.from_exception_data(model.__name__, details)


def known_keys(model: type[BaseModel], loc: tuple[str | int, ...]) -> list[str]:
    """Keys that an object inside a config may have; [] if it is not one of fixed keys."""
    if issubclass(model, SchemaConfig):
        return known_properties(model.json_schema, loc)
    annotation: Any = model
    for step in loc:
        choices = [choice for choice in _models_in(annotation) if step in choice.model_fields]
        if isinstance(step, str) and choices:
            annotation = choices[0].model_fields[step].annotation
    return sorted({name for choice in _models_in(annotation) for name in choice.model_fields})


def shown(value: Any) -> str:
    """A found value as JSON, shortened."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, tuple, list, dict):
        return [model for part in get_args(annotation) for model in _models_in(part)]
    if get_origin(annotation) is not None and hasattr(annotation, "__metadata__"):
        return _models_in(get_args(annotation)[0])
    return []


_SPELLED_ELSEWHERE = {
    "total_epoch": "epoch_num",
    "num_epochs": "epoch_num",
    "num_train_epochs": "epoch_num",
    "max_steps": "total_steps",
    "ep_size": "expert_parallel_size",
    "hsdp_sharding_size": "replicate_size",
    "max_seq_length": "max_length",
    "learning_rate": "lr",
    "optim_cfg": "optimizer",
    "lr_cfg": "lr_schedule",
    "fsdp_cfg": "parallel",
}
"""What other trainers call a field, where the nearest spelling would be another one or none."""


def _unknown_key(key: str, known: list[str]) -> str:
    elsewhere = _SPELLED_ELSEWHERE.get(key)
    near = elsewhere if elsewhere in known else nearest(key, known)
    if near:
        return f"unknown key '{key}'. Did you mean '{near}'?"
    return f"unknown key '{key}'. Known: {', '.join(known) or 'none'}."


def _wrong_value(message: str, found: Any) -> str:
    text = (
        message.replace("Input should be", "expected")
        .replace("a valid ", "a ")
        .replace("a integer", "an integer")
    )
    text = text.replace("a dictionary", "an object").replace("a array", "a list")
    hint = ""
    if isinstance(found, str) and ("number" in text or "integer" in text):
        try:
            float(found)
            hint = "; write it without quotes"
        except ValueError:
            pass
    if isinstance(found, str) and "boolean" in text:
        hint = "; write true or false, without quotes"
    return f"{text}, found {shown(found)}{hint}"


def _item_count(limits: Mapping[str, Any]) -> str:
    if "max_length" in limits:
        return f"at most {limits['max_length']} items"
    return f"at least {limits['min_length']} item" + ("s" if limits["min_length"] != 1 else "")


def _problem(message: str, kind: Any = "problem") -> PydanticCustomError:
    return PydanticCustomError(kind, "{text}", {"text": message})


def _problem_at(key: str, message: str) -> ValidationError:
    details = InitErrorDetails(type=_problem(message), loc=(key,), input=None)
    return ValidationError.from_exception_data("component", [details])
