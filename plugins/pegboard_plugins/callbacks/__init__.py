"""Callbacks: who is told what happens in a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pegboard

from .component import EarlyStopping


@pegboard.hookimpl
def register_callbacks(register: Callable[[type[Any]], None]) -> None:
    register(EarlyStopping)
