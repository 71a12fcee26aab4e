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
        order = _order(len(lengths), seed) if self.shuffle else _in_order(len(lengths))
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
        packs: list[np.ndarray] = [np.zeros(1, dtype=np.int64)]
        pieces: list[tuple[np.ndarray, ...]] = []
        at, num_pieces = 0, 0
        # In blocks: an array of the whole for each line of arithmetic would be a lot of memory.
        for first in range(0, len(order), _BLOCK_SAMPLES):
            block = order[first : first + _BLOCK_SAMPLES]
            sizes = lengths[block].astype(np.int64)
            sample, starts, stops, ends_pack = _cut_block(at, sizes, pack_max_length)
            packs.append(np.flatnonzero(ends_pack) + (num_pieces + 1))
            piece_type = np.int32 if int(stops.max()) < 2**31 else np.int64
            pieces.append((block[sample], starts.astype(piece_type), stops.astype(piece_type)))
            at += int(sizes.sum())
            num_pieces += len(sample)
        if not pieces:
            return PackPlan(packs[0], order, order, order)
        samples, starts, stops = (np.concatenate(part) for part in zip(*pieces, strict=True))
        return PackPlan(np.concatenate(packs), samples, starts, stops)


class Alone:
    """One sample per pack."""

    def plan(self, lengths: np.ndarray, pack_max_length: int, seed: int) -> PackPlan:
        check_lengths(lengths, pack_max_length)
        order = _order(len(lengths), seed)
        return PackPlan(np.arange(len(order) + 1, dtype=np.int64), order)


def _cut_block(at: int, sizes: np.ndarray, pack_max_length: int) -> tuple[np.ndarray, ...]:
    """Pieces of samples that lie from token `at` of the stream on.

    Returns:
        Per piece: position of its sample in `sizes`, first token and end in that sample, and
        whether a pack ends with it.
    """
    ends = at + np.cumsum(sizes)
    begins = ends - sizes
    # A sample reaches from one pack into another, and has a piece in each.
    first_pack = begins // pack_max_length
    num_pieces = (ends - 1) // pack_max_length - first_pack + 1
    sample = np.repeat(np.arange(len(sizes)), num_pieces)
    number = np.arange(len(sample)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    pack_begins = (first_pack[sample] + number) * pack_max_length
    begins = begins[sample]
    starts = np.maximum(pack_begins - begins, 0)
    stops = np.minimum(pack_begins + pack_max_length - begins, sizes[sample])
    return sample, starts, stops, begins + stops == pack_begins + pack_max_length


def _order(num: int, seed: int) -> np.ndarray:
    order = _in_order(num)
    np.random.default_rng(seed).shuffle(order)
    return order


def _in_order(num: int) -> np.ndarray:
    return np.arange(num, dtype=np.int32 if num < 2**31 else np.int64)
