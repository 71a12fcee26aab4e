"""Llama models for Pegboard: one hook, one class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pegboard
from pegboard_llama.component import Llama


@pegboard.hookimpl
def register_models(register: Callable[[type[Any]], None]) -> None:
    register(Llama)
