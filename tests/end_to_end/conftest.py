"""Fixtures of the end-to-end tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import tiny_config, write_chats, write_config


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return write_chats(tmp_path / "chats.jsonl", 14)


@pytest.fixture
def make_config(tmp_path: Path, chats: Path) -> Callable[..., Path]:
    """Write a tiny config (with changes) and return its path; its run folder is `<name>/run`."""

    def make(name: str = "a", **changes: Any) -> Path:
        config = tiny_config(tmp_path / name, chats, **changes)
        return write_config(tmp_path / f"{name}.json", config)

    return make
