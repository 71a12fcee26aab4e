"""Savers: what a run leaves on disk."""

from __future__ import annotations

from collections.abc import Callable

import pegboard

from .component import CheckpointSaver, HFSaver


@pegboard.hookimpl
def register_savers(register: Callable[[type[pegboard.SaverComponent]], None]) -> None:
    """Offer both savers."""
    register(CheckpointSaver)
    register(HFSaver)
