"""The chat behind a sample: whose each token is, and how each turn compares with inference.

Both come from the record, as a tokenize function that has `renderer` and `read_messages(record)`
reads it, and the chat template. Where it makes several samples of a record, a turn that trains in
another one is history in this one, and is not called untrained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pegboard import DataError

from .contents import Segment, Turn
from .inference import compare_turns
from .records import RecordFinder
from .roles import TextSpan, find_roles

if TYPE_CHECKING:
    from pegboard.component import ModelComponent
    from pegboard.contracts import SampleKey, Tokenizer
    from pegboard.data_loading import DataSource
    from pegboard.run_config import DatasetEntry
    from pegboard_plugins.texts.rendering import ChatRenderer

    from .pieces import PieceReader

__all__ = ["ChatReader"]


class _Chat(NamedTuple):
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None


class _Tokens(NamedTuple):
    """A span of a sample's text, in its tokens."""

    span: TextSpan
    start: int
    end: int
    trained: bool


class ChatReader:
    """Reads the chats behind the samples of one dataset, where there are any."""

    def __init__(
        self,
        entry: DatasetEntry,
        source: DataSource,
        tokenizer: Tokenizer,
        model: ModelComponent,
        pieces: PieceReader,
    ) -> None:
        self._store = source.store
        self._pieces = pieces
        self._stops = tuple(tokenizer.decode([token]) for token in tokenizer.eos_token_ids)
        tokenize: Any = entry.tokenize_fn.build(tokenizer, model)
        self._renderer: ChatRenderer | None = getattr(tokenize, "renderer", None)
        self._tokenize = tokenize
        if self._renderer is not None:
            self._records = RecordFinder(entry.dataset.build(entry.name))
        self._trained: dict[SampleKey, frozenset[int]] = {}

    def read(
        self, index: int, texts: Sequence[str], has_loss: np.ndarray, start: int = 0
    ) -> tuple[list[Segment], list[Turn]]:
        """Roles of a sample's tokens (counted from the first given), and its turns beside inference.

        Args:
            index: of the sample in the source's store.
            texts: of its tokens in the pack; all of them, or those from `start` on.
            has_loss: whether each of these is trained.
        """
        whole = [Segment("text", 0, len(texts))]
        chat = self._chat(index)
        if chat is None or self._renderer is None:
            return whole, []
        end = start + len(texts)
        is_part = (start, end) != (0, int(self._store.lengths[index]))
        if is_part:
            example = self._store[index]
            texts = [piece.text for piece in self._pieces.read(example.input_ids.tolist())]
            has_loss = example.loss_mask
        tokens = self._locate(chat, texts, has_loss)
        if not tokens:
            return whole, []
        clipped = ((t.span.role, max(t.start, start), min(t.end, end)) for t in tokens)
        segments = [Segment(role, a - start, b - start) for role, a, b in clipped if b > a]
        if is_part:
            return segments, []
        own = {t.span.message for t in tokens if t.trained}
        asked = {t.span.message for t in tokens if t.span.role == "assistant"}
        elsewhere = frozenset(self._trained_of_record(index, chat) if asked - own else ()) - own
        compared = [t for t in tokens if t.span.message not in elsewhere]
        turns = compare_turns(
            "".join(texts),
            [t.span for t in compared],
            [t.trained for t in compared],
            chat.messages,
            chat.tools,
            self._renderer,
            self._stops,
        )
        return segments, turns

    def _chat(self, index: int) -> _Chat | None:
        if self._renderer is None:
            return None
        record = self._records.find(self._store.key(index))
        if record is None:
            return None
        try:
            chat = self._tokenize.read_messages(record)
        except DataError:  # it was readable when it was tokenized
            return None
        return None if chat is None else _Chat(chat.messages, chat.tools)

    def _locate(self, chat: _Chat, texts: Sequence[str], has_loss: np.ndarray) -> list[_Tokens]:
        assert self._renderer is not None
        spans = find_roles("".join(texts), *chat, self._renderer, self._stops)
        if not spans:
            return []
        # Spans cover the text, and tokens cover it too: a token goes by where it ends.
        ends = np.cumsum([len(text) for text in texts])
        borders = np.searchsorted(ends, [span.end for span in spans], side="left") + 1
        borders[-1] = len(ends)
        starts = [0, *borders[:-1].tolist()]
        return [
            _Tokens(span, start, end, bool(has_loss[start:end].any()))
            for span, start, end in zip(spans, starts, borders.tolist(), strict=True)
        ]

    def _trained_of_record(self, index: int, chat: _Chat) -> frozenset[int]:
        """Messages that train in any of the samples that the record gave."""
        key = self._store.key(index)._replace(part=0)
        if key not in self._trained:
            first = index
            while first > 0 and self._store.key(first - 1)._replace(part=0) == key:
                first -= 1
            found: set[int] = set()
            while first < len(self._store) and self._store.key(first)._replace(part=0) == key:
                example = self._store[first]
                texts = [piece.text for piece in self._pieces.read(example.input_ids.tolist())]
                mask = example.loss_mask.copy()
                mask[:1] = False
                found |= {t.span.message for t in self._locate(chat, texts, mask) if t.trained}
                first += 1
            self._trained[key] = frozenset(found)
        return self._trained[key]
