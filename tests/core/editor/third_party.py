"""A package of parts that somebody else wrote, put where an installer would put it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["install_lantern_parts", "written_schema"]

ROOT = Path(__file__).resolve().parents[3]

MODULE = '''"""Lanterns."""

from typing import Literal

import pegboard
from pydantic import Field


class LanternDataset(pegboard.DatasetComponent):
    """Signals that a keeper wrote down."""

    class Config(pegboard.ComponentConfig):
        logbook: str = Field(min_length=1, description="Folder of the keeper's pages.")
        colour: Literal["red", "green"] = Field(default="red", description="Which lamp to read.")
        nights: int = Field(default=7, ge=1, description="Nights to read, from the last one back.")

    config: Config

    def build(self, name):
        raise NotImplementedError


class GlowLoss(pegboard.LossComponent):
    """Forgives what is seen at dusk."""

    class Config(pegboard.ComponentConfig):
        dusk: float = Field(default=0.5, gt=0, lt=1, description="Weight of a token at dusk.")

    config: Config

    def build(self):
        raise NotImplementedError


@pegboard.hookimpl
def register_datasets(register):
    register(LanternDataset)


@pegboard.hookimpl
def register_losses(register):
    register(GlowLoss)
'''


def install_lantern_parts(site: Path) -> None:
    """The module and its metadata with the entry point."""
    (site / "lantern_parts.py").write_text(MODULE, encoding="utf-8")
    info = site / "lantern_parts-2.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lantern-parts\nVersion: 2.1\n")
    (info / "entry_points.txt").write_text("[pegboard]\nlantern = lantern_parts\n")


def written_schema(site: Path | None) -> Any:
    """What `pegboard schema` prints for a person with (or without) the packages of `site`."""
    roots = [str(ROOT / "core"), str(ROOT / "plugins"), *([str(site)] if site else [])]
    done = subprocess.run(
        [sys.executable, "-m", "pegboard", "schema"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(roots)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "lantern" not in done.stderr
    return json.loads(done.stdout)
