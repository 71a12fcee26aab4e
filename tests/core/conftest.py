"""Installed packages for tests: made-up distributions on `sys.path`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Install = Callable[..., Path]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A site-packages folder; modules `peg_*` imported from it go with the test."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if name.startswith("peg_"):
            del sys.modules[name]


@pytest.fixture
def install(site: Path) -> Install:
    """`install("peg-x", code)` makes a distribution whose module `peg_x` is its plugin."""

    def make(
        name: str, code: str, *, version: str = "1.2", points: str | None = None, **files: str
    ) -> Path:
        module = name.replace("-", "_")
        info = site / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(points or f"[pegboard]\nplugin = {module}\n")
        package = site / module
        package.mkdir()
        (package / "__init__.py").write_text(code)
        for file, text in files.items():
            (package / file.replace("__", ".")).write_text(text)
        return package / "__init__.py"

    return make
