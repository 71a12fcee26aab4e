"""TensorBoard event files, one scalar per metric.

The file is opened at the first logged step, which is passed as the purge step: after a resume,
TensorBoard hides the points that the interrupted run had logged beyond it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

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

    def close(self) -> None:
        """Write what waits; further calls do nothing."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
