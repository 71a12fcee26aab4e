"""The packers whose packs follow from an order of the samples alone: next fit, cut, one each.

Each is array arithmetic on the running sum of the lengths.
"""

from __future__ import annotations

import numpy as np

from pegboard import PackPlan

from .lengths import check_lengths

__all__ = ["Alone", "Cut", "NextFit"]

_BLOCK_SAMPLES = 65_536


class NextFit:
    """A sample that does not fit starts the next pack.

    Args:
        shuffle: take samples in an order of the seed's; else in the order of the data.
    """

    def __init__(self, *, shuffle: bool) -> None:
        self.shuffle = shuffle

    def plan(self, lengths: np.ndarray, pack_max_length: int, seed: int) -> PackPlan:
        check_lengths(lengths, pack_max_length)
        order = _order(len(lengths), seed) if self.shuffle else np.arange(len(lengths))
        ends = np.concatenate([[0], np.cumsum(lengths[order], dtype=np.int64)])
        # For many places at once, where a pack that starts there ends; then only jump.
        offsets = [0]
        at = 0
        while at < len(order):
            first = at
            targets = ends[first : first + _BLOCK_SAMPLES] + pack_max_length
            jump = (np.searchsorted(ends, targets, side="right") - 1).tolist()
            while at - first < len(jump) and at < len(order):
                at = jump[at - first]
                offsets.append(at)
        return PackPlan(np.array(offsets, dtype=np.int64), order)


class Cut:
    """One stream of all samples, cut every `pack_max_length` tokens; the rest is kept."""

    cuts_samples = True

    def plan(self, lengths: np.ndarray, pack_max_length: int, seed: int) -> PackPlan:
        check_lengths(lengths, None)
        order = _order(len(lengths), seed)
        sizes = lengths[order]
        ends = np.cumsum(sizes, dtype=np.int64)
        begins = ends - sizes
        # A sample reaches from one pack into another, and has a piece in each.
        first_pack = begins // pack_max_length
        num_pieces = (ends - 1) // pack_max_length - first_pack + 1
        sample = np.repeat(np.arange(len(order)), num_pieces)
        piece = np.arange(len(sample)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
        pack_begins = (first_pack[sample] + piece) * pack_max_length
        begins = begins[sample]
        starts = np.maximum(pack_begins - begins, 0)
        stops = np.minimum(pack_begins + pack_max_length - begins, sizes[sample])
        pack_ends = np.flatnonzero(begins + stops == pack_begins + pack_max_length) + 1
        return PackPlan(np.concatenate([[0], pack_ends]), order[sample], starts, stops)


class Alone:
    """One sample per pack."""

    def plan(self, lengths: np.ndarray, pack_max_length: int, seed: int) -> PackPlan:
        check_lengths(lengths, pack_max_length)
        order = _order(len(lengths), seed)
        return PackPlan(np.arange(len(order) + 1, dtype=np.int64), order)


def _order(num: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(num)
