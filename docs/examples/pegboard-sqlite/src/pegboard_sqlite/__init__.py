"""Data, metrics and a log of runs in SQLite, for the Pegboard trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pegboard

from .component import SQLiteDataset, SQLiteRunLog, SQLiteTracker
from .import_command import SQLiteImport


@pegboard.hookimpl
def register_datasets(register: Callable[[type[Any]], None]) -> None:
    register(SQLiteDataset)


@pegboard.hookimpl
def register_trackers(register: Callable[[type[Any]], None]) -> None:
    register(SQLiteTracker)


@pegboard.hookimpl
def register_callbacks(register: Callable[[type[Any]], None]) -> None:
    register(SQLiteRunLog)


@pegboard.hookimpl
def register_commands(register: Callable[[type[Any]], None]) -> None:
    register(SQLiteImport)
