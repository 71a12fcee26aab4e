"""A registry takes only sound classes, and finds them by kind and name or says what is wrong."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest
from pydantic import Field

from pegboard.component import (
    Component,
    ComponentConfig,
    DatasetComponent,
    LossComponent,
    ModelComponent,
)
from pegboard.errors import ConfigError, PluginError
from pegboard.registry import Registry, nearest


class VLMJsonlDataset(DatasetComponent):
    """Records that may name images.

    More words.
    """

    known_as = ("vlm_jsonl", "OldVisionData")

    class Config(ComponentConfig):
        anno_path: str = Field(description="A .jsonl file.")

    config: Config

    def build(self, name: str) -> Any:
        return name


class PlainLoss(LossComponent):
    """A loss without settings."""

    def build(self) -> Any:
        return None


class TinyModel(ModelComponent):
    """A model."""

    hf_model_types = ("tiny",)
    presets = MappingProxyType({"tiny-1b": {"hidden_size": 8}})

    def build(self) -> Any:
        return None


def _filled() -> Registry:
    registry = Registry()
    registry.add("dataset", VLMJsonlDataset, "jsonl")
    registry.add("loss", PlainLoss, "losses")
    registry.add("model", TinyModel, "tiny")
    return registry


def _twin() -> type[DatasetComponent]:
    return type("VLMJsonlDataset", (VLMJsonlDataset,), {"__doc__": "Another."})


def test_a_registered_class_is_found_by_its_own_name() -> None:
    registry = _filled()
    assert registry.find("dataset", "VLMJsonlDataset") is VLMJsonlDataset
    assert registry.find("dataset", "VLMJsonlDataset", plugin="jsonl") is VLMJsonlDataset
    assert registry.plugin_of("dataset", "VLMJsonlDataset") == "jsonl"
    assert registry.names("dataset") == ("VLMJsonlDataset",)
    assert registry.classes("loss") == (PlainLoss,)


def test_entries_carry_the_first_line_of_the_docstring() -> None:
    entries = {entry.class_name: entry for entry in _filled().entries()}
    assert list(entries) == ["TinyModel", "VLMJsonlDataset", "PlainLoss"]  # order of the kinds
    assert entries["VLMJsonlDataset"].summary == "Records that may name images."


@pytest.mark.parametrize("wrong", ["VLMJsonDataset", "vlm_jsonl_dataset", "OldVisionDate"])
def test_a_near_miss_is_answered_with_the_name_that_json_takes(wrong: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _filled().find("dataset", wrong)
    assert str(caught.value) == f"no dataset named '{wrong}'. Did you mean 'VLMJsonlDataset'?"


def test_known_as_is_for_messages_and_never_finds_a_class() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'VLMJsonlDataset'"):
        _filled().find("dataset", "vlm_jsonl")


def test_a_name_like_nothing_is_answered_with_what_there_is() -> None:
    own = r"A part of your own must be registered, in a --plugin file .* @pegboard\.hookimpl\.$"
    with pytest.raises(ConfigError, match=rf"no loss named 'Qxz'\. Known: PlainLoss\. {own}"):
        _filled().find("loss", "Qxz")
    with pytest.raises(ConfigError, match=rf"no packer named 'Qxz'\. Known: none\. {own}"):
        _filled().find("packer", "Qxz")


def test_a_name_that_is_hardly_like_another_may_be_of_an_own_part_that_is_not_there() -> None:
    with pytest.raises(ConfigError) as caught:
        _filled().find("dataset", "SignalDataset")
    assert str(caught.value) == (
        "no dataset named 'SignalDataset'. Did you mean 'VLMJsonlDataset'? A part of your own must be registered, in a --plugin "
        "file or an installed package, by a function marked @pegboard.hookimpl."
    )


def test_a_name_of_another_kind_is_sent_to_its_place() -> None:
    with pytest.raises(ConfigError, match=r"no loss named 'VLMJsonlDataset'\. There is a dataset"):
        _filled().find("loss", "VLMJsonlDataset")


def test_a_missing_name_recalls_the_plugins_that_are_broken() -> None:
    registry = _filled()
    registry.note_left_out("other-dist", "could not be loaded: x.py:3: ImportError: no foo")
    with pytest.raises(
        ConfigError, match="'other-dist', which could not be loaded: x.py:3: ImportError"
    ):
        registry.find("loss", "Qxz")


def test_plugins_that_are_left_out_for_one_reason_are_named_together() -> None:
    registry = _filled()
    for name in ("one", "two"):
        registry.note_left_out(name, "is not allowed")
    with pytest.raises(ConfigError, match="in plugin 'one' or 'two', which is not allowed"):
        registry.find("loss", "Qxz")


def test_a_contested_name_is_an_error_only_when_used_without_a_plugin() -> None:
    registry = _filled()
    twin = _twin()
    registry.add("dataset", twin, "other-dist")
    assert registry.find("dataset", "VLMJsonlDataset", plugin="other-dist") is twin
    assert registry.find("dataset", "VLMJsonlDataset", plugin="jsonl") is VLMJsonlDataset
    with pytest.raises(ConfigError, match="offered by 'jsonl', 'other-dist'; write \"plugin\""):
        registry.find("dataset", "VLMJsonlDataset")
    with pytest.raises(ConfigError, match="plugin 'nobody' offers no dataset 'VLMJsonlDataset'"):
        registry.find("dataset", "VLMJsonlDataset", plugin="nobody")


def test_one_plugin_offers_a_name_once() -> None:
    registry = _filled()
    with pytest.raises(PluginError, match="registered twice by one plugin"):
        registry.add("dataset", _twin(), "jsonl")


def test_a_model_type_and_a_preset_lead_to_their_class() -> None:
    registry = _filled()
    assert registry.for_hf_model_type("tiny") is TinyModel
    assert registry.for_hf_model_type("huge") is None
    assert registry.for_preset("tiny-1b") == ("TinyModel", {"hidden_size": 8})
    assert registry.for_preset("huge-1b") is None
    assert registry.preset_names() == ("tiny-1b",)


def test_a_model_type_claimed_twice_is_an_error_when_used() -> None:
    registry = _filled()
    registry.add("model", type("Rival", (TinyModel,), {"__doc__": "A rival."}), "rival")
    with pytest.raises(ConfigError, match="model_type 'tiny' is claimed by 'Rival'.*'TinyModel'"):
        registry.for_hf_model_type("tiny")
    with pytest.raises(ConfigError, match="preset 'tiny-1b' is claimed by"):
        registry.for_preset("tiny-1b")


def test_two_registries_share_nothing() -> None:
    _filled()
    assert Registry().entries() == ()


class _NoDocstring(PlainLoss):
    def build(self) -> Any:
        return None


class _NoBuild(LossComponent):
    """A loss."""


class _ConfigOfNothing(PlainLoss):
    """A loss."""

    class Config:
        pass

    config: Config


class _Undescribed(PlainLoss):
    """A loss."""

    class Config(ComponentConfig):
        gamma: float = 2.0

    config: Config


class _TakenField(PlainLoss):
    """A loss."""

    class Config(ComponentConfig):
        class_name: str = Field("x", description="Never read.")

    config: Config


class _TakenOption(DatasetComponent):
    """A dataset."""

    class Config(ComponentConfig):
        name: str = Field("x", description="Never set: the core takes it out of a dataset's keys.")

    config: Config

    def build(self, name: str) -> Any:
        return None


class _Undeclared(PlainLoss):
    """A loss."""

    class Config(ComponentConfig):
        gamma: float = Field(2.0, description="Focus.")


class _DeclaredByItsParentOnly(VLMJsonlDataset):
    """A dataset with a Config of its own and its parent's annotation."""

    class Config(ComponentConfig):
        other: str = Field("x", description="Something else.")


