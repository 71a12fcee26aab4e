"""Pieces joined are the decoded ids, and every token can be read, divided characters included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pegboard_plugins.preview.pieces import PieceReader, visible_character
from pegboard_plugins.tokenizers.byte_tokenizer import make_byte_tokenizer

QWEN3 = Path(__file__).resolve().parents[4] / "shared" / "assets" / "qwen3_tokenizer"
TEXTS = (
    "plain words",
    "<|im_start|>user\na\t b  \n\n<|im_end|>\n",
    "caf\u00e9 \u4f60\u597d, \U0001f600\U0001f469\u200d\U0001f52c and \ud55c\uad6d\uc5b4",
    "\u202e\u0000\x1b[31m",
    "\ufffd stays what it is",
)


class WithoutBytes:
    """A tokenizer of the bare contract: bytes are not known."""

    def __init__(self, tokenizer: Any) -> None:
        self.encode = tokenizer.encode
        self.decode = tokenizer.decode


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("bare", [False, True])
def test_pieces_joined_are_the_decoded_text(text: str, bare: bool) -> None:
    tokenizer: Any = make_byte_tokenizer()
    ids = tokenizer.encode(text)
    read_with: Any = WithoutBytes(tokenizer) if bare else tokenizer
    reader = PieceReader(read_with)
    pieces = reader.read(ids)
    assert len(pieces) == len(ids)
    if not (bare and "\ufffd" in text):
        assert "".join(piece.text for piece in pieces) == text


def test_a_divided_character_shows_its_bytes_and_appears_at_its_last_token() -> None:
    tokenizer = make_byte_tokenizer()
    pieces = PieceReader(tokenizer).read(tokenizer.encode("\u4f60!"))
    assert [(piece.shown, piece.text, piece.kind) for piece in pieces] == [
        ("E4", "", "bytes"),
        ("BD", "", "bytes"),
        ("A0", "\u4f60", "bytes"),
        ("!", "!", "text"),
    ]


def test_a_character_cut_off_at_the_end_is_a_replacement_character() -> None:
    tokenizer = make_byte_tokenizer()
    ids = tokenizer.encode("a\u4f60")[:-1]
    pieces = PieceReader(tokenizer).read(ids)
    assert "".join(piece.text for piece in pieces) == "a\ufffd"


def test_special_tokens_are_told_from_their_spelling_typed_by_a_user() -> None:
    tokenizer = make_byte_tokenizer()
    special = tokenizer.encode("<|im_end|>")
    typed = tokenizer.encode("<|im_end|>", special_tokens=False)
    kinds = {piece.kind for piece in PieceReader(tokenizer).read(typed)}
    assert [piece.kind for piece in PieceReader(tokenizer).read(special)] == ["special"]
    assert kinds == {"text"}


def test_an_id_past_the_vocabulary_is_shown_by_its_number() -> None:
    pieces = PieceReader(make_byte_tokenizer()).read([104, 999_999])
    assert [(piece.shown, piece.kind) for piece in pieces] == [
        ("h", "text"),
        ("#999999", "unknown"),
    ]


@pytest.mark.parametrize("text", TEXTS)
def test_the_genuine_qwen3_tokenizer_reads_the_same(text: str) -> None:
    if not QWEN3.is_dir():
        pytest.skip("no shared assets")
    from pegboard_plugins.tokenizers.hf_tokenizer import load_hf_tokenizer

    tokenizer = load_hf_tokenizer(str(QWEN3))
    ids = tokenizer.encode(text)
    assert "".join(piece.text for piece in PieceReader(tokenizer).read(ids)) == text


def test_what_would_not_show_or_would_turn_a_line_around_gets_a_name() -> None:
    names = [visible_character(c) for c in "a \n\t\u202e\u200b\x1b\u00a0\u4f60"]
    assert names == [None, None, None, None, "U+202E", "U+200B", "U+001B", "U+00A0", None]
