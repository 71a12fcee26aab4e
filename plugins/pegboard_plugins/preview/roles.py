"""Which message of a chat each character of a sample belongs to.

The chat template is a black box: where a message's content starts shows when the content is
replaced by a mark and the chat is rendered again. What lies between two contents is cut after the
token that ends a turn. A sample that is no render of the chat (its history keeps what the template
strips) is searched for the same headers, in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pegboard import DataError

if TYPE_CHECKING:
    from pegboard_plugins.texts.rendering import ChatRenderer

__all__ = ["TextSpan", "find_roles"]

# Private use: in no text, and no template trims it.
_MARK = "\ue0f3\ue0f4"

TEMPLATE = "template"


class TextSpan(NamedTuple):
    """Characters of one message in a sample's text."""

    role: str
    message: int
    """Index in the messages; -1 for what the template says itself."""
    start: int
    end: int


def find_roles(
    text: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    renderer: ChatRenderer,
    stops: Sequence[str],
) -> list[TextSpan]:
    """Spans that cover `text`, in order; [] if the template's messages can't be found in it.

    Args:
        text: a sample, decoded.
        stops: the spellings of the tokens that end a turn.
    """
    for count in range(len(messages), 0, -1):
        try:
            rendered = renderer.full(messages[:count], tools)
            if rendered.startswith(text) or _is_whole(rendered, text, stops):
                starts = _starts(messages[:count], tools, renderer, stops, rendered)
                return _spans(text, messages, starts)
        except DataError:  # this beginning of the chat does not render
            continue
    try:
        rendered = renderer.full(messages, tools)
        starts = _starts(messages, tools, renderer, stops, rendered)
    except DataError:
        return []
    return _spans(text, messages, _search(text, rendered, starts))


def _is_whole(rendered: str, text: str, stops: Sequence[str]) -> bool:
    """Whether they are equal but for white space after the last token that ends a turn."""
    return rendered.rstrip() == text.rstrip() and text.rstrip().endswith(tuple(stops))


class _Start(NamedTuple):
    message: int
    start: int
    """Where its header starts."""
    content: int
    """Where its content starts."""


def _starts(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    renderer: ChatRenderer,
    stops: Sequence[str],
    rendered: str,
) -> list[_Start]:
    """Where each message lies in the rendered chat; those that can't be told are left out."""
    starts: list[_Start] = []
    floor = 0
    for j, message in enumerate(messages):
        marked = [*messages[:j], {**message, "content": _MARK}, *messages[j + 1 :]]
        try:
            with_mark = renderer.full(marked, tools)
        except DataError:
            continue
        at = with_mark.find(_MARK)
        if at < floor or not rendered.startswith(with_mark[:at]):
            continue
        content = message.get("content")
        start = _after_stop(rendered, floor, at, stops)
        starts.append(_Start(j, start, at))
        shown = content.strip() if isinstance(content, str) else ""
        floor = at + len(shown) if shown and rendered.startswith(shown, at) else at
    return starts


def _after_stop(text: str, start: int, end: int, stops: Sequence[str]) -> int:
    """Past the first token between that ends a turn, and the white space after it; else `start`."""
    ends = [at + len(stop) for stop in stops if (at := text.find(stop, start, end)) >= 0]
    if not ends:
        return start
    past = min(ends)
    while past < end and text[past].isspace():
        past += 1
    return past


def _search(text: str, rendered: str, starts: Sequence[_Start]) -> list[_Start]:
    """The same headers, looked up in another text in the same order."""
    found: list[_Start] = []
    at = 0
    for message, start, content in starts:
        header = rendered[start:content].split("<think>", 1)[0] or rendered[start:content]
        place = text.find(header, at) if header else -1
        if place < 0:
            break
        at = place + len(header)
        found.append(_Start(message, place, at))
    return found


def _spans(
    text: str, messages: Sequence[Mapping[str, Any]], starts: Sequence[_Start]
) -> list[TextSpan]:
    inside = [start for start in starts if start.start < len(text)]
    if not inside:
        return []
    spans = []
    if inside[0].start > 0:
        spans.append(TextSpan(TEMPLATE, -1, 0, inside[0].start))
    for k, start in enumerate(inside):
        end = inside[k + 1].start if k + 1 < len(inside) else len(text)
        if end > start.start:
            role = str(messages[start.message].get("role"))
            spans.append(TextSpan(role, start.message, start.start, end))
    return spans
