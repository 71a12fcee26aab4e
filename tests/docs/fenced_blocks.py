"""The fenced blocks of README.md and docs/: where each stands, its language, its text.

A block that can't run says why in a comment on the line before its fence: `<!-- not run: reason -->`.
`<!-- file: name -->` there means that the block is that file of the reader's folder, and `<!-- prints: command -->`
that the block is what that command of the page prints.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROOT", "Block", "all_pages", "blocks_of", "config_blocks"]

ROOT = Path(__file__).resolve().parents[2]
_FENCED = re.compile(
    r"(?:^<!-- (?P<word>[a-z ]+): (?P<about>[^\n]+?) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$",
    flags=re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One block; `not_run` is the reason its page gives, `file` the name it is to be saved under, `printed_by` the
    command that prints it."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str = ""
    file: str = ""
    printed_by: str = ""

    @property
    def place(self) -> str:
        """Such as `docs/data.md:46`."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def all_pages() -> list[Path]:
    """README.md, then every page under docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_of(page: Path) -> list[Block]:
    """The page's blocks in order."""
    text = page.read_text(encoding="utf-8")
    blocks = []
    for found in _FENCED.finditer(text):
        about = {found["word"]: found["about"]}
        line = text.count("\n", 0, found.start("language")) + 1
        blocks.append(
            Block(
                page,
                line,
                found["language"],
                found["text"],
                about.get("not run", ""),
                about.get("file", ""),
                about.get("prints", ""),
            )
        )
    return blocks


def config_blocks() -> list[Block]:
    """The JSON blocks that are whole configs: those with a work of their own, or one they extend."""
    found = []
    for block in (block for page in all_pages() for block in blocks_of(page)):
        if block.language == "json" and not block.not_run:
            value = json.loads(block.text)
            if isinstance(value, dict) and "datasets" in value:
                found.append(block)
    return found
