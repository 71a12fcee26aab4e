"""The losses a config can name: cross-entropy by chunks of rows, and the plain one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from pegboard import ComponentConfig, LossComponent

if TYPE_CHECKING:
    from pegboard.contracts import Loss

__all__ = ["ChunkedCrossEntropy", "CrossEntropy"]


class ChunkedCrossEntropy(LossComponent):
    """Cross-entropy that never holds more than one chunk of logits (the default).

    Multiplies by the head's weight and bias itself: a head whose `logits` do more than that (a soft
    cap, a temperature) needs `CrossEntropy`.
    """

    known_as = (
        "chunked_ce",
        "chunk_loss",
        "CELossConfig",
        "liger_cross_entropy",
        "fused_linear_cross_entropy",
    )

    class Config(ComponentConfig):
        chunk_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
            default="auto",
            description="Supervised positions per chunk; `auto` takes as many as have fp32 logits "
            "of 160 MiB (CPU) or 1 GiB (GPU).",
        )

    config: Config

    def build(self) -> Loss:
        from .chunked_cross_entropy import ChunkedCrossEntropyLoss

        size = self.config.chunk_size
        return ChunkedCrossEntropyLoss(chunk_size=None if size == "auto" else size)


class CrossEntropy(LossComponent):
    """Cross-entropy from the whole logits of the supervised positions: simple, exact, and large."""

    known_as = ("ce", "ce_loss", "CELoss", "cross_entropy")

    class Config(ComponentConfig):
        """No fields."""

    config: Config

    def build(self) -> Loss:
        from .cross_entropy import CrossEntropyLoss

        return CrossEntropyLoss()
