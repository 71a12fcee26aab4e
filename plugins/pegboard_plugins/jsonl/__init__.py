"""Datasets of JSON lines."""

from __future__ import annotations

from collections.abc import Callable

import pegboard
from pegboard import DatasetComponent

from .component import JsonlDataset, VLMJsonlDataset


@pegboard.hookimpl
def register_datasets(register: Callable[[type[DatasetComponent]], None]) -> None:
    register(JsonlDataset)
    register(VLMJsonlDataset)
