"""LoRA and AdapterSaver, as a JSON file sees them.

Light: torch is imported by `build` and by the change itself only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pegboard import BuiltModel, ComponentConfig, Problem, SaverComponent, TransformComponent

if TYPE_CHECKING:
    from pegboard.run_config import RunConfig
    from pegboard.savers import Saver

__all__ = ["AdapterSaver", "LoRA"]

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRA(TransformComponent):
    """Freeze the model and train low-rank changes of its linear layers.

    Base weights keep their names and go, frozen, in the compute dtype; an export by HFSaver has the
    changes merged in, one by AdapterSaver holds the changes alone.
    """

    known_as: ClassVar[tuple[str, ...]] = ("lora", "peft", "low_rank")

    class Config(ComponentConfig):
        """Fields of LoRA."""

        rank: int = Field(default=16, ge=1, description="Rank of every change (peft: `r`).")
        alpha: float = Field(
            default=32.0,
            gt=0,
            description="The change is scaled by alpha / rank (peft: `lora_alpha`).",
        )
        use_rslora: bool = Field(
            default=False, description="Scale by alpha / sqrt(rank) instead of alpha / rank."
        )
        dropout: float = Field(
            default=0.0, ge=0, lt=1, description="Dropout on what the change sees of its input."
        )
        target_modules: tuple[str, ...] = Field(
            default=LINEAR_LAYERS,
            min_length=1,
            description="Last parts of the published names of the linear layers to change; a layer "
            "that is fused here is named by its published parts.",
        )
        exclude: tuple[str, ...] = Field(
            default=(),
            description="Patterns of published layer names to leave alone, such as "
            "`model.layers.0.*`.",
        )
        load_adapter: str | None = Field(
            default=None, description="Folder of an adapter in peft's format to start from."
        )

    config: Config

    def build(self) -> Callable[[BuiltModel], BuiltModel]:
        """The change; ConfigError where a target is no plain linear layer of this model."""
        config = self.config

        def add_adapters(built: BuiltModel) -> BuiltModel:
            from .adapters import with_adapters

            return with_adapters(built, config)

        return add_adapters


class AdapterSaver(SaverComponent):
    """Exports a LoRA adapter alone, as a folder that peft opens."""

    known_as: ClassVar[tuple[str, ...]] = ("peft_saver", "lora_saver")

    class Config(ComponentConfig):
        """Fields of AdapterSaver."""

        every_steps: int | None = Field(
            default=None,
            ge=1,
            description="Save at multiples of this many steps, each to a folder of its own, and at "
            "the end; null: only at the end.",
        )
        folder_name: str = Field(
            default="adapter",
            pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$",
            description="Folder of the adapter, in the run's folder.",
        )

    config: Config

    def check(self, run: RunConfig, path: tuple[str | int, ...]) -> Iterable[Problem]:
        """Something may make an adapter: without any transform, the save at the end would fail."""
        if not run.transforms:
            yield Problem(
                (*path, "class_name"),
                "AdapterSaver has nothing to save: no transform makes an adapter; add "
                '"transforms": [{"class_name": "LoRA"}], or use HFSaver',
            )

    def build(self) -> Saver:
        from .export import AdapterWriter

        return AdapterWriter(
            every_steps=self.config.every_steps, folder_name=self.config.folder_name
        )
