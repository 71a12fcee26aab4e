"""Our parameters as published tensors, one weight-map entry at a time.

The weight map read towards the disk: gather one of our tensors, cut it into its pieces, hand each
published tensor out as soon as it is whole. Never more than one gathered entry is alive, plus what
is still incomplete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from pegboard.weight_map import Box, WeightMap

__all__ = ["iter_published"]


def iter_published(
    named_params: Mapping[str, Tensor], weight_map: WeightMap, gather: Callable[[Tensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (published name, whole tensor) for all that an export holds, in the order of the map.

    Args:
        named_params: every parameter of ours by name, plain or sharded.
        weight_map: names and layouts; `unpublished` parameters are read only where an entry's
            `also` asks.
        gather: sharded parameter -> whole tensor on this rank. May be collective: every rank that
            iterates calls it for the same parameters in the same order.

    A yielded tensor has the dtype that `gather` gave; it may be a contiguous view that shares the
    gathered storage with its neighbours (no overlap). Keep one no longer than needed: it holds the
    whole entry.

    Raises:
        KeyError: the map names a parameter that `named_params` lacks (a fault of the model).
        ValueError: the map leaves a published tensor incomplete (a fault of the model).
    """
    shapes = weight_map.published_shapes()
    partial: dict[str, Tensor] = {}
    filled: dict[str, int] = {}
    for entry in weight_map.entries:
        whole = gather(named_params[entry.ours]).detach()
        if entry.merge is not None:
            whole = entry.merge(
                whole, *(gather(named_params[name]).detach() for name in entry.also)
            )
        for piece in entry.pieces:
            part = whole[_slices(piece.ours)] if piece.ours else whole
            part = part.squeeze(0) if piece.squeeze else part
            if not piece.theirs:
                yield piece.published, part.contiguous()
                continue
            target = partial.get(piece.published)
            if target is None:
                target = part.new_empty(shapes[piece.published])
                partial[piece.published], filled[piece.published] = target, 0
            target[_slices(piece.theirs)] = part
            filled[piece.published] += part.numel()
            if filled[piece.published] == prod(shapes[piece.published]):
                yield piece.published, partial.pop(piece.published)
    if partial:
        raise ValueError(f"weight map leaves {sorted(partial)} incomplete: pieces miss some of it")


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)
