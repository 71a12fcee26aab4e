"""Encode a text whole and tell which tokens lie inside given character spans.

Whole, because ids must equal those of the undivided text: cutting at a span's border may merge
differently. A token that straddles a border gets no loss: it holds characters of the prompt,
which the model never emits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pegboard.errors import DataError

if TYPE_CHECKING:
    from pegboard.contracts import Tokenizer

__all__ = ["OffsetTokenizer", "encode_with_mask"]


class OffsetTokenizer(Protocol):
    """A tokenizer that also knows where its tokens lie."""

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each the (start, end) of its characters in `text`, in order."""
        ...


def encode_with_mask(
    tokenizer: Tokenizer, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Encode `text`; mark the tokens whose characters lie wholly inside one of `spans`.

    Args:
        spans: (start, end) in characters, in order, not overlapping.

    Returns:
        ids (T,) int32 and mask (T,) bool.

    Raises:
        DataError: the tokenizer gives no offsets, and cutting at the spans would change the ids.
    """
    # Not isinstance: a check of a runtime protocol costs more than a short text's encoding.
    encode: Callable[[str], tuple[list[int], list[tuple[int, int]]]] | None
    encode = getattr(tokenizer, "encode_with_offsets", None)
    if encode is not None:
        ids, offsets = encode(text)
        return np.asarray(ids, dtype=np.int32), _mask_from_offsets(offsets, spans)
    return _encode_in_pieces(tokenizer, text, spans)


def _mask_from_offsets(
    offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> np.ndarray:
    """(T,) bool.

    NOTE: a tokenizer that trims offsets leaves white space to nobody: a token truly starts where
    the one before it ends, and a token of white space alone has no width.
    """
    mask = np.zeros(len(offsets), dtype=bool)
    for start, end in spans:
        first = bisect_left(offsets, start, key=lambda offset: offset[0])
        last = bisect_left(offsets, end, lo=first, key=lambda offset: offset[0])
        while first < last and offsets[first][1] <= start:
            first += 1
        if 0 < first < last and offsets[first - 1][1] < start:
            first += 1
        while last > first and offsets[last - 1][1] > end:
            last -= 1
        mask[first:last] = True
    return mask


def _encode_in_pieces(
    tokenizer: Tokenizer, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    ids: list[int] = []
    mask: list[bool] = []
    at = 0
    for start, end in (*spans, (len(text), len(text))):
        for piece, inside in ((text[at:start], False), (text[start:end], True)):
            piece_ids = tokenizer.encode(piece) if piece else []
            ids += piece_ids
            mask += [inside] * len(piece_ids)
        at = end
    if ids != tokenizer.encode(text):
        raise DataError(
            "messages: this tokenizer gives no offsets and merges across the border of a turn; "
            "use a fast (tokenizer.json) tokenizer"
        )
    return np.asarray(ids, dtype=np.int32), np.asarray(mask, dtype=bool)
