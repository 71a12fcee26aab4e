"""The claim: the config reference and the editor schema in the repository are those of the code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_generated_files_are_what_the_code_says() -> None:
    spec = importlib.util.spec_from_file_location(
        "generate_reference", ROOT / "docs" / "generate_reference.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for path, text in module.generated_files().items():
        assert path.read_text(encoding="utf-8") == text, (
            f"{path.name} is stale: run python docs/generate_reference.py"
        )
