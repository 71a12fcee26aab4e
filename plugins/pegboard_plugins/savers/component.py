"""CheckpointSaver and HFSaver, as a JSON file sees them.

Light: torch is imported by `build` only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from pegboard import ComponentConfig, Problem, SaverComponent

if TYPE_CHECKING:
    from pegboard.run_config import RunConfig
    from pegboard.savers import Saver

__all__ = ["CheckpointSaver", "HFSaver"]


class CheckpointSaver(SaverComponent):
    """Saves all that a run needs to go on, under any number of ranks."""

    known_as: ClassVar[tuple[str, ...]] = ("dcp", "dcp_saver", "checkpointer")

    class Config(ComponentConfig):
        every_steps: int | None = Field(
            default=None,
            ge=1,
            description="Save at multiples of this many steps, and at the end; null: only then.",
        )
        keep_last: int = Field(
            default=2, ge=1, description="How many checkpoints to keep; older ones are deleted."
        )

    config: Config

    def check(self, run: RunConfig, path: tuple[str | int, ...]) -> Iterable[Problem]:
        """It is the only one: each would delete the other's checkpoints as old ones."""
        places = [i for i, saver in enumerate(run.savers) if isinstance(saver, CheckpointSaver)]
        if path in [("savers", place) for place in places[1:]]:
            yield Problem(
                path,
                f"savers[{places[0]}] is a CheckpointSaver too, and keep_last of one deletes the "
                "checkpoints of the other; keep one of them",
            )

    def build(self) -> Saver:
        from .checkpoint import CheckpointWriter

        return CheckpointWriter(
            every_steps=self.config.every_steps, keep_last=self.config.keep_last
        )


class HFSaver(SaverComponent):
    """Exports weights, config and tokenizer as a folder that transformers and vLLM open."""

    known_as: ClassVar[tuple[str, ...]] = ("hf", "hf_export", "huggingface")

    class Config(ComponentConfig):
        every_steps: int | None = Field(
            default=None,
            ge=1,
            description="Export at multiples of this many steps, each to a folder of its own, and "
            "at the end; null: only at the end.",
        )
        dtype: Literal["bfloat16", "float32", "float16"] | None = Field(
            default=None,
            description="Dtype of the exported weights; null: that of the loaded weights, else "
            "bfloat16.",
        )
        max_shard_size_gb: float = Field(
            default=5.0, gt=0.0, le=1e9, description="Largest weight file, in GB (10^9 bytes)."
        )
        folder_name: str = Field(
            default="export",
            pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$",
            description="Folder of the export, in the run's folder.",
        )

    config: Config

    def build(self) -> Saver:
        from .hf_export import HFExporter

        return HFExporter(
            every_steps=self.config.every_steps,
            dtype=self.config.dtype,
            max_shard_bytes=int(self.config.max_shard_size_gb * 10**9),
            folder_name=self.config.folder_name,
        )
