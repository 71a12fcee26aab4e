"""The packers as a config names them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pegboard import ComponentConfig, PackerComponent

if TYPE_CHECKING:
    from pegboard.contracts import Packer

__all__ = ["ExpandSoftPacker", "SoftPacker"]


class SoftPacker(PackerComponent):
    """Packs samples in shuffled order, starting a new pack when the next one does not fit."""

    known_as: ClassVar[tuple[str, ...]] = ("soft", "next_fit")

    config: PackerComponent.Config

    def build(self) -> Packer:
        from .planning import NextFit

        return NextFit()


class ExpandSoftPacker(PackerComponent):
    """Packs samples by best fit in large shuffled windows: packs are full, their order random."""

    known_as: ClassVar[tuple[str, ...]] = ("expand_soft", "bfd", "best_fit")

    class Config(ComponentConfig):
        window_size: int | None = Field(
            default=65_536,
            ge=1,
            description="Samples that are packed together, taken in shuffled order; null means "
            "all at once, which fills packs a little better and puts equal lengths side by side.",
        )

    config: Config

    def build(self) -> Packer:
        from .planning import BestFit

        return BestFit(self.config.window_size)
