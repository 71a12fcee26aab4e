"""Losses over the supervised positions of a micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pegboard

from .component import ChunkedCrossEntropy, CrossEntropy


@pegboard.hookimpl
def register_losses(register: Callable[[type[Any]], None]) -> None:
    register(ChunkedCrossEntropy)
    register(CrossEntropy)
