"""Qwen3-MoE: mixture-of-experts language models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pegboard
from pegboard_plugins.qwen3_moe.component import Qwen3MoE


@pegboard.hookimpl
def register_models(register: Callable[[type[Any]], None]) -> None:
    register(Qwen3MoE)
