"""Packers: which samples share a pack."""

from __future__ import annotations

from collections.abc import Callable

import pegboard
from pegboard import PackerComponent

from .component import ExpandSoftPacker, HardPacker, NoPacker, SequentialPacker, SoftPacker


@pegboard.hookimpl
def register_packers(register: Callable[[type[PackerComponent]], None]) -> None:
    register(ExpandSoftPacker)
    register(HardPacker)
    register(NoPacker)
    register(SequentialPacker)
    register(SoftPacker)
