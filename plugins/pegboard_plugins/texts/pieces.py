"""Encode text piece by piece: cut at added tokens, split into words, each word encoded once.

A byte-level BPE never merges across an added token, nor across the words of its own split pattern.
So ids of a text are those of its words in a row, and a word's ids can be kept. The words are found
by `regex` with the tokenizer's own pattern, and in ASCII text by `re`, more than twice as fast. Each
character is compared with the tokenizer before it is trusted, every 512th piece is encoded both
ways, and any difference turns the words off.
Where a tokenizer is of another build there is no PieceEncoder, and texts are encoded whole.
"""

from __future__ import annotations

import json
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

__all__ = ["PieceEncoder"]

_ID = np.dtype(np.int32)
_MAX_WORDS = 200_000
_MAX_WORD_LENGTH = 40
_MAX_SHORT_PIECES = 4096
_MAX_SHORT_LENGTH = 40
_MAX_RECENT = 256
_MAX_RECENT_LENGTH = 1 << 16
_CHECK_FIRST = 64
_CHECK_EVERY = 512

# What a character may stand beside: enough to tell letters, numbers, space, line ends and the rest.
_CONTEXTS = (
    "{0}",
    "a{0}a",
    "1{0}1",
    " {0} ",
    " {0}a",
    ".{0}.",
    "{0}{0}",
    "\n{0}\n",
    "'{0}",
    "'{0}e",
)


class _Finder(Protocol):
    """A compiled pattern without groups."""

    def findall(self, text: str, /) -> list[str]: ...

    def finditer(self, text: str, /) -> Iterator[Any]: ...


class PieceEncoder:
    """Ids of pieces of text as raw int32 bytes; make one with `PieceEncoder.of`.

    Attributes:
        added: spelling -> id of every added token.
        added_bytes: the same, as raw int32 bytes.
    """

    def __init__(self, rust: RustTokenizer, added: Mapping[str, int]) -> None:
        from tokenizers import Tokenizer as RustTokenizer
        from tokenizers import pre_tokenizers

        self.added = dict(added)
        # Made of the same model, which is shared, not copied.
        self._plain = RustTokenizer(rust.model)
        if rust.normalizer is not None:
            self._plain.normalizer = rust.normalizer
        self._plain.pre_tokenizer = rust.pre_tokenizer
        self._one_word = RustTokenizer(rust.model)
        self._one_word.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=False
        )
        self._normalizes = rust.normalizer is not None
        self.added_bytes = {token: _to_bytes([i]) for token, i in added.items()}
        longest_first = sorted(added, key=len, reverse=True)
        self._split: Callable[[str], list[str]] | None = None
        if added:
            self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})").split
        self._words: dict[str, bytes] = {}
        self._short: dict[str, bytes] = {}
        # The turns of one chat are rendered again for each of its samples.
        self._recent: dict[str, bytes] = {}
        self._pieces_seen = 0
        self._safe: set[str] = set()
        self._unsafe: set[str] = set()
        pattern = _word_pattern(rust)
        self._find = _finder(pattern)
        self._find_ascii = _ascii_finder(pattern) or self._find
        if self._find is not None and not self._trusts("".join(map(chr, range(128)))):
            self._find = self._find_ascii = None

    @classmethod
    def of(cls, rust: RustTokenizer) -> PieceEncoder | None:
        """An encoder with the ids of `rust`, or None if cutting its text could change ids."""
        decoder = rust.get_added_tokens_decoder()
        for token in decoder.values():
            if token.lstrip or token.rstrip or token.single_word or token.normalized:
                return None
        if type(rust.model).__name__ != "BPE" or rust.model.dropout:
            return None
        if rust.normalizer is not None and type(rust.normalizer).__name__ != "NFC":
            return None
        steps = _pre_tokenizer_steps(rust)
        if not steps or steps[-1] != _BYTE_LEVEL or any(s["type"] != "Split" for s in steps[:-1]):
            return None
        added = {token.content: i for i, token in decoder.items() if token.content}
        return cls(rust, added)

    @property
    def uses_words(self) -> bool:
        """Whether words are found and kept (False: each piece goes to the tokenizer)."""
        return self._find is not None

    def encode(self, text: str, mark: str = "") -> bytes:
        """Ids of a text, added tokens read as such; `mark` is taken out of what lies between."""
        if self._split is None:
            return self.encode_piece(text.replace(mark, "") if mark else text)
        out = []
        added, short = self.added_bytes, self._short
        is_added = False
        for part in self._split(text):
            if is_added:
                out.append(added[part])
            elif part:
                ids = short.get(part)
                if ids is None:
                    if mark and mark in part:
                        part = part.replace(mark, "")
                    ids = self.encode_piece(part)
                out.append(ids)
            is_added = not is_added
        return b"".join(out)

    def split(self, text: str) -> list[str]:
        """Text between added tokens and added tokens, in turns; the first and last may be empty."""
        return [text] if self._split is None else self._split(text)

    def encode_piece(self, piece: str) -> bytes:
        """Ids of a text without added tokens: the spelling of one is read as text."""
        is_short = len(piece) <= _MAX_SHORT_LENGTH
        ids = (self._short if is_short else self._recent).get(piece)
        if ids is not None:
            return ids
        finder = self._finder_for(piece)
        if finder is None:
            return _to_bytes(self._plain.encode(piece, add_special_tokens=False).ids)
        words = finder.findall(piece)
        known = self._words
        try:
            ids = b"".join([known[word] for word in words])
        except KeyError:
            ids = self._encode_new(words)
        self._pieces_seen += 1
        if self._pieces_seen <= _CHECK_FIRST or self._pieces_seen % _CHECK_EVERY == 0:
            ids = self._checked(piece, ids)
        if is_short:
            if len(self._short) < _MAX_SHORT_PIECES:
                self._short[piece] = ids
        elif len(piece) <= _MAX_RECENT_LENGTH:
            if len(self._recent) >= _MAX_RECENT:
                self._recent.clear()
            self._recent[piece] = ids
        return ids

    def tokens_around(self, piece: str, place: int) -> tuple[int, int]:
        """(tokens that end at or before character `place` of the piece, index of the first one
        that starts at or after it)."""
        finder = self._finder_for(piece)
        encoder = self._plain if finder is None else self._one_word
        # One after the other: a border is nearly always near the start of its piece.
        words = iter([piece]) if finder is None else (m[0] for m in finder.finditer(piece))
        start = tokens = 0
        for word in words:
            if start >= place:
                break
            known = self._words.get(word)
            if known is not None and start + len(word) <= place:
                start += len(word)
                tokens += len(known) // _ID.itemsize
                continue
            encoding = encoder.encode(word, add_special_tokens=False)
            if start + len(word) > place:
                # The tokens of one character share its offsets.
                inside = place - start
                ended = sum(end <= inside for _, end in encoding.offsets)
                begun = sum(first < inside for first, _ in encoding.offsets)
                return tokens + ended, tokens + begun
            start += len(word)
            tokens += len(encoding.ids)
        return tokens, tokens

    def _finder_for(self, piece: str) -> _Finder | None:
        """What finds the piece's words; None if they can't be told here."""
        if piece.isascii():
            return self._find_ascii
        return self._find if self._find is not None and self._readable(piece) else None

    def _encode_new(self, words: Sequence[str]) -> bytes:
        known = self._words
        new = [word for word in dict.fromkeys(words) if word not in known]
        encode = self._one_word.encode
        found = {word: _to_bytes(encode(word, add_special_tokens=False).ids) for word in new}
        if len(known) < _MAX_WORDS:
            known.update((w, ids) for w, ids in found.items() if len(w) <= _MAX_WORD_LENGTH)
        return b"".join([found[word] if word in found else known[word] for word in words])

    def _checked(self, piece: str, ids: bytes) -> bytes:
        """The tokenizer's own ids; if `ids` are others, words are not used again."""
        expected = _to_bytes(self._plain.encode(piece, add_special_tokens=False).ids)
        if ids != expected:
            self._give_up()
        return expected

    def _give_up(self) -> None:
        from loguru import logger

        logger.warning(
            "the tokenizer's words were found differently than it finds them; going on without"
        )
        self._find = self._find_ascii = None
        self._words.clear()
        self._short.clear()
        self._recent.clear()

    def _readable(self, piece: str) -> bool:
        """Whether the piece may be split into words here: every character trusted, and in the
        tokenizer's normal form already."""
        unknown = set(piece) - self._safe
        if unknown and (unknown & self._unsafe or not self._trusts("".join(unknown))):
            return False
        return not self._normalizes or unicodedata.is_normalized("NFC", piece)

    def _trusts(self, characters: str) -> bool:
        """Compare the words around each character with the tokenizer's own; True if all agree."""
        finders = [find for find in (self._find, self._find_ascii) if find is not None]
        all_agree = True
        split = self._plain.pre_tokenizer.pre_tokenize_str
        for character in characters:
            # Unassigned here: the tokenizer's tables may be newer, and its normal form another.
            agrees = unicodedata.category(character) not in ("Cn", "Cs")
            for context in _CONTEXTS if agrees else ():
                probe = context.format(character)
                own = [probe[start:end] for _, (start, end) in split(probe)]
                used = finders if character.isascii() else finders[:1]
                if any(find.findall(probe) != own for find in used):
                    agrees = False
                    break
            (self._safe if agrees else self._unsafe).add(character)
            all_agree = all_agree and agrees
        return all_agree

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a PieceEncoder is made anew from its tokenizer, not pickled")


