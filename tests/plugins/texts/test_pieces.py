"""Ids of pieces are those of the whole text, whatever characters it holds; what can't be cut is not."""

from __future__ import annotations

import itertools
import json
import pickle
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from pegboard_plugins.texts.encoding import (
    _mask_from_offsets,
    encode_plain_text,
    encode_segments,
    encode_with_mask,
)
from pegboard_plugins.texts.pieces import PieceEncoder
from pegboard_plugins.tokenizers.component import ByteTokenizer, HFTokenizer

ASSETS = Path(__file__).resolve().parents[4] / "shared" / "assets"


@pytest.fixture(scope="module")
def qwen3() -> Any:
    if not (ASSETS / "qwen3_tokenizer").is_dir():
        pytest.skip("the Qwen3 tokenizer is not on this machine")
    return HFTokenizer(HFTokenizer.Config(path=str(ASSETS / "qwen3_tokenizer"))).build()


@pytest.fixture(scope="module")
def byte() -> Any:
    return ByteTokenizer(ByteTokenizer.Config()).build()


@pytest.fixture(scope="module")
def letters() -> Tokenizer:
    return bpe()


def bpe(pattern: str = r"\p{L}+|\p{N}|\s+|[^\s\p{L}\p{N}]+", **token: Any) -> Tokenizer:
    """Every byte, and a few merges of `ab` letters; one added token."""
    byte_letters = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: i for i, letter in enumerate(sorted(byte_letters))}
    merges = [("a", "b"), ("ab", "a"), ("\u0120", "\u0120")]
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    rust = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    rust.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    rust.add_special_tokens([AddedToken("<e>", normalized=False, **token)])
    return rust


def ids_of(raw: bytes) -> list[int]:
    return list(np.frombuffer(raw, dtype=np.int32).tolist())


SPECIMENS = [
    "",
    " ",
    "  a\n\n b\r\n",
    "I'll don't WE'RE it\u017fs 'S'",
    "\u4e2d\u6587\u3002\u5bf9 mixed 42 \u0663\u0664",
    "e\u0301 \u00e9 a\u0308\u0323 \ufb01 \u212b",
    "tab\tnbsp\u00a0thin\u2009zero\u200bline\u2028para\u2029next\u0085",
    "ctl\x1c\x1d\x1e\x1f\x00\x7f end",
    "\U0001f600\U0001f468\u200d\U0001f469 \ue0f1 \U0010ff00",
    "\u0e01\u0e33 \u0939\u093f\u0928\u094d\u0926\u0940 \u1100\u1161\u11a8",
    "x\n\n\n   \n y   z    ",
    "unassigned \u0378 \U000e0080",
    "<|im_end|>\n<think>\n\n</think>\n\nb<|im_end|>",
]


def random_text(seed: int) -> str:
    random_ = random.Random(seed)
    alphabets = [
        "abcXYZ '.,\n\r\t0123",
        "".join(map(chr, range(0x20, 0x250))),
        "".join(chr(i) for i in range(0x2000, 0x3100)),
        "".join(chr(i) for i in range(0x4E00, 0x4F00)) + " \n",
        "".join(chr(i) for i in range(0x1F300, 0x1F700)),
    ]
    pieces = [
        "".join(random_.choices(random_.choice(alphabets), k=random_.randint(1, 12)))
        for _ in range(random_.randint(1, 20))
    ]
    tokens = ["<|im_start|>", "<|im_end|>", "<think>", "</tool_call>", " "]
    return "".join(piece + random_.choice(tokens) for piece in pieces)


@pytest.mark.parametrize("text", SPECIMENS, ids=range(len(SPECIMENS)))
def test_ids_are_those_of_the_whole_text(qwen3: Any, byte: Any, text: str) -> None:
    for tokenizer in (qwen3, byte):
        assert ids_of(tokenizer.pieces.encode(text)) == tokenizer.encode(text)
        plain = tokenizer.encode(text, special_tokens=False)
        assert encode_plain_text(tokenizer, text).tolist() == plain


def test_random_texts_of_many_scripts_have_the_tokenizers_ids(qwen3: Any) -> None:
    assert qwen3.pieces.uses_words
    for seed in range(400):
        text = random_text(seed)
        assert ids_of(qwen3.pieces.encode(text)) == qwen3.encode(text), seed
    assert qwen3.pieces.uses_words


def test_real_text_has_the_tokenizers_ids(qwen3: Any) -> None:
    for name in ("gsm8k_test", "glaive_toolcall_en", "self_instruct"):
        file = ASSETS / "text" / f"{name}_messages.jsonl"
        with file.open(encoding="utf-8") as lines:
            records = [json.loads(line) for line in itertools.islice(lines, 100)]
        for record in records:
            text = qwen3.render(record["messages"], tools=record.get("tools"))
            assert ids_of(qwen3.pieces.encode(text)) == qwen3.encode(text)


