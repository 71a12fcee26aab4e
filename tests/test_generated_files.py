"""The claim: the config reference and the editor schema in the repository are those of the code."""

from __future__ import annotations

import importlib.util
import re
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


def test_every_page_stands_in_the_navigation_of_the_site() -> None:
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"(?:: |- )([\w/.-]+\.md)$", config, flags=re.MULTILINE))
    assert pages - listed == set(), "name them under `nav:` in mkdocs.yml"
    assert listed - pages == set(), "these pages are gone: take them out of mkdocs.yml"
