"""A chat record -> ids equal to the template's own, and a loss mask on what the model generates.

The chat is rendered once whole, and its turns are found by rendering the prompt of each; see
`pegboard_plugins.texts.chat_turns` for what each kind of turn is.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pegboard.contracts import Example
from pegboard.errors import ConfigError, DataError, DroppedSample
from pegboard_plugins.texts.chat_turns import Turn, find_turns
from pegboard_plugins.texts.encoding import encode_with_mask
from pegboard_plugins.texts.messages import ChatRecord, read_chat_record
from pegboard_plugins.texts.rendering import ChatRenderer

if TYPE_CHECKING:
    from pegboard.contracts import Tokenizer
    from pegboard_plugins.chat.component import ChatTokenizeFn

__all__ = ["RENDERER_VERSION", "ChatTokenizer"]

RENDERER_VERSION = 1
"""Raised whenever the ids or the mask of some record change."""

_PROBE = "pegboardprobe"


class ChatTokenizer:
    """Built ChatTokenizeFn; see `pegboard.contracts.TokenizeFn`.

    Counts: `truncated`; `turns exact`, `turns shown`, `turns rewritten`, `turns noprefix`,
    `turns noend`; `reasoning not rendered` and `tool calls not rendered`, where the template drops
    what the record holds.
    """

    def __init__(self, config: ChatTokenizeFn.Config, tokenizer: Tokenizer) -> None:
        if not tokenizer.eos_token_ids:
            raise ConfigError("tokenizer: no token that ends a turn, so no answer could ever end")
        self.max_length = config.max_length
        self._config = config
        self._tokenizer = tokenizer
        self._renderer = ChatRenderer(tokenizer, config.template_kwargs)
        self._stops = tuple(tokenizer.decode([i]) for i in tokenizer.eos_token_ids)
        answer: dict[str, Any] = {"role": "assistant", "content": "b"}
        thought = {**answer, "reasoning_content": _PROBE}
        call = {"type": "function", "function": {"name": _PROBE, "arguments": {}}}
        self._drops_reasoning = not self._renderer.renders(thought, _PROBE)
        self._drops_calls = not self._renderer.renders({**answer, "tool_calls": [call]}, _PROBE)
        self._counts: Counter[str] = Counter()

    def __call__(self, record: Mapping[str, Any] | Sequence[Any]) -> Sequence[Example]:
        chat = read_chat_record(record)
        chosen = [j for j, loss in enumerate(chat.loss) if loss]
        if self._config.train_on == "last":
            roles = [message["role"] for message in chat.messages]
            last = max(j for j, role in enumerate(roles) if role == "assistant")
            chosen = [j for j in chosen if j == last]
        self._count_dropped_fields(chat, chosen)
        text, turns = find_turns(self._renderer, chat.messages, chat.tools, chosen, self._stops)
        spans = [(turn.start, turn.end) for turn in turns if self._trains(turn)]
        if not spans:
            raise DroppedSample("no supervised token")
        ids, mask = encode_with_mask(self._tokenizer, text, spans)
        if len(ids) > self.max_length:
            ids, mask = ids[: self.max_length].copy(), mask[: self.max_length].copy()
            self._counts["truncated"] += 1
        # The first token of a sample has nothing before it to be predicted from.
        if not mask[1:].any():
            raise DroppedSample("no supervised token")
        return [Example(input_ids=ids, loss_mask=mask)]

    def take_counts(self) -> Mapping[str, int]:
        counts = dict(self._counts)
        self._counts.clear()
        return counts

    def fingerprint(self) -> str:
        config = self._config.model_dump(mode="json")
        state = [RENDERER_VERSION, config, self._tokenizer.fingerprint()]
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

    def _trains(self, turn: Turn) -> bool:
        """Count the turn; whether it gets loss under the config's policies."""
        self._counts[f"turns {turn.kind}"] += 1
        if turn.kind == "exact":
            return True
        if turn.kind == "shown":
            return self._config.shown_turns == "train"
        if self._config.rewritten_turns == "error":
            place = f"messages[{turn.message}]"
            raise DataError(f"{place}: {_WHY[turn.kind]}; rewritten_turns is 'error'")
        return False

    def _count_dropped_fields(self, chat: ChatRecord, chosen: Sequence[int]) -> None:
        for j in chosen:
            message = chat.messages[j]
            if self._drops_reasoning and message.get("reasoning_content"):
                self._counts["reasoning not rendered"] += 1
            if self._drops_calls and message.get("tool_calls"):
                self._counts["tool calls not rendered"] += 1


_WHY = {
    "rewritten": "the chat template changes this turn once others follow it",
    "noprefix": "the chat template does not render this turn after its own generation prompt",
    "noend": "the chat template writes no end token after this turn",
}
