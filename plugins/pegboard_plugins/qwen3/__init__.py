"""Qwen3 dense language models."""

from __future__ import annotations

import pegboard
from pegboard_plugins.qwen3.component import Qwen3


@pegboard.hookimpl
def register_models(register) -> None:  # type: ignore[no-untyped-def]
    register(Qwen3)
