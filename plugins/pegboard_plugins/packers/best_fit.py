"""Best fit decreasing on the histogram of lengths.

Equal lengths are the same to best fit: so it runs on the count of each length, and a pattern of
lengths that fills a pack is used as often as the counts allow. Work is per distinct pattern, not per
sample. Samples are then dealt to the patterns' places at random, by array arithmetic. A set that is
small enough is spread sample by sample instead, so that no pack holds the long or the short ones.

Source: filling one pack at a time with the largest piece that still fits gives the packs of first
fit decreasing (Johnson, Near-optimal bin packing algorithms, 1973); spreading gives each sample,
longest first, to the emptiest pack (Graham, Bounds on multiprocessing timing anomalies, 1969).
"""

from __future__ import annotations

from bisect import bisect_right
from heapq import heapreplace
from typing import Any, NamedTuple

import numpy as np

from pegboard import PackPlan

from .lengths import check_lengths

__all__ = ["BestFit"]

_SPREAD_AT_MOST = 65_536
"""Samples of a set whose packs are spread one sample at a time."""
_MOST_WINDOWS = 32
_SPARE_PACKS_FROM = 50
"""With so many packs one more may be made for the sake of mixed lengths."""


class BestFit:
    """Best fit decreasing over shuffled windows of samples.

    Args:
        window_size: samples planned together; None for all. The pack left part empty at the end of
            a window is dissolved into the next one.
    """

    def __init__(self, window_size: int | None) -> None:
        self.window_size = window_size

    def plan(self, lengths: np.ndarray, pack_max_length: int, seed: int) -> PackPlan:
        check_lengths(lengths, pack_max_length)
        if not len(lengths):
            return PackPlan(np.zeros(1, dtype=np.int64), np.empty(0, dtype=np.int64))
        rng = np.random.default_rng(seed)
        if self.window_size is not None and len(lengths) <= min(self.window_size, _SPREAD_AT_MOST):
            plan = _spread(lengths, pack_max_length, rng)
            if plan is not None:
                return plan
        if self.window_size is None or len(lengths) <= self.window_size:
            return _plan_whole(lengths, pack_max_length, rng)
        return _plan_windows(lengths, pack_max_length, rng, self.window_size)


def _plan_whole(lengths: np.ndarray, capacity: int, rng: np.random.Generator) -> PackPlan:
    index_type = _index_type(len(lengths))
    lengths = _short_lengths(lengths, capacity)
    patterns = _fill_patterns(np.bincount(lengths), capacity, index_type)
    packs = np.repeat(np.arange(len(patterns.repeats), dtype=index_type), patterns.repeats)
    rng.shuffle(packs)
    sizes, places = _deal(patterns, packs)
    order = _shuffled(len(lengths), rng, index_type)
    lengths = lengths[order]
    samples = order[_by_length(lengths).astype(index_type)[places]]
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    return PackPlan(offsets, samples)


def _plan_windows(
    lengths: np.ndarray, capacity: int, rng: np.random.Generator, window_size: int
) -> PackPlan:
    index_type = _index_type(len(lengths))
    # Python works through each window's patterns: of many windows, fewer and larger ones are made.
    window_size = max(window_size, -(-len(lengths) // _MOST_WINDOWS))
    order = _shuffled(len(lengths), rng, index_type)
    lengths = _short_lengths(lengths, capacity)
    sizes: list[np.ndarray] = []
    samples: list[np.ndarray] = []
    carried = order[:0]
    for start in range(0, len(order), window_size):
        window = order[start : start + window_size]
        if len(carried):
            window = np.concatenate([carried, window])
        is_last = start + window_size >= len(order)
        window_lengths = lengths[window]
        patterns = _fill_patterns(np.bincount(window_lengths), capacity, index_type)
        packs = np.repeat(np.arange(len(patterns.repeats), dtype=index_type), patterns.repeats)
        if not is_last:
            packs = packs[:-1]
        rng.shuffle(packs)
        pack_sizes, places = _deal(patterns, packs)
        by_length = window[_by_length(window_lengths)]
        if not is_last:
            free = np.ones(len(window), dtype=np.bool_)
            free[places] = False
            carried = by_length[free]
        sizes.append(pack_sizes)
        samples.append(by_length[places])
    del order
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(sizes), dtype=np.int64)])
    return PackPlan(offsets, np.concatenate(samples))


