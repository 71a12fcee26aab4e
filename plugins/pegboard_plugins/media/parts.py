"""Pictures and videos as a record's messages name them.

Accepted in a message's content list (`image_wh` is optional everywhere, `[width, height]`):

    {"type": "image_url", "image_url": {"url": "a.jpg", "image_wh": [640, 480]}}   or a plain string
    {"type": "image", "image": "a.jpg"}     a path, a data: URL, bytes, or {"path"/"url"/"bytes": ...}
    {"type": "video_url", ...}  and  {"type": "video", ...}     likewise
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from pegboard_plugins.media.places import MediaError, shown

__all__ = ["MediaPart", "hole_kind", "iter_media_parts", "read_media_part"]

_KINDS: Mapping[str, Literal["image", "video"]] = {
    "image": "image",
    "image_url": "image",
    "video": "video",
    "video_url": "video",
}


class MediaPart(NamedTuple):
    """One picture or video of a record."""

    kind: Literal["image", "video"]
    reference: str | bytes
    """A path or a `data:` URL as written, or the file's bytes."""
    size: tuple[int, int] | None
    """(width, height) that the record claims, of the upright picture."""


def read_media_part(part: Mapping[str, Any], where: str) -> MediaPart | None:
    """The picture or video that a content part names; None for any other kind of part.

    Args:
        where: the part's place in the record, such as `messages[0].content[1]`.

    Raises:
        MediaError: the part names none, or its `image_wh` is no size.
    """
    name = part.get("type")
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        return None
    value = part.get(f"{kind}_url", part.get(kind))
    if value is None:
        value = {key: part[key] for key in ("url", "path", "bytes") if part.get(key) is not None}
    fields = value if isinstance(value, Mapping) else {}
    if isinstance(value, Mapping):
        found = [fields[key] for key in ("bytes", "url", "path") if fields.get(key) is not None]
        value = found[0] if found else None
    if not isinstance(value, str | bytes):
        raise MediaError(
            f"{kind} not named",
            f'{where}: expected "{kind}_url": {{"url": ...}}, a path, a data: URL or bytes, found '
            f"{shown(value)}",
        )
    claimed = fields.get("image_wh", part.get("image_wh"))
    return MediaPart(kind, value, _read_size(claimed, where))


def hole_kind(part: Any) -> Literal["image", "video"] | None:
    """The kind of a part that names no picture or video itself, such as `{"type": "image"}`: it
    stands for one that the record lists elsewhere. None for any other part."""
    name = part.get("type") if isinstance(part, Mapping) else None
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        return None
    keys = (f"{kind}_url", kind, "url", "path", "bytes")
    return kind if all(part.get(key) is None for key in keys) else None


def iter_media_parts(record: Any) -> Iterator[tuple[Any, MediaPart]]:
    """All pictures and videos in content parts of a record's turns, in order: (as written, as read).

    Whatever the form of the record: its turns are the lists of objects with `content` or `value`.
    """
    lists = record.items() if isinstance(record, Mapping) else [("", record)]
    for name, turns in lists:
        if not isinstance(turns, list | tuple):
            continue
        for i, turn in enumerate(turns):
            for key in ("content", "value"):
                content = turn.get(key) if isinstance(turn, Mapping) else None
                if not isinstance(content, list | tuple):
                    continue
                for j, part in enumerate(content):
                    if not isinstance(part, Mapping) or hole_kind(part):
                        continue
                    found = read_media_part(part, f"{name}[{i}].{key}[{j}]")
                    if found is not None:
                        yield part, found


def _read_size(claimed: Any, where: str) -> tuple[int, int] | None:
    if claimed is None:
        return None
    if isinstance(claimed, list | tuple) and len(claimed) == 1:
        claimed = claimed[0]
    if (
        isinstance(claimed, list | tuple)
        and len(claimed) == 2
        and all(type(side) is int and 0 < side < 2**31 for side in claimed)
    ):
        return (claimed[0], claimed[1])
    raise MediaError(
        "image_wh invalid",
        f"{where}.image_wh: expected [width, height] in pixels, found {shown(claimed)}",
    )
