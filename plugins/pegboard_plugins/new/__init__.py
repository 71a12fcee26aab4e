"""The command `pegboard new`: a package for a part of your own."""

from __future__ import annotations

from collections.abc import Callable

import pegboard
from pegboard import Command

from .component import NewCommand


@pegboard.hookimpl
def register_commands(register: Callable[[type[Command]], None]) -> None:
    register(NewCommand)
