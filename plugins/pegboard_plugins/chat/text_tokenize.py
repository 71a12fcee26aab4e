"""A text record -> ids with an end token; a text that is too long is cut, and counted."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pegboard.contracts import Example
from pegboard.errors import ConfigError, DataError, DroppedSample

if TYPE_CHECKING:
    from pegboard.contracts import Tokenizer
    from pegboard_plugins.chat.component import TextTokenizeFn

__all__ = ["ENCODER_VERSION", "TextTokenizer"]

ENCODER_VERSION = 1
"""Raised whenever the ids or the mask of some record change."""


class TextTokenizer:
    """Built TextTokenizeFn; see `pegboard.contracts.TokenizeFn`. Counts `truncated`.

    The end token is the first of the tokenizer's `eos_token_ids`. A special token spelt in the text
    is read as that token.
    """

    def __init__(self, config: TextTokenizeFn.Config, tokenizer: Tokenizer) -> None:
        if not tokenizer.eos_token_ids:
            raise ConfigError("tokenizer: it has no end token to put after a text")
        self.max_length = config.max_length
        self._config = config
        self._tokenizer = tokenizer
        self._counts: Counter[str] = Counter()

    def __call__(self, record: Mapping[str, Any]) -> Sequence[Example]:
        name = self._config.text_field
        text = record.get(name) if isinstance(record, Mapping) else None
        if not isinstance(text, str):
            raise DataError(f"{name}: expected a string, found {_found(record, name)}")
        ids = [*self._tokenizer.encode(text), self._tokenizer.eos_token_ids[0]]
        if len(ids) > self.max_length:
            del ids[self.max_length :]
            self._counts["truncated"] += 1
        if not text or len(ids) < 2:
            raise DroppedSample("no supervised token")
        mask = np.ones(len(ids), dtype=bool)
        mask[0] = False
        return [Example(input_ids=np.asarray(ids, dtype=np.int32), loss_mask=mask)]

    def take_counts(self) -> Mapping[str, int]:
        counts = dict(self._counts)
        self._counts.clear()
        return counts

    def fingerprint(self) -> str:
        config = self._config.model_dump(mode="json")
        state = [ENCODER_VERSION, config, self._tokenizer.fingerprint()]
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _found(record: Any, name: str) -> str:
    if not isinstance(record, Mapping):
        return "a record that is no object"
    if name not in record:
        return f"no such key (keys: {', '.join(repr(key) for key in list(record)[:8])})"
    return f"a {type(record[name]).__name__}"
