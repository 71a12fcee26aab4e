"""The collators as a config names them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from pegboard import CollatorComponent, ComponentConfig

if TYPE_CHECKING:
    from pegboard.contracts import Collator

__all__ = ["SFTLLMCollator", "SFTVLMCollator"]


class SFTLLMCollator(CollatorComponent):
    """Flattens a pack of text examples into one row, with targets where the mask asks."""

    known_as: ClassVar[tuple[str, ...]] = ("sft_llm_collator", "sft_collator")

    class Config(ComponentConfig):
        pad_to_multiple_of: int | None = Field(
            default=None,
            ge=1,
            description="Pad the end of each row to a multiple of this many tokens.",
        )
        loss_reduction: Literal["token", "sample", "square"] = Field(
            default="token",
            description="Weight of a token's loss: token = 1; sample = 1/n, so that samples count "
            "equally; square = 1/sqrt(n); n is the number of supervised tokens of its sample.",
        )

    config: Config

    def build(self, *, pad_token_id: int) -> Collator:
        from .text import TextCollator

        return TextCollator(
            pad_token_id=pad_token_id,
            pad_to_multiple_of=self.config.pad_to_multiple_of or 1,
            loss_reduction=self.config.loss_reduction,
        )


class SFTVLMCollator(SFTLLMCollator):
    """Flattens a pack of text and image examples into one row, with its pictures as uint8 tiles."""

    known_as: ClassVar[tuple[str, ...]] = (
        "sft_vllm_collator",
        "sft_vlm_collator",
        "intern_s1_vl_sft_collator",
    )
    provides = frozenset({"pixel_values"})

    class Config(SFTLLMCollator.Config):
        max_tiles_per_pack: int | None = Field(
            default=None,
            ge=1,
            description="Most image tiles in one pack, so that memory is known beforehand; packs "
            "are planned with it. null: as many as their tokens fit into pack_max_length.",
        )

    config: Config

    def build(self, *, pad_token_id: int) -> Collator:
        from .vision import VisionCollator

        return VisionCollator(
            pad_token_id=pad_token_id,
            pad_to_multiple_of=self.config.pad_to_multiple_of or 1,
            loss_reduction=self.config.loss_reduction,
            max_tiles_per_pack=self.config.max_tiles_per_pack,
        )
