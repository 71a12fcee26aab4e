"""Which published tensor holds which part of ours: one declarative table, read in both directions.

Our tensor and the published ones are related by boxes: `ours[ours_index] == published[published_index]`.
Rename, fuse, split and stack are all boxes, so loading one rank's rows and exporting whole tensors are the
same table read forwards or backwards. Only an export that computes (merging an adapter) needs code.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Box", "Entry", "Overlap", "Piece", "WeightMap", "fused", "overlap", "renamed"]

Box = tuple[tuple[int, int], ...]
"""(start, stop) for each leading dim that is cut; dims left out are whole."""


class Piece(NamedTuple):
    """One published tensor's part in one of ours.

    >>> Piece("experts.3.up_proj.weight", ours=((3, 4), (0, 8)), squeeze=True).theirs
    ()
    """

    published: str
    ours: Box = ()
    """The part of our tensor it fills; () is all of it."""
    theirs: Box = ()
    """The part of the published tensor that is meant; () is all of it."""
    squeeze: bool = False
    """Ours has one more leading dim, of extent 1 in `ours` (an expert of a stack)."""


class Overlap(NamedTuple):
    """The same elements, in a rank's part of our tensor and in a published one."""

    ours: tuple[slice, ...]
    """From the start of the rank's part; one slice for each dim of ours."""
    theirs: tuple[slice, ...]
    """One slice for each dim of the published tensor."""


@dataclass(frozen=True)
class Entry:
    """How one of our tensors is made of published ones; `renamed` and `fused` make the usual ones.

    >>> halves = (Piece("low", ours=((0, 2),)), Piece("high", ours=((2, 4),)))
    >>> WeightMap((Entry("both", (4, 3), halves),)).published_shapes()
    {'low': (2, 3), 'high': (2, 3)}
    """

    ours: str
    shape: tuple[int, ...]
    """Shape of our whole tensor."""
    pieces: tuple[Piece, ...]
    also: tuple[str, ...] = ()
    """Other tensors of ours that the export reads (an adapter's factors)."""
    merge: Callable[..., Tensor] | None = None
    """(ours, *also) -> what is published in its place."""
    or_pieces: tuple[Piece, ...] = ()
    """Read in place of `pieces` from a folder that has these and not those; never written."""


@dataclass(frozen=True)
class WeightMap:
    """Every parameter of a model and its published names.

    >>> names = WeightMap((renamed("embed.weight", "model.embed_tokens.weight", (10, 4)),))
    >>> names.published_shapes()
    {'model.embed_tokens.weight': (10, 4)}
    >>> names.unmapped(["embed.weight", "norm.weight"])
    ['norm.weight']
    """

    entries: tuple[Entry, ...]
    tied: Mapping[str, str] = field(default_factory=dict)
    """Published name that may stand on disk -> published name whose tensor it repeats; neither read nor written."""
    unpublished: tuple[str, ...] = ()
    """Parameters of ours that a published folder doesn't have (an adapter's); initialised, never loaded from it."""

    def prefixed(self, prefix: str, rename: Callable[[str], str]) -> WeightMap:
        """The same map for a module nested under `prefix` (with its dot), published names renamed."""
        return WeightMap(
            entries=tuple(
                replace(
                    entry,
                    ours=prefix + entry.ours,
                    also=tuple(prefix + name for name in entry.also),
                    pieces=tuple(p._replace(published=rename(p.published)) for p in entry.pieces),
                    or_pieces=tuple(
                        p._replace(published=rename(p.published)) for p in entry.or_pieces
                    ),
                )
                for entry in self.entries
            ),
            tied={rename(a): rename(b) for a, b in self.tied.items()},
            unpublished=tuple(prefix + name for name in self.unpublished),
        )

    def __add__(self, other: WeightMap) -> WeightMap:
        return WeightMap(
            self.entries + other.entries,
            {**self.tied, **other.tied},
            self.unpublished + other.unpublished,
        )

    def as_found(self, published: Collection[str]) -> WeightMap:
        """The map of a folder that holds these names: `or_pieces` where all of them are there and
        none of `pieces` is."""
        entries = [
            replace(entry, pieces=entry.or_pieces, or_pieces=())
            if entry.or_pieces
            and all(piece.published in published for piece in entry.or_pieces)
            and not any(piece.published in published for piece in entry.pieces)
            else entry
            for entry in self.entries
        ]
        return replace(self, entries=tuple(entries))

    def published_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every published tensor, in the order of the map; what a complete folder holds."""
        shapes: dict[str, list[int]] = {}
        for entry in self.entries:
            for piece in entry.pieces:
                shape = list(entry.shape)
                for dim, (start, stop) in enumerate(piece.ours):
                    shape[dim] = stop - start
                if piece.squeeze:
                    shape = shape[1:]
                known = shapes.setdefault(piece.published, list(shape))
                for dim, (_, stop) in enumerate(piece.theirs):
                    known[dim] = max(known[dim], stop)
        return {name: tuple(shape) for name, shape in shapes.items()}

    def unmapped(self, parameter_names: Iterable[str]) -> list[str]:
        """Parameters that no entry covers: a fault of the model."""
        covered = {entry.ours for entry in self.entries} | set(self.unpublished)
        return sorted(set(parameter_names) - covered)


def overlap(
    piece: Piece, shape: Sequence[int], held: Box, published_shape: Sequence[int]
) -> Overlap | None:
    """What a rank that holds `held` of our tensor has of a piece; None if nothing.

    Args:
        shape: of our whole tensor.
        held: (start, stop) for every dim of ours.
        published_shape: may have fewer rows than the piece means (a smaller vocabulary on disk).
    """
    ours = (*piece.ours, *((0, size) for size in shape[len(piece.ours) :]))
    skipped = 1 if piece.squeeze else 0
    into, out_of = [], []
    for dim, ((start, stop), (held_start, held_stop)) in enumerate(zip(ours, held, strict=True)):
        their_dim = dim - skipped
        their_start = piece.theirs[their_dim][0] if 0 <= their_dim < len(piece.theirs) else 0
        if their_dim >= 0:
            stop = min(stop, start + published_shape[their_dim] - their_start)
        low, high = max(start, held_start), min(stop, held_stop)
        if low >= high:
            return None
        into.append(slice(low - held_start, high - held_start))
        if their_dim >= 0:
            out_of.append(slice(low - start + their_start, high - start + their_start))
    return Overlap(tuple(into), tuple(out_of))


def renamed(ours: str, published: str, shape: Sequence[int]) -> Entry:
    """Ours is the published tensor under another name.

    >>> renamed("norm.weight", "model.norm.weight", (4,)).pieces[0].published
    'model.norm.weight'
    """
    return Entry(ours, tuple(shape), (Piece(published),))


def fused(ours: str, parts: Sequence[tuple[str, int]], shape: Sequence[int]) -> Entry:
    """Ours is published tensors one below the other: `parts` are (published name, rows).

    >>> gate_up = fused("gate_up.weight", [("gate.weight", 6), ("up.weight", 6)], (12, 4))
    >>> WeightMap((gate_up,)).published_shapes()
    {'gate.weight': (6, 4), 'up.weight': (6, 4)}
    """
    pieces, start = [], 0
    for name, rows in parts:
        pieces.append(Piece(name, ours=((start, start + rows),)))
        start += rows
    if start != shape[0]:
        raise ValueError(f"{ours}: parts have {start} rows, the tensor has {shape[0]}")
    return Entry(ours, tuple(shape), tuple(pieces))
