"""InternVL, in the form that transformers opens without remote code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pegboard
from pegboard_plugins.intern_vl.component import InternVL


@pegboard.hookimpl
def register_models(register: Callable[[type[Any]], None]) -> None:
    register(InternVL)
