"""Which samples an epoch trains on, which of them share a pack, and the order of the packs.

An epoch is planned whole, from (data, config, seed, epoch) and nothing else, so every process that
plans it gets the same. Local rank 0 plans, writes flat files and renames their folder into place; the
other ranks, and later starts, map them (a small set every rank plans for itself). What a packer leaves
over goes into the next epoch.

    <folder>/<fingerprint>/epoch_00003.packs    the number of packs
    <folder>/<fingerprint>/epoch_00003/
        plan.json       counts per source
        offsets.npy     pack i is pieces offsets[i] to offsets[i+1]
        sources.npy samples.npy [starts.npy stops.npy]
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from pegboard.contracts import Packer
from pegboard.errors import DataError, PluginError
from pegboard.sampling import Draw, derive_seed, sample_indices, sample_tokens, token_quotas
from pegboard.token_store import TokenStore

__all__ = [
    "DataSource",
    "EpochPlan",
    "EpochPlanner",
    "Pieces",
    "PlanningStopped",
    "SourceCounts",
    "data_identity",
]

FORMAT_VERSION = 1
_ARRAYS = ("offsets", "sources", "samples", "starts", "stops")
_POLL_S = 0.05
_STALE_S = 3600.0
_WAIT_S = 10.0
_WAIT_S_PER_SAMPLE = 2e-5
_Found = TypeVar("_Found")


class PlanningStopped(Exception):
    """This process was told to stop while it waited for another's plan; no error of anybody's."""


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


class EpochPlanner:
    """Plans epochs, or maps the plans that were made before. May be used by several threads.

    Args:
        sources: the datasets.
        packer: plans on the lengths of all sources together.
        pack_max_length: tokens of room in a pack.
        seed: the run's.
        max_tiles: vision tiles that a pack may hold; None: any number.
        packer_identity: changes with anything that changes the packer's result.
        folder: of cached plans; None plans in memory only.
        cached_from: samples from which plans are cached: fewer are planned sooner than read.
        makes: this process plans; another waits for its files, and plans only if none come.
        last_epoch: the run's last, where it is known: what its packer would keep makes one more pack.

    Raises:
        DataError: a sample that fits no pack, or media that a packer would cut.
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        *,
        packer: Packer,
        pack_max_length: int,
        seed: int = 0,
        max_tiles: int | None = None,
        packer_identity: str = "",
        folder: Path | None = None,
        cached_from: int = 10_000,
        makes: bool = True,
        last_epoch: int | None = None,
    ) -> None:
        self.sources = tuple(sources)
        self.pack_max_length = pack_max_length
        self.last_epoch = last_epoch
        self._packer = packer
        self._cuts = bool(getattr(packer, "cuts_samples", False))
        self._seed = seed
        self._max_tiles = max_tiles
        self._packer_identity = packer_identity
        self._makes = makes
        self._plans: dict[int, EpochPlan] = {}
        self._num_packs: dict[int, int] = {}
        self._tail: tuple[int, Pieces | None] | None = None
        """The epoch that was planned last, and what it kept for the next."""
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        for source in self.sources:
            _check_source(source, pack_max_length, max_tiles, self._cuts)
        self._num_samples = sum(len(source.store) for source in self.sources)
        self._folder: Path | None = None
        if folder is not None and self._num_samples >= cached_from:
            self._folder = folder / self._fingerprint()

    def plan(self, epoch: int) -> EpochPlan:
        """The plan of `epoch` (from 0).

        Raises:
            DataError: there is nothing to train on.
            PlanningStopped: `stop` was called while this process waited for another's plan.
        """
        # Without the lock: another thread may hold it for long, to wait for the next epoch's plan.
        if (plan := self._plans.get(epoch)) is not None:
            return plan
        with self._lock:
            if (plan := self._plans.get(epoch)) is None:
                place = self._place(epoch)
                plan = self._read_or_wait(lambda: _read_plan(place, self.pack_max_length))
                if plan is None:
                    plan = self._make_from_nearest(epoch)
                    if self._folder is not None and self._makes:
                        plan = self._publish(epoch, plan)
                self._plans[epoch] = plan
                self._num_packs[epoch] = plan.num_packs
            return plan

    def num_packs(self, epoch: int) -> int:
        """Packs of `epoch`; kept, so that it is planned for this once."""
        if epoch in self._num_packs:
            return self._num_packs[epoch]
        with self._lock:
            note = self._place(epoch).with_suffix(".packs")
            found = self._read_or_wait(lambda: _read_number(note))
            if found is None:
                found = self._make_from_nearest(epoch).num_packs
            self._num_packs[epoch] = found
            return found

    def forget_before(self, epoch: int) -> None:
        """Let go of earlier epochs' plans, here and on disk."""
        for old in [old for old in self._plans if old < epoch]:
            del self._plans[old]
        if self._folder is not None and self._makes:
            for place in self._folder.glob("epoch_*"):
                number = place.name.split("_")[1]
                if number.isdigit() and int(number) < epoch:
                    shutil.rmtree(place, ignore_errors=True)

    def identity(self) -> dict[str, str]:
        """Part -> what stands for it; equal parts give equal plans."""
        return {
            "datasets": data_identity(self.sources),
            "packer": f"{self._packer_identity} {self._max_tiles}",
            "pack_max_length": str(self.pack_max_length),
            "seed": str(self._seed),
        }

    def stop(self) -> None:
        """Let threads that wait for another process's plan go, until `resume`."""
        self._stopped.set()

    def resume(self) -> None:
        """Undo `stop`."""
        self._stopped.clear()

    def _fingerprint(self) -> str:
        parts = json.dumps([FORMAT_VERSION, self.identity()], sort_keys=True)
        return hashlib.sha256(parts.encode()).hexdigest()[:24]

    def _place(self, epoch: int) -> Path:
        folder = self._folder or Path()  # not read then
        # The last epoch of a run keeps nothing for another.
        last = "_last" if self._cuts and epoch == self.last_epoch else ""
        return folder / f"epoch_{epoch:05}{last}"

    def _read_or_wait(self, read: Callable[[], _Found | None]) -> _Found | None:
        """What is on disk; a process that doesn't plan waits until it is there."""
        if self._folder is None:
            return None
        found = read()
        # Longer than planning takes: who plans after all gets the same plan.
        wait_s = 0.0 if self._makes else _WAIT_S + _WAIT_S_PER_SAMPLE * self._num_samples
        give_up = time.monotonic() + wait_s
        while found is None and time.monotonic() < give_up:
            if self._stopped.wait(_POLL_S):
                raise PlanningStopped
            found = read()
        return found

    def _make_from_nearest(self, epoch: int) -> EpochPlan:
        """Plan `epoch`, and before it those that it takes kept pieces from and that are nowhere."""
        first, kept = epoch, None
        while self._cuts and first > 0:
            if self._tail is not None and self._tail[0] == first - 1:
                kept = self._tail[1]
                break
            before = self._plans.get(first - 1)
            if before is None and self._folder is not None:
                before = _read_plan(self._place(first - 1), self.pack_max_length)
            if before is not None:
                kept = before.kept()
                break
            first -= 1
        for current in range(first, epoch + 1):
            plan = self._make(current, kept)
            kept = plan.kept()
            self._tail = (current, kept)
            self._note_packs(current, plan.num_packs)
        return plan

    def _note_packs(self, epoch: int, num_packs: int) -> None:
        self._num_packs[epoch] = num_packs
        if self._folder is not None and self._makes:
            note = self._place(epoch).with_suffix(".packs")
            draft = note.with_name(f".{note.name}.{os.getpid()}.draft")
            with suppress(OSError):  # it will be planned again
                note.parent.mkdir(parents=True, exist_ok=True)
                draft.write_text(str(num_packs))
                os.replace(draft, note)

    def _publish(self, epoch: int, plan: EpochPlan) -> EpochPlan:
        """Write the plan for the others and map it; where that can't be done it stays in memory."""
        place = self._place(epoch)
        draft = place.with_name(f".{place.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.draft")
        try:
            draft.mkdir(parents=True)
            for older in draft.parent.glob(".epoch_*.draft"):  # of a process that was killed
                if time.time() - older.stat().st_mtime > _STALE_S:
                    shutil.rmtree(older, ignore_errors=True)
            _write_plan(draft, plan)
            shutil.rmtree(place, ignore_errors=True)  # a damaged one; a whole one would be open
            os.rename(draft, place)
        except OSError:
            shutil.rmtree(draft, ignore_errors=True)
        return _read_plan(place, self.pack_max_length) or plan

    def _make(self, epoch: int, kept: Pieces | None) -> EpochPlan:
        chosen = self._choose(epoch)
        counts = [len(part) for part in chosen]
        if sum(counts) == 0 and kept is None:
            names = ", ".join(
                f"{source.name} (sample_ratio {source.sample_ratio})" for source in self.sources
            )
            raise DataError(
                f"datasets: epoch {epoch} has no samples to train on; datasets: {names or 'none'}"
            )
        samples = np.concatenate(chosen)
        sources = np.repeat(np.arange(len(chosen), dtype=_source_type(len(chosen))), counts)
        lengths = np.concatenate(
            [source.store.lengths[part] for source, part in zip(self.sources, chosen, strict=True)]
        )
        first = None
        if kept is not None:
            assert kept.starts is not None and kept.stops is not None
            samples = np.concatenate([samples, kept.samples])
            sources = np.concatenate([sources, kept.sources.astype(sources.dtype)])
            first = np.zeros(len(samples), dtype=np.int64)
            first[len(lengths) :] = kept.starts
            lengths = np.concatenate([lengths, kept.stops - kept.starts])
        seed = derive_seed("packs", self._seed, epoch)
        packs = self._packer.plan(self._room_taken(lengths, chosen), self.pack_max_length, seed)
        order, offsets = packs.samples, packs.offsets
        starts = stops = None
        if packs.starts is not None and packs.stops is not None:
            moved = 0 if first is None else first[order]
            starts, stops = packs.starts + moved, packs.stops + moved
        elif first is not None:
            starts, stops = first[order], first[order] + lengths[order]
        elif self._cuts:
            starts, stops = np.zeros(len(order), dtype=np.int64), lengths[order]
        if offsets[-1] < len(order) and (epoch == self.last_epoch or len(offsets) == 1):
            offsets = np.append(offsets, len(order))  # less than one pack is left
        pieces = Pieces(sources[order], samples[order], starts, stops)
        if self._cuts:
            counts_by_source = self._count_pieces(pieces.part(0, int(offsets[-1])))
        elif offsets[-1] == len(order) == len(lengths):
            counts_by_source = self._count_whole(chosen)
        else:
            raise PluginError(
                f"packer {type(self._packer).__name__}: planned {int(offsets[-1])} of {len(lengths)} "
                "samples; only one with cuts_samples may leave some for the next epoch"
            )
        return EpochPlan(offsets, pieces, counts_by_source, self.pack_max_length)

    def _choose(self, epoch: int) -> list[np.ndarray]:
        """Indices of each source's samples in this epoch."""
        weights = [source.token_weight for source in self.sources]
        given = [weight for weight in weights if weight is not None]
        if given:
            if len(given) < len(weights):
                raise DataError("datasets: some have a token_weight and some have not")
            totals = [int(source.store.lengths.sum()) for source in self.sources]
            quotas = token_quotas(totals, given)
            return [
                sample_tokens(
                    source.store.lengths, quota, self._seed, source.name, epoch, source.draw
                )
                for source, quota in zip(self.sources, quotas, strict=True)
            ]
        return [
            sample_indices(
                len(source.store), source.sample_ratio, self._seed, source.name, epoch, source.draw
            )
            for source in self.sources
        ]

    def _room_taken(self, lengths: np.ndarray, chosen: Sequence[np.ndarray]) -> np.ndarray:
        """Lengths as a packer sees them: a sample takes the larger of its share of a pack's tokens
        and of its tiles, so no pack has more of either than it may."""
        most = self._max_tiles
        if most is None or all(source.store.num_tiles is None for source in self.sources):
            return lengths
        tiles = np.concatenate(
            [
                np.zeros(len(part), np.int64)
                if source.store.num_tiles is None
                else source.store.num_tiles[part].astype(np.int64)
                for source, part in zip(self.sources, chosen, strict=True)
            ]
        )
        tiles = np.append(tiles, np.zeros(len(lengths) - len(tiles), np.int64))
        taken: np.ndarray = np.maximum(lengths, -(-tiles * self.pack_max_length // most))
        return taken

    def _count_whole(self, chosen: Sequence[np.ndarray]) -> tuple[SourceCounts, ...]:
        """Counts of whole samples, per source."""
        found = []
        for source, part in zip(self.sources, chosen, strict=True):
            tokens = int(source.store.lengths[part].sum())
            targets = int(source.store.num_targets[part].sum(dtype=np.int64))
            found.append(SourceCounts(source.name, len(part), tokens, targets))
        return tuple(found)

    def _count_pieces(self, pieces: Pieces) -> tuple[SourceCounts, ...]:
        """Counts of cut samples, per source."""
        assert pieces.starts is not None and pieces.stops is not None
        found = []
        for position, source in enumerate(self.sources):
            mine = pieces.sources == position
            samples = pieces.samples[mine]
            targets = source.store.num_targets[samples].astype(np.int64)
            lengths = source.store.lengths[samples]
            starts, stops = pieces.starts[mine], pieces.stops[mine]
            sizes = stops - starts
            # Every token but the sample's first is predicted, also across a cut: where all of them
            # are supervised nothing need be read.
            cut = sizes < lengths
            every = cut & (targets == lengths - 1)
            targets[every] = np.minimum(stops, lengths - 1)[every] - starts[every]
            for index in np.flatnonzero(cut & ~every).tolist():
                mask = source.store[int(samples[index])].loss_mask
                targets[index] = int(mask[int(starts[index]) + 1 : int(stops[index]) + 1].sum())
            found.append(
                SourceCounts(source.name, len(samples), int(sizes.sum()), int(targets.sum()))
            )
        return tuple(found)


def data_identity(sources: Sequence[DataSource]) -> str:
    """Changes with anything of the datasets that changes which samples an epoch holds."""
    digest = hashlib.blake2b(digest_size=16)
    for source in sources:
        fields = (source.name, source.sample_ratio, source.draw, source.token_weight)
        digest.update(repr(fields).encode())
        digest.update(source.store.content_identity().encode())
    return digest.hexdigest()


def _check_source(
    source: DataSource, pack_max_length: int, max_tiles: int | None, cuts: bool
) -> None:
    lengths, tiles = source.store.lengths, source.store.num_tiles
    if cuts and tiles is not None and int(tiles.max()):
        index = int(np.argmax(tiles > 0))
        raise DataError(
            f"{source.store.key(index)}: holds media, which can't be cut, and dataloader.packer cuts "
            "samples; use one that keeps them whole, such as ExpandSoftPacker"
        )
    if not cuts and len(lengths) and int(lengths.max()) > pack_max_length:
        index = int(np.argmax(lengths > pack_max_length))
        raise DataError(
            f"{source.store.key(index)}: {int(lengths[index])} tokens, over pack_max_length "
            f"{pack_max_length}; set max_length of the tokenize_fn of dataset {source.name!r} to "
            f"at most {pack_max_length}"
        )
    if max_tiles is not None and tiles is not None and int(tiles.max()) > max_tiles:
        index = int(np.argmax(tiles > max_tiles))
        raise DataError(
            f"{source.store.key(index)}: {int(tiles[index])} image tiles, over max_tiles_per_pack "
            f"{max_tiles} of dataloader.collator; raise it, or lower max_dynamic_patch of the "
            "tokenize_fn"
        )


def _source_type(num_sources: int) -> type[np.integer[Any]]:
    return np.uint8 if num_sources < 2**8 else np.int32


def _write_plan(folder: Path, plan: EpochPlan) -> None:
    arrays: Mapping[str, np.ndarray | None] = {"offsets": plan.offsets, **plan.pieces._asdict()}
    for name, array in arrays.items():
        if array is None:
            continue
        if name != "offsets" and array.dtype == np.int64 and array.max(initial=0) < 2**31:
            array = array.astype(np.int32)
        np.save(folder / f"{name}.npy", array)
    meta = {
        "format_version": FORMAT_VERSION,
        "num_pieces": len(plan.pieces.samples),
        "counts": [asdict(source) for source in plan.counts],
    }
    (folder / "plan.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _read_plan(folder: Path, pack_max_length: int) -> EpochPlan | None:
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
        if meta["format_version"] == FORMAT_VERSION and sizes == {meta["num_pieces"]}:
            counts = tuple(SourceCounts(**source) for source in meta["counts"])
            return EpochPlan(offsets, Pieces(**arrays), counts, pack_max_length)
    return None


def _read_number(path: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int(path.read_text())
    return None
