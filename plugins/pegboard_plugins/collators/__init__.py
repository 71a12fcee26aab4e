"""Collators: the examples of one pack -> one flat batch."""

from __future__ import annotations

from collections.abc import Callable

import pegboard
from pegboard import CollatorComponent

from .component import SFTLLMCollator, SFTVLMCollator


@pegboard.hookimpl
def register_collators(register: Callable[[type[CollatorComponent]], None]) -> None:
    register(SFTLLMCollator)
    register(SFTVLMCollator)
