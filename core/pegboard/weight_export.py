"""Our parameters as published tensors, one weight-map entry at a time.

The weight map read towards the disk, in two ways. `write_parts`: what this rank holds of each published
tensor, without communication, so that ranks write side by side; only an entry that computes is gathered.
`iter_published`: whole tensors, gathered one entry at a time, for whoever needs them whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from pegboard.commit import rank_and_world
from pegboard.initialization import local_box, local_part
from pegboard.weight_map import overlap

if TYPE_CHECKING:
    from torch import Tensor

    from pegboard.weight_map import Box, Entry, WeightMap

__all__ = ["PublishedPart", "iter_published", "write_parts"]


class PublishedPart(NamedTuple):
    """A box of a published tensor."""

    name: str
    where: tuple[slice, ...]
    """One slice for each dim of the published tensor."""
    values: Tensor
    """Of that box's shape; a view of the parameter's storage."""


def write_parts(
    named_params: Mapping[str, Tensor],
    weight_map: WeightMap,
    gather: Callable[[Tensor], Tensor],
    write: Callable[[PublishedPart], None],
) -> None:
    """Call `write` for this rank's share of an export; over all ranks every element comes exactly once.

    Entries that compute nothing need no communication: of copies, the first rank's is written. The
    others (a merged adapter) are gathered on every rank and computed on one, in turns; collective.
    """
    rank, world_size = rank_and_world()
    shapes = weight_map.published_shapes()
    failure: Exception | None = None
    merging = [entry for entry in weight_map.entries if entry.merge is not None]
    for index, entry in enumerate(merging):
        wholes = [gather(named_params[name]).detach() for name in (entry.ours, *entry.also)]
        if index % world_size != rank or failure is not None:
            continue
        assert entry.merge is not None
        try:
            whole = entry.merge(*wholes)
            for part in _parts_of(entry, whole, tuple((0, n) for n in whole.shape), shapes):
                write(part)
        # The others are in the next gather already: take part to the end, then say it.
        except (OSError, RuntimeError, ValueError, MemoryError) as error:
            failure = error
    if failure is not None:
        raise failure
    for entry in weight_map.entries:
        parameter = named_params[entry.ours]
        if entry.merge is None and _holds_first_copy(parameter):
            for part in _parts_of(entry, local_part(parameter), local_box(parameter), shapes):
                write(part)


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


def _parts_of(
    entry: Entry, held: Tensor, box: Box, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[PublishedPart]:
    for piece in entry.pieces:
        common = overlap(piece, entry.shape, box, shapes[piece.published])
        if common is not None:
            values = held[common.ours]
            values = values.squeeze(0) if piece.squeeze else values
            yield PublishedPart(piece.published, common.theirs, values)


def _holds_first_copy(tensor: Tensor) -> bool:
    """Whether no rank before this one holds the same part of the tensor."""
    if not hasattr(tensor, "device_mesh"):
        return rank_and_world()[0] == 0
    coordinates = tensor.device_mesh.get_coordinate()
    return coordinates is not None and all(
        coordinate == 0
        for coordinate, placement in zip(coordinates, tensor.placements, strict=True)  # type: ignore[attr-defined]
        if placement.is_replicate()
    )


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)
