"""Where a run's numbers go beside the log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

__all__ = ["Tracker"]


class Tracker(Protocol):
    """A built tracker; called on rank 0 only."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers of one logged step, keys as in metrics.jsonl."""
        ...

    def close(self) -> None: ...
