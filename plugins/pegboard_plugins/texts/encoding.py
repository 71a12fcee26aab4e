"""Encode a text and tell which tokens lie inside given character spans.

Ids are those of the undivided text: a text is cut only where its tokenizer never merges, at added
tokens and between words (see `pegboard_plugins.texts.pieces`), or not at all. A token that straddles
a border gets no loss: it holds characters of the prompt, which the model never emits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from pegboard.errors import DataError
from pegboard_plugins.texts.typed_tokens import is_blank

if TYPE_CHECKING:
    from pegboard.contracts import Tokenizer
    from pegboard_plugins.texts.pieces import PieceEncoder

__all__ = [
    "EncodedSegments",
    "OffsetTokenizer",
    "PieceTokenizer",
    "Segment",
    "encode_plain_text",
    "encode_segments",
    "encode_with_mask",
    "runs_of",
]

Segment = tuple[str, bool]
"""A text, and whether it gets loss."""


class EncodedSegments(NamedTuple):
    """Segments in tokens."""

    ids_T: np.ndarray
    """(T,) int32."""
    mask_T: np.ndarray
    """(T,) bool: loss."""
    runs: Sequence[tuple[int, int]]
    """(first token, one past the last) of each segment with loss, in order."""


class OffsetTokenizer(Protocol):
    """A tokenizer that also knows where its tokens lie."""

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each the (start, end) of its characters in `text`, in order."""
        ...


class PieceTokenizer(Protocol):
    """A tokenizer whose texts may be cut at added tokens."""

    @property
    def pieces(self) -> PieceEncoder | None:
        """None where cutting could change ids."""
        ...


