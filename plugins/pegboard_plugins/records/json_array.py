"""A file that is one JSON list of records, as lines: the form in which many vision sets are published.

The list is cut element by element, so that no more of the file than a few blocks is in memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from json import JSONDecodeError

__all__ = ["is_json_array", "iter_array_lines"]

_BLOCK_CHARACTERS = 1 << 22
_HEAD_BYTES = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
_NEAR_END = 64
"""What is cut off in the middle fails this near to where it was cut, or is a string without an end."""


def is_json_array(path: str) -> bool:
    """Whether a .json file is one list of records, and not lines that are each a list of messages."""
    if not path.endswith(".json"):
        return False
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text.startswith(b"["):
        return False
    line, newline, _ = text.partition(b"\n")
    try:
        first = json.loads(line) if newline else None
    except (ValueError, RecursionError):
        return True
    # A whole list in a line of several: messages, or, with nothing behind it, all records.
    if not isinstance(first, list) or not first or not isinstance(first[0], dict):
        return True
    return "role" not in first[0]


def iter_array_lines(path: str) -> Iterator[bytes]:
    """Each element of the list in a line of its own, as it is written.

    Raises:
        ValueError: the file is not a JSON list; says which record.
    """
    decoder = json.JSONDecoder()
    with open(path, encoding="utf-8-sig", newline="") as file:
        text = file.read(_BLOCK_CHARACTERS)
        at = _skip(text, 0) + 1  # behind the bracket
        number = 0
        while True:
            at = _skip(text, at)
            if text[at : at + 1] == "]":
                if text[at + 1 :].strip() or file.read(_BLOCK_CHARACTERS).strip():
                    raise ValueError("something stands behind the list's end")
                return
            if number and text[at : at + 1] == ",":
                at = _skip(text, at + 1)
                if text[at : at + 1] == "]":
                    raise ValueError(f"record {number}: a comma, but no record behind it")
            try:
                _, end = decoder.raw_decode(text, at)
                # Behind a record stands a comma or the end, which has to be here too.
                whole = _skip(text, end) < len(text)
            except JSONDecodeError as error:
                if len(text) - error.pos > _NEAR_END and not error.msg.startswith("Unterminated"):
                    raise ValueError(f"record {number + 1}: {error.msg}") from None
                whole = False
            if whole:
                number += 1
                # Line ends are no part of any JSON string.
                yield re.sub(r"[\r\n]", " ", text[at:end]).encode("utf-8", "surrogatepass") + b"\n"
                at = _next(text, end, number)
                continue
            # Twice as much at each time, so that long records are not read again and again.
            more = file.read(max(_BLOCK_CHARACTERS, len(text) - at))
            if not more:
                raise ValueError(f"record {number + 1}: the file ends in it, or behind it")
            text, at = text[at:] + more, 0


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _next(text: str, end: int, number: int) -> int:
    at = _skip(text, end)
    if text[at] not in ",]":
        raise ValueError(f"record {number}: expected a comma or the list's end behind it")
    return at
