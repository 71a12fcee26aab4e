"""Which files hold records, and what is needed to read them; imports nothing heavy."""

from __future__ import annotations

import importlib.util
import os

__all__ = ["RECORD_FILES", "default_unpack_dir", "missing_package"]

RECORD_FILES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
"""Endings of the files that hold records."""

_PACKAGES = {".zst": ("zstandard", "zstd"), ".parquet": ("pyarrow", "parquet")}


def missing_package(path: str) -> str | None:
    """What is missing to read a file of this name, as a sentence; None if nothing is."""
    for ending, (package, extra) in _PACKAGES.items():
        if path.endswith(ending) and importlib.util.find_spec(package) is None:
            return (
                f"reading {ending} needs the package '{package}', which is not installed; run "
                f"pip install 'pegboard[{extra}]'"
            )
    return None


def default_unpack_dir() -> str:
    """Where compressed files are unpacked unless a config says otherwise: in the user's cache."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(root, "pegboard", "unpacked")
