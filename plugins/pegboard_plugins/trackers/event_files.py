"""TensorBoard event files, one scalar per metric, one image per table.

The file is opened at the first logged step, which is passed as the purge step: after a resume,
TensorBoard hides the points that the interrupted run had logged beyond it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from pegboard.contracts import Table

from .heat_map import load_bytes, load_colours

__all__ = ["TensorBoardWriter"]


class TensorBoardWriter:
    """Scalars by step, under the keys of metrics.jsonl.

    Args:
        folder: made at the first logged step.
        flush_seconds: longest wait before a number is on disk.
    """

    def __init__(self, folder: Path, *, flush_seconds: int = 30) -> None:
        self._folder = folder
        self._flush_seconds = flush_seconds
        self._writer: SummaryWriter | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one point at `step` to the curve of each key."""
        if self._writer is None:
            self._writer = SummaryWriter(
                str(self._folder), purge_step=step, flush_secs=self._flush_seconds
            )
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, global_step=step)

    def log_tables(self, step: int, tables: Mapping[str, Table]) -> None:
        """Add one image per table, a pixel per number, white at 1; needs Pillow, else nothing."""
        if self._writer is None or importlib.util.find_spec("PIL") is None:
            return
        for name, table in tables.items():
            pixels = load_colours(load_bytes(np.asarray(table.values, dtype=np.float64)))
            self._writer.add_image(name, pixels, global_step=step, dataformats="HWC")

    def close(self) -> None:
        """Write what waits; further calls do nothing."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
