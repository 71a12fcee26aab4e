"""Pieces of markup that the parts of the page share; everything from data comes in through `text` and `flow`."""

from __future__ import annotations

import html
import re

from .contents import TurnStatus
from .pieces import visible_character

__all__ = [
    "STATUS_WORDS",
    "bar",
    "color",
    "flow",
    "sample_id",
    "share",
    "status_class",
    "text",
]

_NUM_SOURCE_COLORS = 8

STATUS_WORDS: dict[TurnStatus, str] = {
    "same": "trained exactly as at inference",
    "cut": "trained, cut at max_length",
    "differs": "trained after another prompt than at inference",
    "no loss": "as at inference, without loss",
    "rewritten": "without loss: its text differs from inference",
}


def text(text: str) -> str:
    """Anything that comes from data, as text of one line."""
    return html.escape("".join(visible_character(c) or c for c in text))


def flow(text: str) -> str:
    """Text with its lines; newlines, tabs, several spaces and what would not show get a glyph."""
    visible = "( +)" if not text.strip(" \n") else "( {2,})"
    stretches = re.split(visible, text)
    return "".join(
        f'<b class="d">{part}</b>' if k % 2 else "".join(map(_glyph, part))
        for k, part in enumerate(stretches)
    )


def bar(share: float, kind: str = "") -> str:
    width = round(100 * share, 2)
    return (
        f'<svg class="bar {kind}" viewBox="0 0 100 8" preserveAspectRatio="none" '
        f'aria-hidden="true"><rect class="rail" width="100" height="8"/>'
        f'<rect width="{width}" height="8"/></svg>'
    )


def share(count: int, total: int) -> str:
    return f"{count / total:.1%}" if total else "0.0%"


def color(index: int) -> str:
    return f"c{index % _NUM_SOURCE_COLORS}"


def status_class(status: TurnStatus) -> str:
    return f"t-{status.replace(' ', '-')}"


def sample_id(pack: int, sample: int) -> str:
    return f"p{pack}s{sample}"


def _glyph(character: str) -> str:
    if character == "\n":
        return "<b></b>\n"
    if character == "\t":
        return '<b class="t"></b>\t'
    if name := visible_character(character):
        return f'<b class="c">{name}</b>'
    return html.escape(character)