def _spread(lengths: np.ndarray, capacity: int, rng: np.random.Generator) -> PackPlan | None:
    """As few packs as best fit would make, all about as full, each of long and short samples.

    None if that can't be had.
    """
    patterns = _fill_patterns(np.bincount(lengths), capacity, np.int64)
    fewest = int(patterns.repeats.sum())
    attempts = [(fewest, 0.5), (fewest, 0.25), (fewest, 0.0)]
    if fewest >= _SPARE_PACKS_FROM:
        attempts.append((fewest + 1, 0.25))
    for num_packs, noise in attempts:
        # Noise: which samples meet shall not be the same in every epoch.
        keys = lengths * rng.uniform(1 - noise, 1, len(lengths))
        packs = _to_emptiest(lengths, np.argsort(-keys, kind="stable"), capacity, num_packs)
        if packs is not None:
            packs = [
                packs[number] for number in rng.permutation(num_packs).tolist() if packs[number]
            ]
            offsets = np.cumsum([0, *map(len, packs)], dtype=np.int64)
            return PackPlan(offsets, np.array([i for pack in packs for i in pack], dtype=np.int64))
    return None


def _to_emptiest(
    lengths: np.ndarray, order: np.ndarray, capacity: int, num_packs: int
) -> list[list[int]] | None:
    """Each sample, in that order, to the emptiest pack; None as soon as one does not fit."""
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    heap = [(0, pack) for pack in range(num_packs)]
    for sample, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        load, pack = heap[0]
        load += length
        if load > capacity:
            return None
        packs[pack].append(sample)
        heapreplace(heap, (load, pack))
    return packs


class _Patterns(NamedTuple):
    """Pattern p fills `repeats[p]` packs; its pieces k are `counts[k]` samples of `lengths[k]`."""

    repeats: np.ndarray
    first_piece: np.ndarray
    """(num_patterns+1,): pattern p has pieces `first_piece[p]` to `first_piece[p+1]`."""
    lengths: np.ndarray
    counts: np.ndarray


def _fill_patterns(
    histogram: np.ndarray, capacity: int, index_type: type[np.integer[Any]]
) -> _Patterns:
    left: list[int] = histogram.tolist()
    alive: list[int] = np.flatnonzero(histogram).tolist()
    total = int(histogram.sum())
    repeats: list[int] = []
    first_piece = [0]
    piece_lengths: list[int] = []
    piece_counts: list[int] = []
    while alive:
        at = len(alive) - 1
        room = capacity
        times = total
        places = []
        counts = []
        # The next piece is shorter than the last, which is used up or no longer fits.
        while at >= 0:
            length = alive[at]
            have = left[length]
            fits = room // length
            if fits >= have:
                fits, times = have, 1
            elif times > 1:
                times = min(times, have // fits)
            room -= fits * length
            places.append(at)
            counts.append(fits)
            at = bisect_right(alive, room, 0, at) - 1
        # From the longest down, so that a length used up moves none that is still to come.
        for at, fits in zip(places, counts, strict=True):
            length = alive[at]
            piece_lengths.append(length)
            rest = left[length] - times * fits
            if rest:
                left[length] = rest
            else:
                del alive[at]
        piece_counts += counts
        repeats.append(times)
        first_piece.append(len(piece_lengths))
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


def _index_type(num: int) -> type[np.integer[Any]]:
    return np.int32 if num < 2**31 else np.int64


def _shuffled(num: int, rng: np.random.Generator, index_type: type[np.integer[Any]]) -> np.ndarray:
    """A permutation of `num`: sorting random keys is faster than swapping places far apart."""
    # 16-bit keys: numpy sorts those by radix. What has the same key stays in order, which is no
    # order between any two of the window they fall into.
    keys = rng.integers(0, 2**16, num, dtype=np.uint16)
    return np.argsort(keys, kind="stable").astype(index_type)


def _by_length(lengths: np.ndarray) -> np.ndarray:
    """Places from the shortest sample up; equal lengths as they stand. 16-bit ones go by radix."""
    return np.argsort(lengths, kind="stable")


def _short_lengths(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The same in the smallest type: looking up and sorting them is most of the work."""
    return lengths.astype(np.uint16 if capacity < 2**16 else np.int32, copy=False)
