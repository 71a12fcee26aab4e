"""Where the pictures and videos of a record stand in the text of its messages.

A part of a message's content stands where it is, a placeholder in the text (`<IMG_CONTEXT>`) names a
place for one. What the record lists beside its messages goes where `<image>` is written, where a part
says no more than that a picture is there, or, with neither, before the first question.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pegboard_plugins.media.listed import Kind, ListedMedia
from pegboard_plugins.media.parts import MediaPart, hole_kind, read_media_part
from pegboard_plugins.media.places import MediaError

__all__ = [
    "IMAGE_TOKEN",
    "PLACEHOLDERS",
    "FoundMedia",
    "Placer",
    "check_placeholders",
    "count_text",
    "take_media",
]

IMAGE_TOKEN = "<IMG_CONTEXT>"
PLACEHOLDERS: Mapping[Kind, str] = {"image": IMAGE_TOKEN, "video": "<VIDEO_CONTEXT>"}
_PLACEHOLDER = re.compile("|".join(re.escape(token) for token in PLACEHOLDERS.values()))


@dataclass(frozen=True)
class FoundMedia:
    """One picture or video of a record."""

    part: MediaPart
    written: Any = None
    """The content part that names it; None for one that the record lists."""
    listed_at: Sequence[str | int] = ()
    """Where the record lists it."""


def take_media(
    messages: Any, listed: Sequence[ListedMedia], marks: Mapping[Kind, str]
) -> tuple[list[FoundMedia], list[Any]]:
    """The record's pictures and videos, and its messages with no more than the kinds of these.

    Args:
        listed: what the record lists beside its messages.
        marks: how the text of such a record writes the place of one, by kind.

    Raises:
        MediaError: a part names nothing, or there are not as many places as pictures.
    """
    found: list[FoundMedia] = []
    flat: list[Any] = []
    if not isinstance(messages, list | tuple):
        return found, flat
    waiting: dict[str, list[ListedMedia]] = {kind: [] for kind in PLACEHOLDERS}
    for one in listed:
        waiting[one.part.kind].append(one)
    num_holes = dict.fromkeys(PLACEHOLDERS, 0)
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, list | tuple):
            flat.append(message)
            continue
        kept: list[Any] = []
        for j, part in enumerate(content):
            hole = hole_kind(part)
            if hole is not None and waiting[hole]:
                num_holes[hole] += 1
                kept.append({"type": hole})
                continue
            where = f"messages[{i}].content[{j}]"
            media = read_media_part(part, where) if isinstance(part, Mapping) else None
            if media is None:
                kept.append(part)
            else:
                found.append(FoundMedia(media, part))
                kept.append({"type": media.kind})
        flat.append({**message, "content": kept})
    for kind in PLACEHOLDERS:
        own = [one.part.reference for one in found if one.part.kind == kind]
        if waiting[kind] and _are_new(waiting[kind], own):
            flat = _with_places(flat, waiting[kind], marks[kind], num_holes[kind])
            found += [FoundMedia(one.part, listed_at=one.path) for one in waiting[kind]]
    return found, flat


def count_text(messages: Sequence[Any], token: str) -> int:
    """How often the text of all messages holds `token`."""
    total = 0
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, str):
            total += content.count(token)
        elif isinstance(content, list | tuple):
            total += sum(_text_of(part).count(token) for part in content)
    return total


def check_placeholders(messages: Sequence[Any], tools: Any) -> None:
    """Refuse `<IMG_CONTEXT>` where no picture can be meant: it would take one from its place.

    Raises:
        MediaError: it is written in reasoning, in a tool call or in the tools.
    """
    places = {"tools": tools}
    for i, message in enumerate(messages):
        if isinstance(message, Mapping):
            places |= {f"messages[{i}].{key}": v for key, v in message.items() if key != "content"}
    for where, value in places.items():
        if value and IMAGE_TOKEN in json.dumps(value, default=str):
            raise MediaError(
                "placeholder outside content",
                f"{where}: holds {IMAGE_TOKEN}, which stands for a picture in content only; spell "
                "it otherwise there",
            )


def _are_new(listed: Sequence[ListedMedia], own: Sequence[Any]) -> bool:
    """False where the messages name the same ones themselves."""
    if not own:
        return True
    kind, key = listed[0].part.kind, listed[0].path[0]
    if own == [one.part.reference for one in listed]:
        return False
    raise MediaError(
        "pictures named twice",
        f"messages: they name {len(own)} {kind}s, and {key} lists {len(listed)}; leave one of both "
        f"out, or take {key!r} out of tokenize_fn.{kind}_keys",
    )


def _with_places(
    messages: list[Any], listed: Sequence[ListedMedia], mark: str, num_holes: int
) -> list[Any]:
    """The messages with a place for each of the listed ones."""
    kind, key = listed[0].part.kind, listed[0].path[0]
    token = PLACEHOLDERS[kind]
    num_marks = count_text(messages, mark) + count_text(messages, token)
    places = num_holes or num_marks
    if not places:
        return _in_front(messages, len(listed), kind)
    if places != len(listed) or (num_holes and num_marks):
        written = [f"{num_holes} parts of type {kind}"] * bool(num_holes)
        written += [f"{num_marks} {mark}"] * bool(num_marks)
        raise MediaError(
            "placeholders differ",
            f"messages: they hold {' and '.join(written)}, but {key} lists {len(listed)} {kind}s; "
            "write one for each, or none",
        )
    return messages if num_holes else [_replaced(message, mark, token) for message in messages]


def _in_front(messages: list[Any], count: int, kind: str) -> list[Any]:
    """The messages with as many parts before the text of the first question."""
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in messages]
    at = roles.index("user") if "user" in roles else 0
    if not messages or not isinstance(messages[at], Mapping):
        return messages
    content = messages[at].get("content")
    rest = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    first = {**messages[at], "content": [*({"type": kind} for _ in range(count)), *rest]}
    return [*messages[:at], first, *messages[at + 1 :]]


def _replaced(message: Any, mark: str, token: str) -> Any:
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, str):
        return {**message, "content": content.replace(mark, token)}
    if isinstance(content, list | tuple):
        parts = [
            {**part, "text": part["text"].replace(mark, token)} if _text_of(part) else part
            for part in content
        ]
        return {**message, "content": parts}
    return message


class Placer:
    """Writes a record's media into the text of its messages.

    Where the text holds placeholders of a kind, they say where its pictures (videos) go, in order;
    else each goes where its part stands.
    """

    def __init__(
        self,
        messages: Sequence[Any],
        parts: Sequence[MediaPart],
        image_text: str,
        frame_texts: Mapping[int, str],
    ) -> None:
        self.order: list[int] = []
        """Numbers of the media in the order of the text."""
        self._image_text = image_text
        self._frame_texts = frame_texts
        self._waiting = {
            kind: deque(n for n, part in enumerate(parts) if part.kind == kind)
            for kind in PLACEHOLDERS
        }
        self._written = set()
        for kind, token in PLACEHOLDERS.items():
            written, given = count_text(messages, token), len(self._waiting[kind])
            if written and written != given:
                raise MediaError(
                    "placeholders differ",
                    f"messages: their text holds {written} {token}, but {given} {kind}s are "
                    "given; write one for each, or none",
                )
            if written:
                self._written.add(kind)

    def place(self, message: Any) -> Any:
        """The message with text parts alone, one `<IMG_CONTEXT>` for each picture and frame."""
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, str):
            return {**message, "content": self._fill(content)}
        if not isinstance(content, list | tuple):
            return message
        placed = [p for part in content for p in self._place_part(part)]
        if message.get("role") == "pretrain" and all(map(_is_text, placed)):
            # Plain text has no template that could join its parts.
            return {**message, "content": "".join(map(_text_of, placed))}
        return {**message, "content": placed}

    def _place_part(self, part: Any) -> list[Any]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image" or kind == "video":
            if kind in self._written:
                return []
            text = self._take(kind)
            text = self._image_text if kind == "image" else f"{text}\n"
            return [{"type": "text", "text": text}]
        if _text_of(part):
            return [{**part, "text": self._fill(part["text"])}]
        return [part]

    def _fill(self, text: str) -> str:
        """Text whose placeholders are filled in the order they stand."""
        if not self._written:
            return text
        kinds: dict[str, Kind] = {token: kind for kind, token in PLACEHOLDERS.items()}
        return _PLACEHOLDER.sub(lambda found: self._take(kinds[found[0]]), text)

    def _take(self, kind: Kind) -> str:
        number = self._waiting[kind].popleft()
        self.order.append(number)
        return self._frame_texts.get(number, IMAGE_TOKEN)


def _is_text(part: Any) -> bool:
    return (
        isinstance(part, Mapping)
        and part.get("type") == "text"
        and isinstance(part.get("text"), str)
    )


def _text_of(part: Any) -> str:
    return str(part["text"]) if _is_text(part) else ""
