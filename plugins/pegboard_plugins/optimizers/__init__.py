"""Optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pegboard

from .component import AdamW


@pegboard.hookimpl
def register_optimizers(register: Callable[[type[Any]], None]) -> None:
    register(AdamW)
