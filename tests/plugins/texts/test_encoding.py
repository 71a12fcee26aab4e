"""Ids are those of the undivided text; the mask holds only tokens that lie wholly inside a span."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from pegboard.errors import DataError
from pegboard_plugins.texts.encoding import encode_with_mask, runs_of
from pegboard_plugins.tokenizers.component import ByteTokenizer


class Words:
    """Splits before each space, so that ` b` is one token, with its offsets trimmed or not."""

    def __init__(self, trim: bool) -> None:
        self.trim = trim

    def encode_with_offsets(self, text: Any) -> Any:
        rust = Tokenizer(models.WordLevel({"a": 0, " b": 1, "[UNK]": 2}, unk_token="[UNK]"))
        rust.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
        encoding = rust.encode(text)
        trimmed = [(s + (text[s] == " "), e) for s, e in encoding.offsets]
        return encoding.ids, trimmed if self.trim else encoding.offsets


class Pairs:
    """No offsets; two letters make a token."""

    def encode(self, text: Any, *, special_tokens: Any = True) -> Any:
        return [ord(text[i]) for i in range(0, len(text), 2)]


def words(trim: bool) -> Any:
    return Words(trim)


def pairs() -> Any:
    return Pairs()


def test_arrays_have_the_types_of_an_example() -> None:
    tokenizer = ByteTokenizer(ByteTokenizer.Config()).build()
    ids, mask = encode_with_mask(tokenizer, "abc", [(1, 2)])
    assert ids.dtype == np.int32 and mask.dtype == bool
    assert ids.tolist() == [97, 98, 99] and mask.tolist() == [False, True, False]


def test_every_token_of_a_character_is_inside() -> None:
    tokenizer = ByteTokenizer(ByteTokenizer.Config()).build()
    text = "\u4e2d\U0001f600\u00e9<|im_end|>x"
    ids, mask = encode_with_mask(tokenizer, text, [(1, 13)])
    assert tokenizer.decode(ids[mask]) == text[1:13]
    assert mask.tolist() == [False] * 3 + [True] * 7 + [False]


@pytest.mark.parametrize("trim", [False, True])
def test_a_token_across_the_border_gets_no_loss(trim: Any) -> None:
    _, inside = encode_with_mask(words(trim), "a b b", [(1, 5)])
    assert inside.tolist() == [False, True, True]
    _, across = encode_with_mask(words(trim), "a b b", [(2, 5)])
    assert across.tolist() == [False, False, True]
    _, tail = encode_with_mask(words(trim), "a b b", [(1, 4)])
    assert tail.tolist() == [False, True, False]


def test_without_offsets_a_cut_that_changes_ids_is_an_error() -> None:
    ids, mask = encode_with_mask(pairs(), "abcdef", [(2, 4)])
    assert len(ids) == 3 and mask.tolist() == [False, True, False]
    with pytest.raises(DataError, match="no offsets"):
        encode_with_mask(pairs(), "abcdef", [(3, 4)])


def test_runs_of_a_mask_are_its_stretches_of_true() -> None:
    draw = np.random.default_rng(0)
    masks = [np.zeros(0, bool), np.ones(5, bool), np.zeros(5, bool)]
    masks += [draw.random(int(draw.integers(1, 40))) < 0.6 for _ in range(200)]
    for mask in (*masks, *(mask[::2] for mask in masks)):
        runs = runs_of(mask)
        rebuilt = np.zeros(len(mask), dtype=bool)
        for start, end in runs:
            assert start < end
            rebuilt[start:end] = True
        assert (rebuilt == mask).all()
        assert all(end < start for (_, end), (start, _) in itertools.pairwise(runs))
