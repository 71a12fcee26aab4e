"""A chat record -> examples with loss exactly on what the model generates.

The chat is rendered once whole, and its turns are found by rendering the prompt of each; see
`pegboard_plugins.texts.chat_turns` for what each kind of turn is, and
`pegboard_plugins.texts.history` for how samples are made of them. Plain texts and records that are
tokenized already come through the same door.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pegboard.contracts import Example, RecordChat, RecordText, RecordTokens
from pegboard.errors import ConfigError, DataError, DroppedSample
from pegboard_plugins.chat.policy_counts import EncodedChain, PolicyCounts
from pegboard_plugins.chat.text_tokenize import encode_record_text
from pegboard_plugins.texts.chat_turns import Turn, find_turns
from pegboard_plugins.texts.encoding import encode_segments, encode_with_mask, runs_of
from pegboard_plugins.texts.history import chain_turns, keep_turns
from pegboard_plugins.texts.messages import ChatRecord, read_chat
from pegboard_plugins.texts.rendering import ChatRenderer
from pegboard_plugins.texts.typed_tokens import TypedTokens

if TYPE_CHECKING:
    from pegboard.contracts import Tokenizer
    from pegboard_plugins.chat.component import ChatTokenizeFn

__all__ = ["RENDERER_VERSION", "ChatTokenizer"]

RENDERER_VERSION = 4
"""Raised whenever the ids or the mask of some record change."""

_PROBE = "pegboardprobe"
_PICTURE_KEYS = ("image", "images", "video", "videos")


class ChatTokenizer:
    """Built ChatTokenizeFn; see `pegboard.contracts.TokenizeFn`.

    Counts: `truncated`; `turns exact`, `turns shown`, `turns rewritten`, `turns noprefix`,
    `turns noend`; `turns prompted with enable_thinking=false`, or another argument that the template must be
    given at inference for the prompt that the turn was trained after; `records with pictures, which are not read`;
    `reasoning not rendered` and `tool calls not rendered`, where the template drops what the record holds; `records with typed special tokens`; `samples without loss`; and what
    each history policy would train, before anything is cut: `history strip: tokens`, `history
    strip: supervised tokens`, and so on (`keep` has no count of tokens: only rendering it tells;
    policies that aren't used are estimated after the first records, see `policy_counts`).
    """

    def __init__(self, config: ChatTokenizeFn.Config, tokenizer: Tokenizer) -> None:
        if not tokenizer.eos_token_ids:
            raise ConfigError("tokenizer: no token that ends a turn, so no answer could ever end")
        self.max_length = config.max_length
        self._config = config
        self._tokenizer = tokenizer
        self._format = config.record_format.build()
        self._renderer = ChatRenderer(tokenizer, config.template_kwargs)
        self._typed = TypedTokens(tokenizer) if config.typed_special_tokens == "text" else None
        self._locates = config.history == "strip" and config.shown_turns == "train"
        self._stops = tuple(tokenizer.decode([i]) for i in tokenizer.eos_token_ids)
        answer: dict[str, Any] = {"role": "assistant", "content": "b"}
        thought = {**answer, "reasoning_content": _PROBE}
        call = {"type": "function", "function": {"name": _PROBE, "arguments": {}}}
        self._drops_reasoning = not self._renderer.renders(thought, _PROBE)
        self._drops_calls = not self._renderer.renders({**answer, "tool_calls": [call]}, _PROBE)
        self._counts: Counter[str] = Counter()
        shown = config.shown_turns == "train"
        self._policies = PolicyCounts(self._counts, shown_turns=shown)

    def __call__(self, record: Mapping[str, Any] | Sequence[Any]) -> Sequence[Example]:
        content = self._format.read(record)
        if isinstance(record, Mapping) and any(record.get(key) for key in _PICTURE_KEYS):
            self._counts["records with pictures, which are not read"] += 1
        if isinstance(content, RecordChat):
            examples = self._read_chat(content)
        elif isinstance(content, RecordText):
            examples = [self._read_text(content)]
        else:
            examples = [self._read_tokens(content)]
        kept = []
        for example in examples:
            if len(example.input_ids) > self.max_length:
                example.input_ids = example.input_ids[: self.max_length].copy()
                example.loss_mask = example.loss_mask[: self.max_length].copy()
                self._counts["truncated"] += 1
            # The first token of a sample has nothing before it to be predicted from.
            if example.loss_mask[1:].any():
                kept.append(example)
        if not kept:
            raise DroppedSample("no supervised token")
        if len(kept) < len(examples):
            self._counts["samples without loss"] += len(examples) - len(kept)
        return kept

    def take_counts(self) -> Mapping[str, int]:
        counts = dict(self._counts)
        self._counts.clear()
        self._policies.begin_span()
        return counts

    def fingerprint(self) -> str:
        config = self._config.model_dump(mode="json")
        state = [RENDERER_VERSION, config, self._tokenizer.fingerprint()]
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

    @property
    def renderer(self) -> ChatRenderer:
        """How chats are written out; for tools that show a sample beside its record."""
        return self._renderer

    def read_messages(self, record: Any) -> ChatRecord | None:
        """A record's chat as its template reads it; None if it is none.

        Raises:
            DataError: it is broken.
        """
        content = self._format.read(record)
        if not isinstance(content, RecordChat):
            return None
        chat = read_chat(content.messages, content.tools)
        return chat._replace(messages=self._renderer.adapt(chat.messages))

    def _read_chat(self, content: RecordChat) -> list[Example]:
        chat = read_chat(content.messages, content.tools)
        chosen = [j for j, loss in enumerate(chat.loss) if loss]
        assistants = [j for j, one in enumerate(chat.messages) if one["role"] == "assistant"]
        if self._config.train_on == "last":
            chosen = [j for j in chosen if j == assistants[-1]]
        self._count_dropped_fields(chat, chosen)
        messages: Sequence[Mapping[str, Any]] = self._renderer.adapt(chat.messages)
        tools: Sequence[Mapping[str, Any]] | None = chat.tools
        mark = ""
        if self._typed is not None:
            messages, tools, mark = self._typed.mark(messages, tools)
            if mark:
                self._counts["records with typed special tokens"] += 1
        policy = self._config.history
        wanted = assistants if policy == "keep" else chosen
        full, turns = find_turns(
            self._renderer, messages, tools, wanted, self._stops, locate=self._locates
        )
        asked = frozenset(chosen)
        trained = [turn for turn in turns if turn.message in asked]
        for turn in trained:
            self._count_turn(turn)
        last = trained[-1] if trained else None
        whole = last is not None and last.kind == "exact" and last.message == len(messages) - 1
        end = full[last.end :] if last is not None and whole else ""
        if policy == "strip":
            return self._strip(full, trained, end, whole, mark)
        if policy == "keep":
            segments = keep_turns(self._renderer, messages, tools, turns, self._stops, asked)
            if end and segments:
                segments.append((end, False))
            ids_T, mask_T, _ = encode_segments(self._tokenizer, segments, mark=mark)
            self._policies.add("keep", None, int(mask_T.sum()))
            if weight := self._weight_of_others(full):
                chains = self._encode_chains(trained, end, mark)
                self._count_strip(full, chains, whole, mark, weight)
                self._policies.add_chains(chains, ("split", "chain"), weight)
            return [Example(input_ids=ids_T, loss_mask=mask_T)]
        chains = self._encode_chains(trained, end, mark)
        self._policies.add_chains(chains, ("split", "chain", "keep"))
        if whole:
            self._policies.add("strip", len(chains[-1].ids_T), self._policies.shown(chains))
        elif weight := self._weight_of_others(full, ("strip",)):
            self._count_strip(full, chains, whole, mark, weight)
        numbers = {j: n for n, j in enumerate(assistants)}
        if policy == "split":
            return [example for chain in chains for example in _split(chain, numbers)]
        return [
            Example(
                input_ids=chain.ids_T,
                loss_mask=chain.mask_T,
                part=numbers[chain.turns[0].message],
            )
            for chain in chains
        ]

    def _read_text(self, content: RecordText) -> Example:
        typed_as_text = self._config.typed_special_tokens == "text"
        ids_T, mask_T = encode_record_text(self._tokenizer, content.pieces, typed_as_text)
        self._policies.add_same(len(ids_T), int(mask_T.sum()))
        return Example(input_ids=ids_T, loss_mask=mask_T)

    def _read_tokens(self, content: RecordTokens) -> Example:
        ids_T, mask_T = content.input_ids, content.loss_mask.copy()
        if len(ids_T) and int(ids_T.max()) >= self._tokenizer.vocab_size:
            raise DataError(
                f"input_ids: {int(ids_T.max())} is no id of this tokenizer, which has "
                f"{self._tokenizer.vocab_size}; it was tokenized with another one"
            )
        mask_T[:1] = False
        self._policies.add_same(len(ids_T), int(mask_T.sum()))
        return Example(input_ids=ids_T, loss_mask=mask_T)

    def _strip(
        self, full: str, trained: Sequence[Turn], end: str, whole: bool, mark: str
    ) -> list[Example]:
        """The one render, with loss on the turns that it shows."""
        kinds = {"exact", "shown"} if self._locates else {"exact"}
        spans = [(turn.start, turn.end) for turn in trained if turn.kind in kinds]
        ids_T, mask_T = encode_with_mask(self._tokenizer, full, spans, mark=mark)
        runs = runs_of(mask_T)
        self._policies.add("strip", len(ids_T), sum(end - start for start, end in runs))
        others = ("split", "chain", "keep")
        if whole and all(turn.kind == "exact" for turn in trained):
            chain = EncodedChain(ids_T, mask_T, trained, runs)
            self._policies.add_chains([chain], others)
        elif weight := self._weight_of_others(full, others):
            chains = self._encode_chains(trained, end, mark)
            self._policies.add_chains(chains, others, weight)
        return [Example(input_ids=ids_T, loss_mask=mask_T)]

    def _encode_chains(self, trained: Sequence[Turn], end: str, mark: str) -> list[EncodedChain]:
        chains = []
        for chain in chain_turns(trained, end):
            ids_T, mask_T, runs = encode_segments(self._tokenizer, chain.segments, mark=mark)
            chains.append(EncodedChain(ids_T, mask_T, chain.turns, runs))
        return chains

    def _count_turn(self, turn: Turn) -> None:
        """Count the turn; refuse one that can't be trained if the config says so."""
        self._counts[f"turns {turn.kind}"] += 1
        if argument := self._renderer.argument_of(turn.prompt):
            self._counts[f"turns prompted with {argument}"] += 1
        if self._config.rewritten_turns == "error" and turn.kind not in ("exact", "shown"):
            if self._config.history == "strip" or not turn.generated:
                place = f"messages[{turn.message}]"
                raise DataError(f"{place}: {_WHY[turn.kind]}; rewritten_turns is 'error'")

    def _weight_of_others(
        self, full: str, policies: Sequence[str] = ("strip", "split", "chain")
    ) -> int:
        """For how many records this one stands where the other `policies` are counted; 0: none."""
        weight = self._policies.weight(full)
        if weight == 0:
            for policy in policies:
                self._policies.add(policy, None if policy == "keep" else 0, 0, weight)
        return weight

    def _count_strip(
        self, full: str, chains: Sequence[EncodedChain], whole: bool, mark: str, weight: int
    ) -> None:
        """Args: whole: the last chain, its end included, is the whole chat."""
        if whole:
            tokens = len(chains[-1].ids_T)
        else:
            tokens = len(encode_with_mask(self._tokenizer, full, (), mark=mark)[0])
        self._policies.add("strip", tokens, self._policies.shown(chains), weight)

    def _count_dropped_fields(self, chat: ChatRecord, chosen: Sequence[int]) -> None:
        if not (self._drops_reasoning or self._drops_calls):
            return
        for j in chosen:
            message = chat.messages[j]
            if self._drops_reasoning and message.get("reasoning_content"):
                self._counts["reasoning not rendered"] += 1
            if self._drops_calls and message.get("tool_calls"):
                self._counts["tool calls not rendered"] += 1


def _split(chain: EncodedChain, numbers: Mapping[int, int]) -> list[Example]:
    """One example for each turn: the chain up to its end, with loss on it alone."""
    examples = []
    for turn, (start, end) in zip(chain.turns, chain.runs, strict=True):
        mask_T = np.zeros(end, dtype=bool)
        mask_T[start:] = True
        part = numbers[turn.message]
        examples.append(Example(input_ids=chain.ids_T[:end], loss_mask=mask_T, part=part))
    return examples


_WHY = {
    "rewritten": "the chat template changes this turn once others follow it",
    "noprefix": "the chat template does not render this turn after its own generation prompt",
    "noend": "the chat template writes no end token after this turn",
}
