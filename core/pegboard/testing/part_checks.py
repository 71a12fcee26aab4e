"""What every part promises: a class that a JSON file can name and a config that says what it is."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from pegboard.component import COMPONENT_KINDS, Component, ComponentConfig
from pegboard.component_field import component_to_json
from pegboard.errors import PluginError
from pegboard.json_schema import check_schema
from pegboard.registry import check_component
from pegboard.schema_config import SchemaConfig
from pegboard.testing.case import Case, Check

__all__ = ["CHECKS"]


def _is_a_part_of_its_kind(case: Case) -> None:
    cls = case.component
    assert issubclass(cls, Component), f"{cls.__name__} is no pegboard.Component"
    base = COMPONENT_KINDS[cls.kind].base
    assert issubclass(cls, base), f"{cls.__name__} has kind {cls.kind!r} but is no {base.__name__}"
    assert issubclass(cls.Config, ComponentConfig), "Config is no pegboard.ComponentConfig"
    build = getattr(cls, "build", None)
    assert build is not getattr(base, "build", None), f"{cls.__name__} has no build of its own"


def _registers(case: Case) -> None:
    try:
        check_component(case.component.kind, case.component)
    except PluginError as error:
        raise AssertionError(f"it can't be registered: {error}") from error


def _says_what_it_is(case: Case) -> None:
    text = (case.component.__doc__ or "").strip()
    assert text, "the class has no docstring; its first line is what `pegboard plugins` prints"
    first = text.splitlines()[0]
    assert first.endswith("."), f"the docstring's first line is no sentence: {first!r}"
    assert len(first) <= 120, f"the docstring's first line has {len(first)} characters, over 120"


def _describes_every_field(case: Case) -> None:
    config: type[ComponentConfig] = case.component.Config
    if issubclass(config, SchemaConfig):
        fields = config.json_schema.get("properties", {})
        bare = [name for name, field in fields.items() if not field.get("description")]
    else:
        bare = [n for n, f in config.model_fields.items() if not f.description]
    assert not bare, f"fields without a description: {', '.join(bare)}"


def _its_config_schema_is_sound(case: Case) -> None:
    """Of a part with a Config of its own there is nothing to see here."""
    config: type[ComponentConfig] = case.component.Config
    if issubclass(config, SchemaConfig):
        try:
            check_component(case.component.kind, case.component)
            check_schema(config.json_schema)
        except PluginError as error:
            raise AssertionError(str(error)) from error


def _config_is_strict_and_frozen(case: Case) -> None:
    settings = case.component.Config.model_config
    wanted = {"strict": True, "frozen": True, "extra": "forbid"}
    if issubclass(case.component.Config, SchemaConfig):
        wanted["extra"] = "allow"  # its schema says which keys there are
    for key, value in wanted.items():
        assert settings.get(key) == value, f"Config has {key}={settings.get(key)!r}, not {value!r}"
    try:
        case.make(no_such_field_at_all=1)
    except ValidationError:
        return
    raise AssertionError("an unknown key of the config was taken")


def _config_survives_json(case: Case) -> None:
    part = case.make()
    fields: dict[str, Any] = json.loads(json.dumps(component_to_json(part)))
    for key in ("class_name", "plugin"):
        fields.pop(key, None)
    again = component_to_json(case.make_from(fields))
    assert again == component_to_json(part), "the config is another one after a trip through JSON"


def _init_keeps_the_config(case: Case) -> None:
    config = case.make().config
    part = case.component(config)
    assert part.config is config, "__init__ does not keep the config it was given"


def _mutable_class_state_is_not_shared(case: Case) -> None:
    one, two = case.make(), case.make()
    shared = [
        name
        for name, value in vars(one).items()
        if isinstance(value, (list, dict, set)) and value is vars(two).get(name)
    ]
    assert not shared, f"two parts share {', '.join(shared)}"


CHECKS = (
    Check("is_a_part_of_its_kind", _is_a_part_of_its_kind),
    Check("registers", _registers),
    Check("says_what_it_is", _says_what_it_is),
    Check("describes_every_field", _describes_every_field),
    Check("config_schema_is_sound", _its_config_schema_is_sound),
    Check("config_is_strict_and_frozen", _config_is_strict_and_frozen),
    Check("config_survives_json", _config_survives_json),
    Check("init_keeps_the_config", _init_keeps_the_config),
    Check("mutable_state_is_not_shared", _mutable_class_state_is_not_shared),
)