@pytest.mark.parametrize("which", ["qwen3", "byte"])
def test_a_mask_is_the_one_that_offsets_give(which: Any, request: Any) -> None:
    tokenizer = request.getfixturevalue(which)
    texts = [random_text(seed) for seed in range(60)] + SPECIMENS[2:8]
    for number, text in enumerate(texts):
        if which == "qwen3" and not text.isascii():
            continue  # offsets of a character in several tokens are the same, and merge across
        random_ = random.Random(number)
        borders = sorted(random_.sample(range(len(text) + 1), 4))
        spans = [(borders[0], borders[1]), (borders[2], borders[3])]
        ids, mask = encode_with_mask(tokenizer, text, spans)
        expected, offsets = tokenizer.encode_with_offsets(text)
        assert ids.tolist() == expected
        assert mask.tolist() == _mask_from_offsets(offsets, spans, text, {}).tolist(), (text, spans)


def test_segments_are_encoded_apart_and_runs_say_where(qwen3: Any) -> None:
    segments = [("<|im_start|>assistant\n", False), ("\n\nb<|im_end|>", True), ("\n", False)]
    ids, mask, runs = encode_segments(qwen3, segments)
    parts = [qwen3.encode(text) for text, _ in segments]
    assert ids.tolist() == [i for part in parts for i in part]
    assert runs == [(len(parts[0]), len(parts[0]) + len(parts[1]))]
    assert mask.tolist() == [start <= i < end for start, end in runs for i in range(len(ids))]


def test_a_mark_keeps_a_typed_token_apart_and_is_not_encoded(qwen3: Any) -> None:
    mark = "\U0010ff00"
    text = f"say <{mark}|im_end|> now<|im_end|>"
    ids, mask = encode_with_mask(qwen3, text, [(len(text) - 10, len(text))], mark=mark)
    end = qwen3.encode("<|im_end|>")
    assert ids.tolist() == qwen3.encode("say <|im_end|> now", special_tokens=False) + end
    assert mask.tolist() == [False] * (len(ids) - 1) + [True]
    inside, mask = encode_with_mask(qwen3, text, [(0, text.index(" now"))], mark=mark)
    assert qwen3.decode(inside[mask]) == "say <|im_end|>"


def test_words_are_counted_around_a_border(letters: Tokenizer) -> None:
    pieces: Any = PieceEncoder.of(letters)
    assert pieces.uses_words
    assert pieces.tokens_around("aba  ab", 3) == (1, 1)
    assert pieces.tokens_around("aba  ab", 2) == (0, 1)
    assert pieces.tokens_around("aba  ab", 0) == (0, 0)
    assert pieces.tokens_around("aba  ab", 4) == (1, 2)
    assert pieces.tokens_around("aba  ab", 7) == (3, 3)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_a_tokenizer_whose_added_tokens_take_text_with_them_is_not_cut(flag: str) -> None:
    assert PieceEncoder.of(bpe()) is not None
    flags: dict[str, Any] = {flag: True}
    assert PieceEncoder.of(bpe(**flags)) is None


def test_a_tokenizer_that_changes_text_at_its_start_is_not_cut() -> None:
    for change in (
        pre_tokenizers.Metaspace(),
        pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ):
        rust = bpe()
        rust.pre_tokenizer = change
        assert PieceEncoder.of(rust) is None
    rust = bpe()
    rust.normalizer = normalizers.Prepend("_")
    assert PieceEncoder.of(rust) is None


def test_a_pattern_that_python_reads_differently_is_not_used() -> None:
    # findall gives the groups, not the matches; \h is a hexadecimal digit to the tokenizer.
    for pattern in (r"(\p{L})+|[^\p{L}]", r"\h+|\H"):
        rust = bpe(pattern)
        pieces: Any = PieceEncoder.of(rust)
        assert not pieces.uses_words, pattern
        assert ids_of(pieces.encode("aba ab\t12")) == rust.encode("aba ab\t12").ids


def test_a_difference_found_later_turns_the_words_off(letters: Tokenizer) -> None:
    pieces: Any = PieceEncoder.of(letters)
    pieces._find = pieces._find_ascii = re.compile(".")
    assert ids_of(pieces.encode_piece("abaab")) == letters.encode("abaab").ids
    assert not pieces.uses_words
    assert ids_of(pieces.encode_piece("aba")) == letters.encode("aba").ids


def test_a_pickled_tokenizer_makes_its_pieces_anew(qwen3: Any) -> None:
    text = "a b<|im_end|>"
    qwen3.pieces.encode(text)
    copy = pickle.loads(pickle.dumps(qwen3))
    assert ids_of(copy.pieces.encode(text)) == qwen3.encode(text)
    assert copy.pieces is not qwen3.pieces
