"""Keep special tokens that a user typed apart from those that the template writes.

A document that quotes `<|im_end|>` must not end a turn. Before rendering, a private-use character is
put after the first character of each spelling found in the record's strings; the template's own
tokens stay whole. The encoder cuts the text at whole tokens only and leaves the mark out, so the
typed one is encoded as the text it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pegboard.errors import DataError

if TYPE_CHECKING:
    from pegboard.contracts import Tokenizer

__all__ = ["TypedTokens", "is_blank"]

_MARKS = tuple(chr(0x10FF00 + i) for i in range(8))
"""Private use, in no ordinary text; the first one that a record does not hold is taken."""


def is_blank(token: str) -> bool:
    """Whether an added token is white space, such as the line ends and runs of spaces of Gemma's
    tokenizer: it ends and controls nothing, and is ordinary text wherever it stands."""
    return not token.strip(" \t\r\n\u2581")


class TypedTokens:
    """Finds and marks spelt-out added tokens.

    In a message of role assistant only the tokens that are special are text when typed: `<think>`
    and `<tool_call>` are written there on purpose. In any other role, and in tools, all are, but for
    white space.

    Args:
        tokenizer: one with `added_tokens`, spelling -> whether it is special; nothing is ever marked
            for one without.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        added: Mapping[str, bool] = getattr(tokenizer, "added_tokens", {})
        # A token of one character can't be taken apart.
        tokens = [token for token in added if len(token) > 1 and not is_blank(token)]
        self._all = _Spellings(tokens)
        self._special = _Spellings(token for token in tokens if added[token])

    def mark(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None, str]:
        """The same messages and tools with typed tokens marked, and the mark; "" if there is none.

        Raises:
            DataError: the record holds every character that could be a mark.
        """
        # A message's own keys are no text of anybody's; those of what a call is given are.
        found = any(any(map(self._of(one).inside, one.values())) for one in messages)
        if not found and not (tools and self._all.inside(tools)):
            return messages, tools, ""
        taken = set(_characters((messages, tools)))
        mark = next((mark for mark in _MARKS if mark not in taken), None)
        if mark is None:
            raise DataError(
                "messages: they hold all the private-use characters U+10FF00 to U+10FF07, one of "
                "which has to keep the special tokens in them apart; remove one"
            )
        marked = [self._of(message).marked(message, mark) for message in messages]
        return marked, tools and self._all.marked(tools, mark), mark

    def _of(self, message: Mapping[str, Any]) -> _Spellings:
        return self._special if message.get("role") == "assistant" else self._all


class _Spellings:
    def __init__(self, tokens: Iterable[str]) -> None:
        longest_first = sorted(tokens, key=len, reverse=True)
        self._firsts = tuple({token[0] for token in longest_first})
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def inside(self, value: Any) -> bool:
        """Whether a string in the value, at any depth, holds one."""
        if isinstance(value, str):
            for first in self._firsts:  # far cheaper than the pattern, and nearly always enough
                if first in value:
                    return self._pattern.search(value) is not None
            return False
        if isinstance(value, Mapping):
            return any(map(self.inside, value)) or any(map(self.inside, value.values()))
        if isinstance(value, list | tuple):
            return any(map(self.inside, value))
        return False

    def marked(self, value: Any, mark: str) -> Any:
        if isinstance(value, str):
            return self._pattern.sub(lambda found: found[0][0] + mark + found[0][1:], value)
        if isinstance(value, Mapping):
            return {self.marked(k, mark): self.marked(v, mark) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.marked(item, mark) for item in value]
        return value


def _characters(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield from value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _characters(key)
            yield from _characters(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _characters(item)
