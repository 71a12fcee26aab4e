"""Commands for data: `pegboard prepare`, `pegboard cache`."""

from __future__ import annotations

from collections.abc import Callable

import pegboard
from pegboard import Command

from .component import CacheCommand, PrepareCommand


@pegboard.hookimpl
def register_commands(register: Callable[[type[Command]], None]) -> None:
    register(PrepareCommand)
    register(CacheCommand)