_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def _pre_tokenizer_steps(rust: RustTokenizer) -> list[dict[str, Any]]:
    if rust.pre_tokenizer is None:
        return []
    state = json.loads(rust.pre_tokenizer.__getstate__())
    steps = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    for step in steps:
        step.pop("trim_offsets", None)
    return list(steps)


def _word_pattern(rust: RustTokenizer) -> str | None:
    """The pattern whose matches are the words; None if `rust` splits in another way."""
    steps = _pre_tokenizer_steps(rust)
    if len(steps) != 2:
        return None
    split = steps[0]
    if split["behavior"] != "Isolated" or split["invert"]:
        return None
    pattern = split["pattern"].get("Regex")
    return pattern if isinstance(pattern, str) else None


def _finder(pattern: str | None) -> _Finder | None:
    if pattern is None:
        return None
    import regex

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what means something else to Python only warns
            compiled = regex.compile(pattern)
    except (regex.error, Warning):
        return None
    return compiled if compiled.groups == 0 else None


def _ascii_finder(pattern: str | None) -> _Finder | None:
    """The same with classes of ASCII characters, for `re`; None if the pattern has others."""
    classes = {r"\p{L}": "A-Za-z", r"\p{N}": "0-9"}
    inside = False
    translated = ""
    for token in re.findall(r"\\p\{\w+\}|\\.|.", pattern or "", re.DOTALL):
        if token.startswith(r"\p") or token in (r"\P", r"\X"):
            if token not in classes:
                return None
            token = classes[token] if inside else f"[{classes[token]}]"
        elif token in "[]":
            inside = token == "["
        translated += token
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compiled = re.compile(translated, re.ASCII)
    except (re.error, Warning):
        return None
    return compiled if translated and compiled.groups == 0 else None


def _to_bytes(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, dtype=_ID).tobytes()
