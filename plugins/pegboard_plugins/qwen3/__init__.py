"""Qwen3 dense language models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pegboard
from pegboard_plugins.qwen3.component import Qwen3


@pegboard.hookimpl
def register_models(register: Callable[[type[Any]], None]) -> None:
    register(Qwen3)
