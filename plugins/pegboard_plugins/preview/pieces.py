"""Ids -> what a person reads: the text of each token, and the bytes of divided characters.

A byte-level tokenizer may divide a character among tokens, none of which decodes alone. Such a
token is shown by its bytes, and the character at the token that completes it. What is a special
token is asked of the tokenizer itself: one whose spelling gives other ids when it is read as text.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from pegboard.contracts import Tokenizer

__all__ = ["Piece", "PieceKind", "PieceReader", "visible_character"]

PieceKind = Literal["text", "special", "bytes", "unknown"]

_REPLACEMENT = "\ufffd"
_LONGEST_GROUP = 8
"""Tokens without known bytes that are tried as one character."""


class Piece(NamedTuple):
    """One token, readable."""

    text: str
    """What it adds to the decoded text; of a divided character, all of it at its last token."""
    kind: PieceKind
    shown: str
    """What to print: `text`, the bytes in hex (`E4 BD`), or `#id` for an id that has no text."""


class PieceReader:
    """Reads ids with a tokenizer; keeps what it learnt of each id."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes: Callable[[int], bytes | None] | None
        self._bytes = getattr(tokenizer, "token_bytes", None)
        self._alone: dict[int, Piece] = {}
        anchor = tokenizer.encode("a")
        self._anchor = anchor[-1:]
        self._anchor_text = tokenizer.decode(self._anchor)

    def read(self, ids: Iterable[int]) -> list[Piece]:
        """One piece per id; joined, their texts are the decoded ids."""
        row = [int(i) for i in ids]
        pieces = [self._read_alone(i) for i in row]
        at = 0
        while at < len(row):
            if pieces[at].kind != "bytes":
                at += 1
                continue
            end = at
            while end < len(row) and pieces[end].kind == "bytes":
                end += 1
            pieces[at:end] = self._join(row[at:end], pieces[at:end])
            at = end
        return pieces

    def _read_alone(self, token: int) -> Piece:
        piece = self._alone.get(token)
        if piece is None:
            piece = self._alone[token] = self._learn(token)
        return piece

    def _learn(self, token: int) -> Piece:
        known = self._bytes(token) if self._bytes is not None else None
        if known is not None:
            try:
                return Piece(text := known.decode("utf-8"), "text", text)
            except UnicodeDecodeError:
                return Piece("", "bytes", known.hex(" ").upper())
        text = self._decode(token)
        if not text:
            return Piece("", "unknown", f"#{token}")
        if _REPLACEMENT in text:
            return Piece("", "bytes", "\u2026")
        if self._is_special(token, text):
            return Piece(text, "special", text)
        return Piece(text, "text", text)

    def _decode(self, token: int) -> str:
        # Some decoders trim the space of a text's first token, so it must not be the first.
        try:
            text = self._tokenizer.decode([*self._anchor, token])
        except (IndexError, KeyError, OverflowError, TypeError, ValueError):
            return ""  # an id past the vocabulary
        if text.startswith(self._anchor_text):
            return text[len(self._anchor_text) :]
        return self._tokenizer.decode([token])

    def _is_special(self, token: int, text: str) -> bool:
        if text.strip().isalnum() or not text.strip():
            return False
        if self._tokenizer.encode(text) != [token]:
            return False
        return self._tokenizer.encode(text, special_tokens=False) != [token]

    def _join(self, row: Sequence[int], pieces: Sequence[Piece]) -> list[Piece]:
        """A run of tokens that hold parts of characters: put each character at its last token."""
        if self._bytes is None:
            return self._join_by_trying(row, pieces)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        joined = []
        for at, (token, piece) in enumerate(zip(row, pieces, strict=True)):
            text = decoder.decode(self._bytes(token) or b"", final=at == len(row) - 1)
            joined.append(piece._replace(text=text))
        return joined

    def _join_by_trying(self, row: Sequence[int], pieces: Sequence[Piece]) -> list[Piece]:
        joined = list(pieces)
        at = 0
        while at < len(row):
            for end in range(at + 1, min(len(row), at + _LONGEST_GROUP) + 1):
                text = self._tokenizer.decode(row[at:end])
                if _REPLACEMENT not in text:
                    joined[end - 1] = joined[end - 1]._replace(text=text)
                    at = end
                    break
            else:
                joined[at] = joined[at]._replace(text=_REPLACEMENT)
                at += 1
        return joined


def visible_character(character: str) -> str | None:
    """A name for a character that would not show, or would change how others show; else None.

    Control characters, white space other than the plain space, newline and tab, zero-width and
    direction marks: `U+202E`.
    """
    code = ord(character)
    if character in " \n\t" or 0x21 <= code < 0x7F:
        return None
    if not character.isprintable():
        return f"U+{code:04X}"
    return None
