"""A text record -> ids with an end token; a text that is too long is cut, and counted."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pegboard.contracts import Example, RecordText
from pegboard.errors import ConfigError, DroppedSample
from pegboard_plugins.records.formats import PlainTextFormat
from pegboard_plugins.texts.encoding import encode_plain_text, encode_with_mask

if TYPE_CHECKING:
    from pegboard.contracts import Tokenizer
    from pegboard_plugins.chat.component import TextTokenizeFn

__all__ = ["ENCODER_VERSION", "TextTokenizer", "encode_record_text"]

ENCODER_VERSION = 3
"""Raised whenever the ids or the mask of some record change."""


class TextTokenizer:
    """Built TextTokenizeFn; see `pegboard.contracts.TokenizeFn`. Counts `truncated`."""

    def __init__(self, config: TextTokenizeFn.Config, tokenizer: Tokenizer) -> None:
        if not tokenizer.eos_token_ids:
            raise ConfigError("tokenizer: it has no end token to put after a text")
        self.max_length = config.max_length
        self._config = config
        self._tokenizer = tokenizer
        form = PlainTextFormat(PlainTextFormat.Config(text=config.text_field))
        self._format = form.build()
        self._counts: Counter[str] = Counter()

    def __call__(self, record: Mapping[str, Any]) -> Sequence[Example]:
        content = self._format.read(record)
        assert isinstance(content, RecordText)
        typed_as_text = self._config.typed_special_tokens == "text"
        ids, mask = encode_record_text(self._tokenizer, content.pieces, typed_as_text)
        if len(ids) > self.max_length:
            ids, mask = ids[: self.max_length].copy(), mask[: self.max_length].copy()
            self._counts["truncated"] += 1
        if not mask.any():
            raise DroppedSample("no supervised token")
        return [Example(input_ids=ids, loss_mask=mask)]

    def take_counts(self) -> Mapping[str, int]:
        counts = dict(self._counts)
        self._counts.clear()
        return counts

    def fingerprint(self) -> str:
        config = self._config.model_dump(mode="json")
        state = [ENCODER_VERSION, config, self._tokenizer.fingerprint()]
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def encode_record_text(
    tokenizer: Tokenizer, pieces: Sequence[tuple[str, bool]], typed_as_text: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a plain text and the tokenizer's first end token, with loss on the pieces that ask
    for it and on the end after such a piece, but never on the first token.

    Args:
        pieces: (text, whether it gets loss), joined as they are.
        typed_as_text: the spelling of a special token is text.

    Returns:
        ids (T,) int32 and mask (T,) bool; both empty for an empty text.
    """
    text = "".join(piece for piece, _ in pieces)
    if not text:
        return np.empty(0, dtype=np.int32), np.empty(0, dtype=bool)
    if typed_as_text and all(trained for _, trained in pieces):
        ids = encode_plain_text(tokenizer, text)
        mask = np.ones(len(ids), dtype=bool)
    else:
        spans, at = [], 0
        for piece, trained in pieces:
            if trained:
                spans.append((at, at + len(piece)))
            at += len(piece)
        ids, mask = encode_with_mask(tokenizer, text, spans, plain=typed_as_text)
    mask = np.append(mask, pieces[-1][1])
    mask[0] = False
    return np.append(ids, np.int32(tokenizer.eos_token_ids[0])), mask
