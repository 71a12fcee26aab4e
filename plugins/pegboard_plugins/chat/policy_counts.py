"""What each history policy would train of the records, for the tables that compare them.

The policy that is used is counted exactly, as its samples are there. What another one would train has
to be encoded for the count alone; so only the first records of a span are, and of the rest a sample
that depends on nothing but their text. What such a record stands for is counted under `~name`.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pegboard_plugins.texts.chat_turns import Turn

__all__ = ["EncodedChain", "PolicyCounts"]

_FIRST = 32
"""Records of a span that are all counted; the smallest part of a token store has as many."""
_ONE_IN = 16
"""Of the others, one in so many is counted, and stands for so many."""


class EncodedChain(NamedTuple):
    """Turns whose prompts continue one another, in tokens."""

    ids_T: np.ndarray
    mask_T: np.ndarray
    turns: Sequence[Turn]
    runs: Sequence[tuple[int, int]]
    """(first token, one past the last) of each turn's answer."""


class PolicyCounts:
    """Adds to `counts` what policies would train, before anything is cut.

    Args:
        shown_turns: strip would train shown turns too.
    """

    def __init__(self, counts: Counter[str], *, shown_turns: bool) -> None:
        self._counts = counts
        self._kinds = {"exact", "shown"} if shown_turns else {"exact"}
        self._seen = 0

    def begin_span(self) -> None:
        """Count the next records whole again: what a span comes to depends on its records alone."""
        self._seen = 0

    def weight(self, text: str) -> int:
        """For how many records this one, the next of the span, stands; 0: it is left out.

        Args:
            text: the rendered chat.
        """
        self._seen += 1
        if self._seen <= _FIRST:
            return 1
        chosen = zlib.crc32(text.encode("utf-8", "surrogatepass")) % _ONE_IN == 0
        return _ONE_IN if chosen else 0

    def add(self, policy: str, tokens: int | None, supervised: int, weight: int = 1) -> None:
        """Count samples of one policy; where `weight` is not 1 they are an estimate, 0 included.

        Args:
            tokens: None where only rendering the policy's samples would tell.
        """
        # A count of 0 under `~name` says that something was left out of the other.
        name = f"{'' if weight == 1 else '~'}history {policy}"
        if tokens is not None:
            self._counts[f"{name}: tokens"] += tokens * weight
        self._counts[f"{name}: supervised tokens"] += supervised * weight

    def add_chains(
        self, chains: Sequence[EncodedChain], policies: Sequence[str], weight: int = 1
    ) -> None:
        """Count those of split, chain and keep that `policies` names, all of which train these turns."""
        generated = sum(end - start for chain in chains for start, end in chain.runs)
        tokens = {
            "split": sum(end for chain in chains for _, end in chain.runs),
            "chain": sum(len(chain.ids_T) for chain in chains),
            "keep": None,
        }
        for policy in policies:
            self.add(policy, tokens[policy], generated, weight)

    def shown(self, chains: Sequence[EncodedChain]) -> int:
        """Supervised tokens of strip."""
        return sum(
            end - start
            for chain in chains
            for turn, (start, end) in zip(chain.turns, chain.runs, strict=True)
            if turn.kind in self._kinds
        )

    def add_same(self, tokens: int, supervised: int) -> None:
        """A record without turns is the same under every policy."""
        for policy in ("strip", "split", "chain"):
            self.add(policy, tokens, supervised)
        self.add("keep", None, supervised)
