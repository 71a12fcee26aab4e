"""A plan of an epoch: which samples it trains on, which of them share a pack, the order of the packs.

In memory it is flat arrays; on disk a folder of them, written whole and mapped by whoever reads it:

    epoch_00003.packs    the number of packs
    epoch_00003/
        plan.json       counts per source, checksums
        offsets.npy     pack i is pieces offsets[i] to offsets[i+1]
        sources.npy samples.npy [starts.npy stops.npy]
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pegboard.sampling import Draw
from pegboard.token_store import TokenStore

__all__ = [
    "PLAN_VERSION",
    "DataSource",
    "EpochPlan",
    "Pieces",
    "SourceCounts",
    "damaged_plan_files",
    "read_number",
    "read_plan",
    "write_plan",
]

PLAN_VERSION = 2
"""Raised whenever a plan, or the files of one, become others from the same data."""
_ARRAYS = ("offsets", "sources", "samples", "starts", "stops")


@dataclass(frozen=True)
class DataSource:
    """One dataset of the run."""

    store: TokenStore
    source_id: int
    """Index in the config's list of datasets."""
    name: str
    sample_ratio: float = 1.0
    may_skip: bool = False
    """A sample whose media can't be read is left out of its pack, and counted."""
    draw: Draw = "rotate"
    """How epochs differ in what is no whole copy of the dataset."""
    token_weight: float | None = None
    """Share of the epoch's tokens, against the other sources' weights; all have one or none has."""


@dataclass(frozen=True)
class SourceCounts:
    """What a source gives to an epoch's packs."""

    name: str
    samples: int
    """Of a sample that is cut, each piece counts."""
    tokens: int
    targets: int
    """Supervised tokens: those that are predicted from something before them."""


class Pieces(NamedTuple):
    """Samples, or parts of samples, one after the other."""

    sources: np.ndarray
    """(n,) integer position in the list of sources."""
    samples: np.ndarray
    """(n,) integer index in that source's store."""
    starts: np.ndarray | None = None
    """(n,) int32 first token of the piece in its sample; None: all samples are whole."""
    stops: np.ndarray | None = None
    """(n,) int32 end of the piece in its sample."""
    draws: np.ndarray | None = None
    """(n,) uint64 `Example.draw` of each; not part of a plan."""

    def part(self, first: int, last: int) -> Pieces:
        """Pieces `first` to `last`."""
        return Pieces(
            self.sources[first:last],
            self.samples[first:last],
            None if self.starts is None else self.starts[first:last],
            None if self.stops is None else self.stops[first:last],
            None if self.draws is None else self.draws[first:last],
        )


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """Packs of one epoch in the order they train: pack i is pieces `offsets[i]` to `offsets[i+1]`."""

    offsets: np.ndarray
    """(num_packs+1,) int64."""
    pieces: Pieces
    """Those of all packs; behind `offsets[-1]`, those kept for the next epoch."""
    counts: tuple[SourceCounts, ...]
    """Per source, in the order of the sources; kept pieces are not in it."""
    pack_max_length: int

    @property
    def num_packs(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_samples(self) -> int:
        """Pieces in packs."""
        return int(self.offsets[-1])

    @property
    def num_tokens(self) -> int:
        """Tokens in packs."""
        return sum(source.tokens for source in self.counts)

    @property
    def num_targets(self) -> int:
        """Supervised tokens in packs."""
        return sum(source.targets for source in self.counts)

    @property
    def fill(self) -> float:
        """Tokens / room in all packs, in (0, 1]."""
        return self.num_tokens / (self.num_packs * self.pack_max_length)

    @property
    def sources(self) -> np.ndarray:
        """(num_samples,) integer position in the list of sources, in pack order."""
        return self.pieces.sources[: self.num_samples]

    @property
    def samples(self) -> np.ndarray:
        """(num_samples,) integer index in that source's store, in pack order."""
        return self.pieces.samples[: self.num_samples]

    def kept(self) -> Pieces | None:
        """What the packer left for the next epoch."""
        total = len(self.pieces.samples)
        return self.pieces.part(self.num_samples, total) if total > self.num_samples else None


def write_plan(folder: Path, plan: EpochPlan) -> None:
    """Write the plan into an empty folder."""
    arrays: Mapping[str, np.ndarray | None] = {"offsets": plan.offsets, **plan.pieces._asdict()}
    for name, array in arrays.items():
        if array is None:
            continue
        if name != "offsets" and array.dtype == np.int64 and array.max(initial=0) < 2**31:
            array = array.astype(np.int32)
        np.save(folder / f"{name}.npy", array)
    meta = {
        "format_version": PLAN_VERSION,
        "num_pieces": len(plan.pieces.samples),
        "counts": [asdict(source) for source in plan.counts],
        "files": {path.name: _check_of(path) for path in sorted(folder.glob("*.npy"))},
    }
    (folder / "plan.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def read_plan(folder: Path, pack_max_length: int) -> EpochPlan | None:
    """The plan in `folder`, mapped; None if there is no whole one."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        meta = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        arrays = {
            name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))
            for name in _ARRAYS
            if (folder / f"{name}.npy").exists()
        }
        offsets = arrays.pop("offsets")
        sizes = {len(array) for array in arrays.values()}
        if meta["format_version"] == PLAN_VERSION and sizes == {meta["num_pieces"]}:
            counts = tuple(SourceCounts(**source) for source in meta["counts"])
            return EpochPlan(offsets, Pieces(**arrays), counts, pack_max_length)
    return None


def damaged_plan_files(folder: Path) -> list[str]:
    """Files of the plan in `folder` whose bytes are not what was written; reads all of it."""
    try:
        files = json.loads((folder / "plan.json").read_text(encoding="utf-8"))["files"]
        wrong = []
        for name, check in files.items():
            path = folder / name
            if not path.is_file() or _check_of(path) != check:
                wrong.append(name)
        return wrong
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ["plan.json"]


def _check_of(path: Path) -> list[int]:
    """(bytes, checksum) of a file."""
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def read_number(path: Path) -> int | None:
    """The whole number in a file; None if there is none."""
    with suppress(OSError, ValueError):
        return int(path.read_text())
    return None
