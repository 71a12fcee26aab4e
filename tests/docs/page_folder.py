"""A reader's folder: the files that a page tells to save, and the commands that it tells to type."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

from fenced_blocks import ROOT, Block, blocks_of

__all__ = ["PROGRAMS", "commands_of", "pegboard_words", "write_files"]

PROGRAMS = ("pegboard", "python", "torchrun", "make", "pip", "pytest", "mkdir", "cd", "git")
"""What a line of a block begins with if it is to be typed."""


def write_files(page: Path, folder: Path) -> list[str]:
    """Save the page's blocks that are files, and the shipped configs; the names that were written."""
    if not (folder / "configs").exists():
        shutil.copytree(ROOT / "configs", folder / "configs")
    written = []
    for block in blocks_of(page):
        if block.file:
            path = folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
            written.append(block.file)
    return written


def commands_of(block: Block) -> list[list[str]]:
    """The words of each command of the block, comments and marks of choice taken out."""
    if block.language not in ("", "sh", "console", "bash") or block.not_run:
        return []
    lines = [line.strip() for line in block.text.replace("\\\n", " ").splitlines()]
    if any(line.startswith("$ ") for line in lines):
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    elif block.language == "" and lines[0].split(" ")[0] not in PROGRAMS:
        return []  # output, or a drawing
    found = []
    for line in lines:
        # `A|B` is a choice, `[C]` may be left out.
        words = shlex.split(re.sub(r"[\[\]]", "", line) if "[--" in line else line, comments=True)
        if words:
            found.append([re.sub(r"^([A-Z]+)\|[\w.]+$", r"\1", word) for word in words])
    return found


def pegboard_words(command: list[str]) -> list[str] | None:
    """What follows `pegboard`, also where the command is run through core/run.py; None for another program."""
    if command[0] == "pegboard":
        return command[1:]
    if "core/run.py" in command and command[0] in ("python", "torchrun"):
        return command[command.index("core/run.py") + 1 :]
    return None