class _Stranger:
    """No component at all."""


@pytest.mark.parametrize(
    ("kind", "cls", "rule"),
    [
        ("loss", _NoDocstring, "has no docstring"),
        ("loss", _NoBuild, r"has no build\(\)"),
        ("loss", _ConfigOfNothing, "Config is not a ComponentConfig"),
        ("loss", _Undescribed, "Config field 'gamma' has no description"),
        ("loss", _TakenField, "Config field 'class_name' is read by the core"),
        ("dataset", _TakenOption, "Config field 'name' is read by the core"),
        ("loss", _Undeclared, "does not declare its config; write the line `config: Config`"),
        ("dataset", _DeclaredByItsParentOnly, "does not declare its config"),
        ("loss", _Stranger, r"is not a LossComponent; write class _Stranger\(LossComponent\)"),
        ("loss", TinyModel, "is a ModelComponent, not a LossComponent; offer it in register_model"),
        ("loss", LossComponent, "is the base class itself"),
        ("loss", PlainLoss(Component.Config()), r"takes a class.*write register\(PlainLoss\)"),
    ],
)
def test_a_class_that_breaks_the_contract_is_refused_by_rule(
    kind: str, cls: Any, rule: str
) -> None:
    registry = Registry()
    with pytest.raises(PluginError, match=rule):
        registry.add(kind, cls, "guilty")
    assert registry.entries() == ()


class _Inherits(VLMJsonlDataset):
    """A dataset that keeps its parent's Config."""


def test_a_config_may_be_inherited_with_its_annotation() -> None:
    registry = Registry()
    registry.add("dataset", _Inherits, "p")
    assert registry.names("dataset") == ("_Inherits",)


def test_nearest_ignores_case_and_separators_and_refuses_far_words() -> None:
    assert nearest("expand_soft_packer", ["ExpandSoftPacker", "SoftPacker"]) == "ExpandSoftPacker"
    assert nearest("zzz", ["ExpandSoftPacker"]) is None
