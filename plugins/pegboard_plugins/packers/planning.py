"""Pack planning on length histograms.

Best fit decreasing sees lengths only, and equal lengths are the same to it: so it runs on the count
of each length, and a pattern of lengths that fills a pack is used as often as the counts allow.
Work is per distinct pattern, not per sample. Samples, shuffled, are then dealt to the patterns'
places by array arithmetic.

Source: filling one pack at a time with the largest piece that still fits gives the packs of first
fit decreasing (Johnson, Near-optimal bin packing algorithms, 1973).
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, NamedTuple

import numpy as np

from pegboard import DataError, PackPlan

__all__ = ["BestFit", "NextFit"]

_BLOCK_SAMPLES = 65_536


class NextFit:
    """Shuffled order; a sample that does not fit starts the next pack."""

    def plan(self, lengths: np.ndarray, pack_max_length: int, seed: int) -> PackPlan:
        _check_lengths(lengths, pack_max_length)
        order = np.random.default_rng(seed).permutation(len(lengths))
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


class BestFit:
    """Best fit decreasing over shuffled windows of samples.

    Args:
        window_size: samples planned together; None for all. The pack left part empty at the end of
            a window is dissolved into the next one.
    """

    def __init__(self, window_size: int | None) -> None:
        self.window_size = window_size

    def plan(self, lengths: np.ndarray, pack_max_length: int, seed: int) -> PackPlan:
        _check_lengths(lengths, pack_max_length)
        rng = np.random.default_rng(seed)
        # int32 and uint16 halve the memory, and numpy sorts 16-bit keys by radix.
        index_type = np.int32 if len(lengths) < 2**31 else np.int64
        order = np.arange(len(lengths), dtype=index_type)
        rng.shuffle(order)
        short = np.uint16 if pack_max_length < 2**16 else np.int32
        size = self.window_size or max(len(lengths), 1)
        sizes: list[np.ndarray] = []
        samples: list[np.ndarray] = []
        carried = order[:0]
        for start in range(0, len(order), size):
            window = order[start : start + size]
            if len(carried):
                window = np.concatenate([carried, window])
            is_last = start + size >= len(order)
            window_lengths = lengths[window].astype(short)
            patterns = _fill_patterns(window_lengths, pack_max_length, index_type)
            packs = np.repeat(np.arange(len(patterns.repeats), dtype=index_type), patterns.repeats)
            if not is_last:
                packs = packs[:-1]
            rng.shuffle(packs)
            pack_sizes, places = _deal(patterns, packs)
            by_length = np.argsort(window_lengths, kind="stable").astype(index_type, copy=False)
            del window_lengths
            carried = order[:0]
            if not is_last:
                used = np.zeros(len(window), dtype=np.bool_)
                used[by_length[places]] = True
                carried = window[~used]
            sizes.append(pack_sizes)
            places = by_length[places]
            del by_length
            samples.append(window[places])
            del places
        if not samples:
            return PackPlan(np.zeros(1, dtype=np.int64), np.empty(0, dtype=np.int64))
        del order, window, carried
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(sizes), dtype=np.int64)])
        return PackPlan(offsets, np.concatenate(samples).astype(np.int64, copy=False))


class _Patterns(NamedTuple):
    """Pattern p fills `repeats[p]` packs; its pieces k are `counts[k]` samples of `lengths[k]`."""

    repeats: np.ndarray
    first_piece: np.ndarray
    """(num_patterns+1,): pattern p has pieces `first_piece[p]` to `first_piece[p+1]`."""
    lengths: np.ndarray
    counts: np.ndarray


def _fill_patterns(
    lengths: np.ndarray, capacity: int, index_type: type[np.integer[Any]]
) -> _Patterns:
    histogram = np.bincount(lengths)
    left: list[int] = histogram.tolist()
    alive: list[int] = np.flatnonzero(histogram).tolist()
    repeats: list[int] = []
    first_piece = [0]
    piece_lengths: list[int] = []
    piece_counts: list[int] = []
    while alive:
        room = capacity
        at = len(alive) - 1
        times = len(lengths)
        first = len(piece_lengths)
        while True:
            length = alive[at]
            fits = room // length
            have = left[length]
            fits = min(fits, have)
            room -= fits * length
            piece_lengths.append(length)
            piece_counts.append(fits)
            times = min(times, have // fits)
            # The next piece is shorter than this one, which is used up or no longer fits.
            at = bisect_right(alive, room, 0, at) - 1
            if at < 0:
                break
        repeats.append(times)
        first_piece.append(len(piece_lengths))
        for k in range(first, len(piece_lengths)):
            length = piece_lengths[k]
            left[length] -= times * piece_counts[k]
            if not left[length]:
                del alive[bisect_right(alive, length) - 1]
    return _Patterns(
        np.array(repeats, dtype=index_type),
        np.array(first_piece, dtype=index_type),
        np.array(piece_lengths, dtype=index_type),
        np.array(piece_counts, dtype=index_type),
    )


def _deal(patterns: _Patterns, packs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pattern number of each pack -> samples per pack, and each sample's rank by length."""
    pieces_per_pattern = np.diff(patterns.first_piece)
    taken = patterns.counts * np.repeat(patterns.repeats, pieces_per_pattern)
    by_length = np.argsort(patterns.lengths, kind="stable")
    # Pieces of one length take exactly its samples: a running sum tells where each piece's start.
    taken_by_length = taken[by_length]
    start = np.empty_like(taken)
    start[by_length] = np.cumsum(taken_by_length) - taken_by_length
    # Which use of its pattern each pack is.
    use = np.empty_like(packs)
    by_pattern = np.argsort(packs, kind="stable")
    used_patterns = packs[by_pattern]
    first_use = np.searchsorted(used_patterns, used_patterns, side="left")
    use[by_pattern] = np.arange(len(packs)) - first_use
    # packs -> pieces -> samples
    num_pieces = pieces_per_pattern[packs]
    piece = _ranges(patterns.first_piece[packs], num_pieces)
    count = patterns.counts[piece]
    places = _ranges(start[piece] + np.repeat(use, num_pieces) * count, count)
    pack_sizes = np.add.reduceat(count, np.cumsum(num_pieces) - num_pieces) if len(packs) else use
    return pack_sizes, places


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """arange(start, start + count) of each, one after the other."""
    ends = np.cumsum(counts, dtype=starts.dtype)
    total = int(ends[-1]) if len(ends) else 0
    result = np.repeat(starts - (ends - counts), counts)
    result += np.arange(total, dtype=starts.dtype)
    return result


def _check_lengths(lengths: np.ndarray, pack_max_length: int) -> None:
    if len(lengths) and not (1 <= lengths.min() and lengths.max() <= pack_max_length):
        first = int(np.flatnonzero((lengths < 1) | (lengths > pack_max_length))[0])
        raise DataError(
            f"sample {first} has {int(lengths[first])} tokens, "
            f"expected 1 to pack_max_length = {pack_max_length}"
        )
