"""Plain text gets an end token and loss on every token but the first."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from pegboard.component import ComponentConfig, ModelComponent
from pegboard.errors import DataError, DroppedSample
from pegboard_plugins.chat.component import TextTokenizeFn
from pegboard_plugins.tokenizers.component import ByteTokenizer

MODEL = ModelComponent(ComponentConfig())  # a text tokenize fn asks nothing of the model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return ByteTokenizer(ByteTokenizer.Config()).build()


def built(tokenizer: Any, **fields: Any) -> Any:
    return TextTokenizeFn(TextTokenizeFn.Config(**fields)).build(tokenizer, MODEL)


def test_text_ends_with_the_end_token_and_trains_all_but_the_first(tokenizer: Any) -> None:
    fn = pickle.loads(pickle.dumps(built(tokenizer)))
    (example,) = fn({"text": "abc"})
    assert example.input_ids.tolist() == [97, 98, 99, tokenizer.eos_token_ids[0]]
    assert example.loss_mask.tolist() == [False, True, True, True]
    assert example.input_ids.dtype == np.int32 and example.loss_mask.dtype == bool


def test_a_longer_text_is_cut_and_counted(tokenizer: Any) -> None:
    fn = built(tokenizer, max_length=3)
    (example,) = fn({"text": "abcdef"})
    assert example.input_ids.tolist() == [97, 98, 99]
    assert fn.take_counts() == {"truncated": 1} and fn.take_counts() == {}


def test_the_field_is_named_by_the_config_and_must_hold_text(tokenizer: Any) -> None:
    fn = built(tokenizer, text_field="body")
    assert len(fn({"body": "ab"})[0].input_ids) == 3
    with pytest.raises(
        DataError, match=r"^body: expected a string, found no such key \(keys: 'text'\)"
    ):
        fn({"text": "ab"})
    with pytest.raises(DataError, match="^body: expected a string, found a int"):
        fn({"body": 3})
    assert fn.fingerprint() != built(tokenizer).fingerprint()


def test_an_empty_text_is_dropped(tokenizer: Any) -> None:
    with pytest.raises(DroppedSample, match="no supervised token"):
        built(tokenizer)({"text": ""})
