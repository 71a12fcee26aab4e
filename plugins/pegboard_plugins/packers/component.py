"""The packers as a config names them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pegboard import ComponentConfig, PackerComponent

if TYPE_CHECKING:
    from pegboard.contracts import Packer

__all__ = ["ExpandSoftPacker", "HardPacker", "NoPacker", "SequentialPacker", "SoftPacker"]


class ExpandSoftPacker(PackerComponent):
    """Packs samples by best fit in large shuffled windows: packs are full, their order random."""

    known_as: ClassVar[tuple[str, ...]] = (
        "expand_soft",
        "bfd",
        "best_fit",
        "multipack",
        "neat_packing",
    )

    class Config(ComponentConfig):
        window_size: int | None = Field(
            default=65_536,
            ge=1,
            description="Samples that are packed together, taken in shuffled order; a set that is no "
            "larger gets packs of mixed lengths. null means all at once, which fills packs a little "
            "better and puts equal lengths side by side.",
        )

    config: Config

    def build(self) -> Packer:
        from .best_fit import BestFit

        return BestFit(self.config.window_size)


class HardPacker(PackerComponent):
    """Cuts the shuffled stream of samples into packs of exactly pack_max_length, for pre-training."""

    known_as: ClassVar[tuple[str, ...]] = ("hard", "wrapped", "concat_then_split", "chunk")
    cuts_samples = True

    config: PackerComponent.Config

    def build(self) -> Packer:
        from .in_order import Cut

        return Cut()


class NoPacker(PackerComponent):
    """Gives each sample a pack of its own, in shuffled order."""

    known_as: ClassVar[tuple[str, ...]] = ("none", "no_packing", "unpacked")

    config: PackerComponent.Config

    def build(self) -> Packer:
        from .in_order import Alone

        return Alone()


class SequentialPacker(PackerComponent):
    """Packs samples in the order of the data, starting a new pack when the next one does not fit."""

    known_as: ClassVar[tuple[str, ...]] = ("sequential", "order_preserving", "in_order")

    config: PackerComponent.Config

    def build(self) -> Packer:
        from .in_order import NextFit

        return NextFit(shuffle=False)


class SoftPacker(PackerComponent):
    """Packs samples in shuffled order, starting a new pack when the next one does not fit."""

    known_as: ClassVar[tuple[str, ...]] = ("soft", "next_fit", "greedy")

    config: PackerComponent.Config

    def build(self) -> Packer:
        from .in_order import NextFit

        return NextFit(shuffle=True)
