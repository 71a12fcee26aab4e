"""Stretches of one repeated token: the places that an image's patches take, and padding."""

from __future__ import annotations

from collections.abc import Iterator

from .contents import Pack

__all__ = ["SHORTEST_STRETCH", "groups"]

SHORTEST_STRETCH = 8
"""Equal special tokens in a row that are shown as one; fewer are shown one by one."""


def groups(pack: Pack, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Cut `start` to `end` of the row into single tokens and stretches to be shown as one."""
    tiles = [tile for tile in pack.tiles if tile.start < end and tile.end > start]
    pictured = {row for tile in tiles for row in range(tile.start, tile.end)}
    at = start
    while at < end:
        stop = at + 1
        if at in pictured or pack.pieces[at].kind in ("special", "unknown"):
            same = pack.ids[at], pack.weights[at]
            while stop < end and (pack.ids[stop], pack.weights[stop]) == same:
                stop += 1
        if stop - at >= SHORTEST_STRETCH:
            yield at, stop
        else:
            yield from ((k, k + 1) for k in range(at, stop))
        at = stop
