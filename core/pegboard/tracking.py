"""Where a run's numbers go beside the log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from pegboard.contracts import Table

__all__ = ["TableTracker", "Tracker"]


class Tracker(Protocol):
    """A built tracker; called on rank 0 only."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers of one logged step, keys as in metrics.jsonl."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class TableTracker(Tracker, Protocol):
    """A tracker that takes tables too, such as the load of each expert by layer."""

    def log_tables(self, step: int, tables: Mapping[str, Table]) -> None:
        """Called after `log` for a logged step of a model that reports tables."""
        ...
