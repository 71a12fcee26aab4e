"""The trackers. TensorBoard is optional and looked for before the run."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from pegboard import ComponentConfig, ConfigError, Problem, TrackerComponent

if TYPE_CHECKING:
    from pegboard.run_config import RunConfig
    from pegboard.tracking import Tracker

__all__ = ["ExpertLoadTracker", "TensorBoardTracker"]

NOT_INSTALLED = (
    "TensorBoardTracker needs the package 'tensorboard', which is not installed; "
    "run `pip install tensorboard` or take the tracker out of `trackers`"
)


class TensorBoardTracker(TrackerComponent):
    """Scalars for TensorBoard, in a folder of the run."""

    known_as = ("tensorboard", "tb")

    class Config(ComponentConfig):
        folder: str = Field(
            default="tensorboard",
            min_length=1,
            description="Folder of the event files, inside the run's folder.",
        )
        flush_seconds: int = Field(
            default=30,
            ge=1,
            description="Longest time, in seconds, that a number waits before it is on disk.",
        )

        @field_validator("folder")
        @classmethod
        def _inside_the_run(cls, folder: str) -> str:
            path = PurePath(folder)
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{folder!r} leaves the run's folder; expected a path inside it")
            return folder

    config: Config

    def check(self, run: RunConfig, path: tuple[str | int, ...]) -> Iterable[Problem]:
        """One problem if `tensorboard` can't be imported."""
        del run
        return () if _installed() else (Problem((*path, "class_name"), NOT_INSTALLED),)

    def build(self, run_dir: Path) -> Tracker:
        """Writes to `run_dir / folder`; ConfigError if `tensorboard` is not installed."""
        if not _installed():
            raise ConfigError(NOT_INSTALLED)
        from .event_files import TensorBoardWriter

        return TensorBoardWriter(
            run_dir / self.config.folder, flush_seconds=self.config.flush_seconds
        )


class ExpertLoadTracker(TrackerComponent):
    """A heat map of expert load over layers and steps: `expert_load.html` in the run's folder."""

    known_as = ("expert_heatmap", "moe_monitor")

    class Config(ComponentConfig):
        every_seconds: float = Field(
            default=30.0,
            ge=0,
            description="Shortest time, in seconds, between two writings of the file.",
        )

    config: Config

    def build(self, run_dir: Path) -> Tracker:
        """Draws the table `expert_load`; writes nothing for a model that has none."""
        from .heat_map import HeatMapFile

        return HeatMapFile(
            run_dir / "expert_load.html", table="expert_load", every_s=self.config.every_seconds
        )


def _installed() -> bool:
    return importlib.util.find_spec("tensorboard") is not None
