"""The command `pegboard preview`: what a step is fed, before it is trained."""

from __future__ import annotations

from collections.abc import Callable

import pegboard
from pegboard import Command

from .component import PreviewCommand


@pegboard.hookimpl
def register_commands(register: Callable[[type[Command]], None]) -> None:
    register(PreviewCommand)
