"""Freeze: keep named parts of a model from being trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from pegboard import BuiltModel, ComponentConfig, ConfigError, Problem, TransformComponent

if TYPE_CHECKING:
    from pegboard.run_config import RunConfig

__all__ = ["Freeze"]


class Freeze(TransformComponent):
    """Keep the parameters under some names untrained; they are held in the compute dtype."""

    known_as = ("freeze_parameters",)

    class Config(ComponentConfig):
        """Fields of Freeze."""

        groups: tuple[str, ...] = Field(
            default=(), description="Groups that the model names, such as `embeddings` or `vision`."
        )
        prefixes: tuple[str, ...] = Field(
            default=(),
            description="Beginnings of parameter names, such as `model.layers.0.`.",
        )

    config: Config

    def check(self, run: RunConfig, path: tuple[str | int, ...]) -> Iterable[Problem]:
        """Something is named: a transform that freezes nothing is a slip."""
        if not self.config.groups and not self.config.prefixes:
            yield Problem(
                path,
                'Freeze names nothing; say "groups": [...] or "prefixes": [...], or leave it out',
            )

    def build(self) -> Callable[[BuiltModel], BuiltModel]:
        """Freeze by name; ConfigError for a group or prefix that the model doesn't have."""

        def freeze(built: BuiltModel) -> BuiltModel:
            prefixes = list(self.config.prefixes)
            for group in self.config.groups:
                if group not in built.freeze_groups:
                    known = ", ".join(sorted(built.freeze_groups)) or "none"
                    raise ConfigError(
                        f"transforms: Freeze: no group named '{group}' in this model; it has: {known}"
                    )
                prefixes.extend(built.freeze_groups[group])
            names = [name for name, _ in built.module.named_parameters()]
            for prefix in prefixes:
                if not any(name.startswith(prefix) for name in names):
                    raise ConfigError(
                        f"transforms: Freeze: no parameter starts with '{prefix}'; "
                        f"the first one is '{names[0]}'"
                    )
            return replace(built, frozen=(*built.frozen, *prefixes))

        return freeze