def encode_with_mask(
    tokenizer: Tokenizer,
    text: str,
    spans: Sequence[tuple[int, int]],
    *,
    mark: str = "",
    plain: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Encode `text` whole; mark the tokens whose characters lie wholly inside one of `spans`.

    Args:
        spans: (start, end) in characters, in order, not overlapping.
        mark: a character that keeps typed special tokens apart (see
            `pegboard_plugins.texts.typed_tokens`); it is left out of what is encoded.
        plain: the spelling of an added token is text, everywhere.

    Returns:
        ids (T,) int32 and mask (T,) bool.

    Raises:
        DataError: the tokenizer gives no offsets, and cutting at the spans would change the ids.
    """
    pieces: PieceEncoder | None = getattr(tokenizer, "pieces", None)
    if pieces is not None:
        parts = [text] if plain else pieces.split(text)
        return _encode_pieces(pieces, parts, spans, mark)
    added: Mapping[str, bool] = getattr(tokenizer, "added_tokens", {})
    if plain and any(token in text for token in added if not is_blank(token)):
        return _encode_divided(partial(tokenizer.encode, special_tokens=False), text, spans)
    if mark and mark in text:
        return _encode_around_marks(tokenizer, text, spans, mark)
    # Not isinstance: a check of a runtime protocol costs more than a short text's encoding.
    encode: Callable[[str], tuple[list[int], list[tuple[int, int]]]] | None
    encode = getattr(tokenizer, "encode_with_offsets", None)
    if encode is not None:
        ids, offsets = encode(text)
        return np.asarray(ids, dtype=np.int32), _mask_from_offsets(offsets, spans, text, added)
    return _encode_divided(tokenizer.encode, text, spans)


def encode_segments(
    tokenizer: Tokenizer, segments: Sequence[Segment], *, mark: str = ""
) -> EncodedSegments:
    """Encode a prompt and an answer apart, as inference does, and join them.

    Where the tokenizer's texts can't be cut, the joined text is encoded whole.

    Args:
        segments: (text, whether it gets loss), in order.

    Raises:
        DataError: as `encode_with_mask`.
    """
    pieces: PieceEncoder | None = getattr(tokenizer, "pieces", None)
    if pieces is None:
        spans, at = [], 0
        for text, trained in segments:
            if trained:
                spans.append((at, at + len(text)))
            at += len(text)
        whole = "".join(text for text, _ in segments)
        ids, mask = encode_with_mask(tokenizer, whole, spans, mark=mark)
        return EncodedSegments(ids, mask, runs_of(mask))
    encoded = [pieces.encode(text, mark) for text, _ in segments]
    ids = np.frombuffer(b"".join(encoded), dtype=np.int32)
    mask = np.zeros(len(ids), dtype=bool)
    runs = []
    at = 0
    for part, (_, trained) in zip(encoded, segments, strict=True):
        end = at + (len(part) >> 2)
        if trained:
            mask[at:end] = True
            runs.append((at, end))
        at = end
    return EncodedSegments(ids, mask, runs)


def runs_of(mask_T: np.ndarray) -> list[tuple[int, int]]:
    """(first, one past the last) of each run of True, in order."""
    # Few and long: finding each border in the bytes is several times as fast as comparing neighbours.
    raw = mask_T.tobytes()
    runs = []
    end = 0
    while (start := raw.find(1, end)) >= 0:
        end = raw.find(0, start)
        if end < 0:
            end = len(raw)
        runs.append((start, end))
    return runs


def encode_plain_text(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """(T,) int32 ids of a text in which the spelling of a special token is only text."""
    pieces: PieceEncoder | None = getattr(tokenizer, "pieces", None)
    if pieces is not None:
        return np.frombuffer(pieces.encode_piece(text), dtype=np.int32)
    return np.asarray(tokenizer.encode(text, special_tokens=False), dtype=np.int32)


def _encode_pieces(
    pieces: PieceEncoder, parts: Sequence[str], spans: Sequence[tuple[int, int]], mark: str
) -> tuple[np.ndarray, np.ndarray]:
    borders = [border for span in spans for border in span]
    places: list[tuple[int, int]] = []
    out: list[bytes] = []
    at = tokens = 0
    is_added = False
    for part in parts:
        end = at + len(part)
        while len(places) < len(borders) and borders[len(places)] < end:
            inside = borders[len(places)] - at
            if inside <= 0:
                places.append((tokens, tokens))
            elif is_added:
                places.append((tokens, tokens + 1))
            else:
                if mark:
                    inside -= part.count(mark, 0, inside)
                before, after = pieces.tokens_around(part.replace(mark, ""), inside)
                places.append((tokens + before, tokens + after))
        if is_added:
            ids = pieces.added_bytes[part]
        else:
            ids = pieces.encode_piece(part.replace(mark, "") if mark else part) if part else b""
        out.append(ids)
        tokens += len(ids) >> 2
        at = end
        is_added = not is_added
    places += [(tokens, tokens)] * (len(borders) - len(places))
    ids_T = np.frombuffer(b"".join(out), dtype=np.int32)
    mask_T = np.zeros(len(ids_T), dtype=bool)
    for start, stop in zip(places[::2], places[1::2], strict=True):
        mask_T[start[1] : stop[0]] = True
    return ids_T, mask_T


def _encode_around_marks(
    tokenizer: Tokenizer, text: str, spans: Sequence[tuple[int, int]], mark: str
) -> tuple[np.ndarray, np.ndarray]:
    """Each stretch between marks by itself: the two halves of a typed token never meet."""
    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    at = 0
    for part in text.split(mark):
        end = at + len(part)
        own = [(max(s, at) - at, min(e, end) - at) for s, e in spans if s < end and e > at]
        if part:
            part_ids, part_mask = encode_with_mask(tokenizer, part, own)
            ids.append(part_ids)
            masks.append(part_mask)
        at = end + len(mark)
    return np.concatenate(ids), np.concatenate(masks)


def _mask_from_offsets(
    offsets: Sequence[tuple[int, int]],
    spans: Sequence[tuple[int, int]],
    text: str,
    added: Collection[str],
) -> np.ndarray:
    """(T,) bool.

    NOTE: a tokenizer that trims offsets leaves white space to nobody: a token truly starts where
    the one before it ends, and a token of white space alone has no width. An added token may take
    the white space beside it (Phi-3's end of turn takes the newline after it): it is what it spells.
    """

    def spelt_inside(i: int, start: int, end: int) -> bool:
        """Whether token i is an added one that lies in the span but for white space that it took."""
        token = text[slice(*offsets[i])].strip()
        at = text.find(token, offsets[i][0])
        return token in added and start <= at and at + len(token) <= end

    mask = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        first = bisect_left(offsets, start, key=lambda offset: offset[0])
        last = bisect_left(offsets, end, lo=first, key=lambda offset: offset[0])
        while first < last and offsets[first][1] <= start:
            first += 1
        if first and spelt_inside(first - 1, start, end):
            first -= 1
        elif 0 < first < last and offsets[first - 1][1] < start:
            first += 0 if spelt_inside(first, start, end) else 1
        while (
            last > first and offsets[last - 1][1] > end and not spelt_inside(last - 1, start, end)
        ):
            last -= 1
        mask[first:last] = True
    return mask


def _encode_divided(
    encode: Callable[[str], list[int]], text: str, spans: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    ids: list[int] = []
    mask: list[bool] = []
    at = 0
    for start, end in (*spans, (len(text), len(text))):
        for piece, inside in ((text[at:start], False), (text[start:end], True)):
            piece_ids = encode(piece) if piece else []
            ids += piece_ids
            mask += [inside] * len(piece_ids)
        at = end
    if ids != encode(text):
        raise DataError(
            "messages: this tokenizer gives no offsets and merges across the border of a turn; "
            "use a fast (tokenizer.json) tokenizer"
        )
    return np.asarray(ids, dtype=np.int32), np.asarray(mask, dtype=bool)
