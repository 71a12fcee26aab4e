"""Pictures and videos that a record lists beside its turns, as LLaVA's, ShareGPT's and TRL's records do.

{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, ...]}
{"images": ["a.jpg", {"bytes": ...}], "messages": [{"role": "user", "content": "<image> or <image>?"}, ...]}
{"images": ["a.jpg"], "messages": [{"role": "user", "content": [{"type": "image"}, ...]}, ...]}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pegboard_plugins.media.parts import MediaPart, read_media_part

__all__ = ["ListedMedia", "read_listed_at", "read_listed_media"]

Kind = Literal["image", "video"]


class ListedMedia(NamedTuple):
    """One picture or video, and where its record lists it."""

    part: MediaPart
    path: tuple[str] | tuple[str, int]
    """Key of the record, and the place in that key's list if it holds one."""


def read_listed_media(record: Any, keys: Mapping[Kind, Sequence[str]]) -> list[ListedMedia]:
    """What the record lists under these keys, in order; of each kind, the first key that lists any.

    Raises:
        MediaError: an entry names no picture, or its `image_wh` is no size.
    """
    listed: list[ListedMedia] = []
    if not isinstance(record, Mapping):
        return listed
    for kind, names in keys.items():
        key = next((name for name in names if _holds_any(record.get(name))), None)
        if key is None:
            continue
        value = record[key]
        paths: list[tuple[str] | tuple[str, int]]
        if isinstance(value, list | tuple):
            paths = [(key, index) for index in range(len(value))]
        else:
            paths = [(key,)]
        listed += [ListedMedia(read_listed_at(record, path, kind), path) for path in paths]
    return listed


def read_listed_at(record: Any, path: Sequence[str | int], kind: Kind) -> MediaPart:
    """The picture or video at `path` of the record.

    Raises:
        MediaError: it names none.
        LookupError, TypeError: there is no such place.
    """
    value = record
    for step in path:
        value = value[step]
    where = "".join(f"[{step}]" if isinstance(step, int) else str(step) for step in path)
    part = read_media_part({"type": kind, kind: value}, where)
    assert part is not None
    return part


def _holds_any(value: Any) -> bool:
    """Records without pictures say null, "" or []; an array of parquet has no truth value."""
    return value is not None and not (hasattr(value, "__len__") and len(value) == 0)
