"""Find, in a rendered chat, exactly the characters that the model generates at inference.

For assistant turn j: P is the prompt at inference, E the chat up to and with turn j, and G = E
less P up to the first stop token. The template is a black box: nothing is known of its headers or
tags, so the same definition holds for any of them.

    exact      the whole chat begins with P + G
    shown      G is intact in the whole chat, but the text before it is not the prompt of inference
    rewritten  G is not in the whole chat (history whose reasoning the template strips)
    noprefix   E does not begin with any prompt: no chat of this template has such a turn
    noend      the template writes no stop token after the turn
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pegboard.errors import DataError
from pegboard_plugins.texts.rendering import ChatRenderer

__all__ = ["Turn", "TurnKind", "find_turns"]

TurnKind = Literal["exact", "shown", "rewritten", "noprefix", "noend"]

# Private use: in no text, and no template trims it.
_MARK = "\ue0f1\ue0f2"


class Turn(NamedTuple):
    """One assistant turn in the rendered chat."""

    message: int
    """Index in the messages."""
    kind: TurnKind
    start: int
    """First generated character in the rendered chat; 0 unless exact or shown."""
    end: int
    """One past the stop token; 0 unless exact or shown."""


def find_turns(
    renderer: ChatRenderer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    chosen: Sequence[int],
    stops: Sequence[str],
) -> tuple[str, list[Turn]]:
    """Render the chat and locate the assistant messages `chosen` by index.

    Args:
        stops: the spellings of the tokens that end a turn.

    Returns:
        The rendered chat, equal to the template's own text, and one Turn for each of `chosen`.

    Raises:
        DataError: the template refuses the messages.
    """
    full = renderer.full(messages, tools)
    return full, [_find_turn(renderer, messages, tools, j, stops, full) for j in chosen]


def _find_turn(
    renderer: ChatRenderer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    j: int,
    stops: Sequence[str],
    full: str,
) -> Turn:
    if j == 0:  # nobody asked: there is no prompt to generate from
        return Turn(j, "noprefix", 0, 0)
    try:
        ended = full if j == len(messages) - 1 else renderer.full(messages[: j + 1], tools)
        prompts = [p for p in renderer.prompts(messages[:j], tools) if ended.startswith(p)]
    except DataError:  # the whole chat renders, this beginning does not (no user yet)
        return Turn(j, "noprefix", 0, 0)
    if not prompts:
        return Turn(j, "noprefix", 0, 0)
    prompt = max(prompts, key=len)
    generated = _generated(ended, len(prompt), stops, full)
    if generated is None:
        return Turn(j, "noend", 0, 0)
    if full.startswith(generated, len(prompt)) and full.startswith(prompt):
        return Turn(j, "exact", len(prompt), len(prompt) + len(generated))
    start = _locate(renderer, messages, tools, j, generated, full)
    if start is None:
        return Turn(j, "rewritten", 0, 0)
    return Turn(j, "shown", start, start + len(generated))


def _generated(ended: str, start: int, stops: Sequence[str], full: str) -> str | None:
    """Text from `start` through the first stop token, or None."""
    ends = [(at, at + len(stop)) for stop in stops if (at := ended.find(stop, start)) >= 0]
    if ends:
        return ended[start : min(ends)[1]]
    # In GLM templates the next header is the stop token: it shows only in the longer chat.
    if full.startswith(ended):
        for stop in stops:
            if full.startswith(stop, len(ended)):
                return full[start : len(ended) + len(stop)]
    return None


def _locate(
    renderer: ChatRenderer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    j: int,
    generated: str,
    full: str,
) -> int | None:
    """Start of `generated` in `full` at turn j's own place, or None.

    The place is where a mark shows when it stands for the turn's content: a plain search would take
    an equal turn elsewhere for this one.
    """
    if generated not in full:
        return None
    marked = [*messages[:j], {**messages[j], "content": _MARK}, *messages[j + 1 :]]
    try:
        text = renderer.full(marked, tools)
    except DataError:
        return None
    place = text.find(_MARK)
    if place < 0 or not full.startswith(text[:place]):
        return None
    start = full.find(generated, max(0, place - len(generated) + 1), place + len(generated))
    return start if start >= 0 else None
