"""Trackers: where a run's numbers go beside metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pegboard

from .component import ExpertLoadTracker, TensorBoardTracker


@pegboard.hookimpl
def register_trackers(register: Callable[[type[Any]], None]) -> None:
    register(TensorBoardTracker)
    register(ExpertLoadTracker)
