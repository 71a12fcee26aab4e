"""A part under test, the checks of its kind, and the pytest function that runs them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pegboard.command import Command
from pegboard.component import Component, ModelComponent

if TYPE_CHECKING:
    from pegboard.contracts import Tokenizer
    from pegboard.registry import Registry

__all__ = ["Case", "Check", "checks_for", "contract_for"]

_COMMAND = "command"  # no component: it has no config and builds nothing
_MODULES: Mapping[str, str] = {
    "model": "model_checks",
    "dataset": "dataset_checks",
    "tokenize_fn": "tokenize_checks",
    "record_format": "record_format_checks",
    "tokenizer": "tokenizer_checks",
    "collator": "collator_checks",
    "packer": "packer_checks",
    "loss": "loss_checks",
    "optimizer": "optimizer_checks",
    "lr_schedule": "lr_schedule_checks",
    "transform": "transform_checks",
    "saver": "saver_checks",
    "tracker": "tracker_checks",
    "callback": "callback_checks",
    _COMMAND: "command_checks",
}
"""Kind -> module whose `CHECKS` are the kind's, after those of every part."""

TINY_MODEL: Mapping[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


Fields = Mapping[str, Any] | Callable[[Path], Mapping[str, Any]]
"""JSON fields of a part, or a function that writes what they need into a folder and gives them."""


class Check(NamedTuple):
    """One promise and what finds it broken.

    >>> from pegboard.testing import Check
    >>> def has_summary(case):
    ...     assert case.component.__doc__, "no docstring; write what it is in one line"
    >>> Check("has_summary", has_summary).name
    'has_summary'
    """

    name: str
    run: Callable[[Case], None]
    """Raises AssertionError that says what was found and what was expected."""


@dataclass
class Case:
    """A component class, a config for it, and what its checks may use.

    >>> from pathlib import Path
    >>> from pegboard import ComponentConfig, LRScheduleComponent
    >>> from pegboard.testing import Case
    >>> class Constant(LRScheduleComponent):
    ...     "The same rate at every step."
    ...     class Config(ComponentConfig):
    ...         rate: float = 0.1
    ...     def build(self, total_steps):
    ...         return lambda step, lr: self.config.rate
    >>> Case(Constant, {"rate": 0.2}, Path("unused")).make().build(total_steps=3)(1, 1.0)
    0.2
    """

    component: type[Any]
    """Of a kind of part, or a command."""
    config: Mapping[str, Any]
    """JSON fields, without `class_name`."""
    folder: Path
    """Empty; checks write here."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """See the module of each kind's checks."""
    data_folder: Path | None = None
    """Where a function that gave `config` wrote; None where it was given as it is."""

    def make(self, **changes: Any) -> Any:
        """A component as the core makes it from JSON, with some fields changed."""
        return self.make_from({**self.config, **changes})

    def make_from(self, fields: Mapping[str, Any]) -> Any:
        """A component as the core makes it from other JSON fields."""
        return _make(self.component, fields, self.registry)

    @cached_property
    def registry(self) -> Registry:
        """The built-in parts, for what a part under test works with."""
        from pegboard.plugin_manager import load_plugins

        return load_plugins(third_party=False).registry

    def builtin(self, kind: str, class_name: str, **fields: Any) -> Any:
        """A built-in component."""
        return _make(self.registry.find(kind, class_name), fields, self.registry)

    def model(self) -> ModelComponent:
        """Option `model` (a component), else a tiny Qwen3."""
        given: ModelComponent | None = self.options.get("model")
        tiny: ModelComponent = given or self.builtin("model", "Qwen3", **TINY_MODEL)
        return tiny

    def tokenizer(self) -> Tokenizer:
        """Option `tokenizer` (built), else the built-in byte tokenizer."""
        given: Tokenizer | None = self.options.get("tokenizer")
        built: Tokenizer = given or self.builtin("tokenizer", "ByteTokenizer").build()
        return built


def _make(component: type[Any], fields: Mapping[str, Any], registry: Registry) -> Any:
    # A field may hold another part, which is found in the registry.
    context = {"registry": registry}
    return component(component.Config.model_validate_json(json.dumps(fields), context=context))


def options_of(kind: str) -> frozenset[str]:
    """Names of what a kind's checks take beside the config."""
    module = importlib.import_module(f"pegboard.testing.{_MODULES[kind]}")
    names: frozenset[str] = module.OPTIONS
    return names


def checks_for(kind: str) -> tuple[Check, ...]:
    """The checks of every part, then those of one kind.

    Raises:
        ValueError: no such kind.

    >>> from pegboard.testing import checks_for
    >>> "the_first_step_moves" in [check.name for check in checks_for("lr_schedule")]
    True
    """
    if kind not in _MODULES:
        raise ValueError(f"no kind {kind!r}; kinds are {', '.join(_MODULES)}")
    modules = (_MODULES[kind],) if kind == _COMMAND else ("part_checks", _MODULES[kind])
    return tuple(
        check
        for name in modules
        for check in importlib.import_module(f"pegboard.testing.{name}").CHECKS
    )


def contract_for(
    component: type[Component] | type[Command],
    config: Fields | None = None,
    *,
    skip: Mapping[str, str] | None = None,
    **options: Any,
) -> Callable[..., None]:
    """A pytest function with one case for each check of the component's kind.

    Args:
        component: the class that a plugin registers; a command takes no `config`.
        config: JSON fields of a small working part, without `class_name`; or a function of a fresh
            folder that writes what the part reads there and gives the fields.
        skip: check name -> why this part doesn't keep that promise.
        options: what the checks of the kind take beside the config; the module of each kind says.

    Raises:
        ValueError: `skip` names no check, an option is unknown, or the class has no kind.

    >>> from pegboard.plugin_manager import load_plugins
    >>> from pegboard.testing import contract_for
    >>> Cosine = load_plugins(third_party=False).registry.find("lr_schedule", "CosineSchedule")
    >>> test_contract = contract_for(Cosine, config={"warmup_ratio": 0.1})
    >>> test_contract.__name__  # pytest finds it by this name, and runs a case for each check
    'test_contract'
    """
    import pytest

    kind = component.kind if issubclass(component, Component) else _COMMAND
    checks, skip = checks_for(kind), skip or {}
    if unknown := sorted(skip.keys() - {check.name for check in checks}):
        known = ", ".join(check.name for check in checks)
        raise ValueError(f"skip: no check named {', '.join(unknown)}; there are {known}")
    known_options = options_of(kind)
    if unknown := sorted(options.keys() - known_options):
        known = ", ".join(sorted(known_options)) or "none"
        raise ValueError(
            f"the checks of a {kind} take no option {', '.join(unknown)}; there are {known}"
        )

    @pytest.mark.contract(kind, component.__name__)
    @pytest.mark.parametrize("check", checks, ids=[check.name for check in checks])
    def test_contract(check: Check, tmp_path: Path) -> None:
        __tracebackhide__ = True  # a failure shows the check and the part, not this
        if check.name in skip:
            pytest.skip(skip[check.name])
        work, data = tmp_path / "work", tmp_path / "data"
        work.mkdir()
        data.mkdir()
        if callable(config):
            check.run(Case(component, dict(config(data)), work, options, data))
        else:
            check.run(Case(component, dict(config or {}), work, options))

    return test_contract
