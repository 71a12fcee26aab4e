"""Intern-S1, the scientific vision-language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pegboard
from pegboard_plugins.intern_s1.component import InternS1


@pegboard.hookimpl
def register_models(register: Callable[[type[Any]], None]) -> None:
    register(InternS1)
