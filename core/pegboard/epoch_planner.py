"""Plans epochs, or maps the plans that were made before.

An epoch is planned whole, from (data, config, seed, epoch) and nothing else, so every process that
plans it gets the same. Local rank 0 plans, writes flat files and renames their folder into place
(`<folder>/<fingerprint>/epoch_00003/`); the other ranks, and later starts, map them (a small set
every rank plans for itself). What a packer leaves over goes into the next epoch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pegboard.contracts import Packer
from pegboard.epoch_plan import (
    PLAN_VERSION,
    DataSource,
    EpochPlan,
    Pieces,
    SourceCounts,
    read_number,
    read_plan,
    write_plan,
)
from pegboard.errors import DataError, PluginError
from pegboard.sampling import derive_seed, sample_indices, sample_tokens, token_quotas
from pegboard.token_store import TokenStore

__all__ = ["EpochPlanner", "PlanningStopped", "data_identity"]

_COUNT_AT_ONCE = 1 << 20
"""Pieces that are counted together: each takes some 60 bytes meanwhile."""
_POLL_S = 0.05
_STALE_S = 3600.0
_WAIT_S = 10.0
_WAIT_S_PER_SAMPLE = 2e-5
_Found = TypeVar("_Found")


class PlanningStopped(Exception):
    """This process was told to stop while it waited for another's plan; no error of anybody's."""


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
        self._ended: frozenset[int] = frozenset()
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
                plan = self._read_or_wait(lambda: read_plan(place, self.pack_max_length))
                if plan is None:
                    plan = self._make_from_nearest(epoch)
                self._plans[epoch] = plan
                self._num_packs[epoch] = plan.num_packs
            return plan

    def num_packs(self, epoch: int) -> int:
        """Packs of `epoch`; kept, so that it is planned for this once."""
        if epoch in self._num_packs:
            return self._num_packs[epoch]
        with self._lock:
            note = self._place(epoch).with_suffix(".packs")
            found = self._read_or_wait(lambda: read_number(note))
            if found is None:
                found = self._make_from_nearest(epoch).num_packs
            self._num_packs[epoch] = found
            return found

    def prepare(self, epoch: int) -> None:
        """See that the plan of `epoch` is on disk, where plans are kept there; hold on to nothing."""
        with self._lock:
            place = self._place(epoch)
            if self.keeps_files and read_plan(place, self.pack_max_length) is None:
                self._make_from_nearest(epoch)

    @property
    def keeps_files(self) -> bool:
        """Whether this process writes its plans for others and for later starts."""
        return self._folder is not None and self._makes

    def forget_before(self, epoch: int) -> None:
        """Let go of earlier epochs' plans, here and on disk."""
        for old in [old for old in self._plans if old < epoch]:
            del self._plans[old]
        if self._folder is not None and self._makes:
            for place in self._folder.glob("epoch_*"):
                number = place.name.split("_")[1]
                if number.isdigit() and int(number) < epoch:
                    shutil.rmtree(place, ignore_errors=True)

    def end_epochs(self, epochs: Iterable[int]) -> None:
        """Epochs that trained all they had when they were a run's last: the next takes nothing over."""
        with self._lock:
            self._ended |= frozenset(epochs)
            self._plans.clear()
            self._num_packs.clear()
            self._tail = None

    def ended_before(self, epoch: int) -> list[int]:
        """Epochs before `epoch` that left nothing for the next, in order."""
        last = {self.last_epoch} if self.last_epoch is not None else set()
        return sorted(ended for ended in self._ended | last if ended < epoch)

    def identity(self) -> dict[str, str]:
        """Part -> what stands for it; equal parts give equal plans."""
        return {
            "datasets": data_identity(self.sources),
            "packer": f"{PLAN_VERSION} {self._packer_identity} {self._max_tiles}",
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
        parts = json.dumps([PLAN_VERSION, self.identity()], sort_keys=True)
        return hashlib.sha256(parts.encode()).hexdigest()[:24]

    def _place(self, epoch: int) -> Path:
        folder = self._folder or Path()  # not read then
        # What is passed on from epoch to epoch depends on where that begins and ends.
        begins = f"_from_{first:05}" if self._cuts and (first := self._first_of_run(epoch)) else ""
        last = "_last" if self._cuts and self._is_last(epoch) else ""
        return folder / f"epoch_{epoch:05}{begins}{last}"

    def _is_last(self, epoch: int) -> bool:
        """Whether it keeps nothing for another."""
        return epoch == self.last_epoch or epoch in self._ended

    def _first_of_run(self, epoch: int) -> int:
        """The first of the epochs that pass on what they keep, down to `epoch`."""
        return max((ended + 1 for ended in self.ended_before(epoch)), default=0)

    def _read_or_wait(self, read: Callable[[], _Found | None]) -> _Found | None:
        """What is on disk; a process that doesn't plan waits until it is there."""
        if self._folder is None:
            return None
        found = read()
        if found is not None:
            with suppress(OSError):  # for `pegboard cache`: it is in use
                os.utime(self._folder)
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
        while self._cuts and first > self._first_of_run(epoch):
            if self._tail is not None and self._tail[0] == first - 1:
                kept = self._tail[1]
                break
            before = self._plans.get(first - 1)
            if before is None and self._folder is not None:
                before = read_plan(self._place(first - 1), self.pack_max_length)
            if before is not None:
                kept = before.kept()
                break
            first -= 1
        for current in range(first, epoch + 1):
            plan = self._make(current, kept)
            if self.keeps_files:
                plan = self._publish(current, plan)
            kept = plan.kept()
            self._tail = (current, kept)
            self._note_packs(current, plan.num_packs)
        return plan

    def _note_packs(self, epoch: int, num_packs: int) -> None:
        self._num_packs[epoch] = num_packs
        if self.keeps_files:
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
            write_plan(draft, plan)
            # Another machine's, made meanwhile, stays: its ranks have it mapped, and a file system
            # over the network may take a removed file from under them.
            if read_plan(place, self.pack_max_length) is None:
                shutil.rmtree(place, ignore_errors=True)  # a damaged one
            os.rename(draft, place)
        except OSError:
            shutil.rmtree(draft, ignore_errors=True)
        return read_plan(place, self.pack_max_length) or plan

    def _make(self, epoch: int, kept: Pieces | None) -> EpochPlan:
        samples, sizes = self._choose(epoch)
        if not len(samples) and kept is None:
            names = ", ".join(
                f"{source.name} (sample_ratio {source.sample_ratio})" for source in self.sources
            )
            raise DataError(
                f"datasets: epoch {epoch} has no samples to train on; datasets: {names or 'none'}"
            )
        seed = derive_seed("packs", self._seed, epoch)
        if self._cuts:
            return self._make_cut(samples, sizes, kept, seed, is_last=self._is_last(epoch))
        return self._make_whole(samples, sizes, seed)

    def _make_whole(self, samples: np.ndarray, sizes: Sequence[int], seed: int) -> EpochPlan:
        lengths = self._gather("lengths", samples, sizes)
        counts = self._count_whole(samples, lengths, sizes)
        lengths = self._room_taken(lengths, samples, sizes)
        offsets, order, *_ = self._packer.plan(lengths, self.pack_max_length, seed)
        if not offsets[-1] == len(order) == len(samples):
            raise PluginError(
                f"packer {type(self._packer).__name__}: planned {int(offsets[-1])} of {len(samples)} "
                "samples; only one with cuts_samples may leave some for the next epoch"
            )
        # Of many samples each array counts: what was needed to plan is let go first.
        del lengths
        pieces = Pieces(_sources_of(sizes, order), samples[order])
        return EpochPlan(offsets, pieces, counts, self.pack_max_length)

    def _make_cut(
        self,
        samples: np.ndarray,
        sizes: Sequence[int],
        kept: Pieces | None,
        seed: int,
        *,
        is_last: bool,
    ) -> EpochPlan:
        lengths = self._gather("lengths", samples, sizes)
        num_new, first = len(samples), None
        if kept is not None:
            assert kept.starts is not None and kept.stops is not None
            samples = np.concatenate([samples, kept.samples.astype(samples.dtype)])
            first = np.zeros(len(samples), dtype=kept.starts.dtype)
            first[num_new:] = kept.starts
            lengths = np.concatenate([lengths, kept.stops - kept.starts])
        packs = self._packer.plan(lengths, self.pack_max_length, seed)
        order, offsets = packs.samples, packs.offsets
        starts = np.zeros(len(order), dtype=np.int32) if packs.starts is None else packs.starts
        stops = lengths[order] if packs.stops is None else packs.stops
        if first is not None:
            moved = first[order]
            starts, stops = starts + moved, stops + moved
        if offsets[-1] < len(order) and (is_last or len(offsets) == 1):
            offsets = np.append(offsets, len(order))  # less than one pack is left
        if kept is None:
            sources = _sources_of(sizes, order)
        else:
            sources = np.repeat(np.arange(len(sizes), dtype=_source_type(len(sizes))), sizes)
            sources = np.concatenate([sources, kept.sources.astype(sources.dtype)])[order]
        pieces = Pieces(sources, samples[order], starts, stops)
        counts = self._count_pieces(pieces.part(0, int(offsets[-1])))
        return EpochPlan(offsets, pieces, counts, self.pack_max_length)

    def _choose(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """Samples of this epoch, source after source, and how many of each source."""
        weights = [source.token_weight for source in self.sources]
        given = [weight for weight in weights if weight is not None]
        if given:
            if len(given) < len(weights):
                raise DataError("datasets: some have a token_weight and some have not")
            totals = [int(source.store.lengths.sum()) for source in self.sources]
            quotas = token_quotas(totals, given)
            chosen = [
                sample_tokens(
                    source.store.lengths, quota, self._seed, source.name, epoch, source.draw
                )
                for source, quota in zip(self.sources, quotas, strict=True)
            ]
        else:
            chosen = [
                sample_indices(
                    len(source.store),
                    source.sample_ratio,
                    self._seed,
                    source.name,
                    epoch,
                    source.draw,
                )
                for source in self.sources
            ]
        sizes = [len(part) for part in chosen]
        if len(chosen) == 1:
            return chosen[0], sizes
        return np.concatenate([np.empty(0, dtype=np.int32), *chosen]), sizes

    def _gather(self, column: str, samples: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
        """(num_samples,) int32 column of the stores; 0 for a store that doesn't have it."""
        found = np.zeros(len(samples), dtype=np.int32)
        at = 0
        for source, size in zip(self.sources, sizes, strict=True):
            values = getattr(source.store, column)
            if values is not None:
                # All are in range: mode "raise" would make a copy of what it writes.
                np.take(values, samples[at : at + size], out=found[at : at + size], mode="clip")
            at += size
        return found

    def _room_taken(
        self, lengths: np.ndarray, samples: np.ndarray, sizes: Sequence[int]
    ) -> np.ndarray:
        """Lengths as a packer sees them: a sample takes the larger of its share of a pack's tokens
        and of its tiles, so no pack has more of either than it may."""
        most = self._max_tiles
        if most is None or all(source.store.num_tiles is None for source in self.sources):
            return lengths
        tiles = self._gather("num_tiles", samples, sizes).astype(np.int64)
        taken: np.ndarray = np.maximum(lengths, -(-tiles * self.pack_max_length // most))
        return taken

    def _count_whole(
        self, samples: np.ndarray, lengths: np.ndarray, sizes: Sequence[int]
    ) -> tuple[SourceCounts, ...]:
        """Counts of whole samples, per source."""
        targets = self._gather("num_targets", samples, sizes)
        found = []
        at = 0
        for source, size in zip(self.sources, sizes, strict=True):
            tokens, targets_here = (
                int(values[at : at + size].sum(dtype=np.int64)) for values in (lengths, targets)
            )
            found.append(SourceCounts(source.name, size, tokens, targets_here))
            at += size
        return tuple(found)

    def _count_pieces(self, pieces: Pieces) -> tuple[SourceCounts, ...]:
        """Counts of cut samples, per source."""
        sums = np.zeros((len(self.sources), 3), dtype=np.int64)
        for first in range(0, len(pieces.samples), _COUNT_AT_ONCE):
            block = pieces.part(first, first + _COUNT_AT_ONCE)
            for position, source in enumerate(self.sources):
                sums[position] += _count_block(source.store, position, block)
        return tuple(
            SourceCounts(source.name, *map(int, row))
            for source, row in zip(self.sources, sums, strict=True)
        )


def _count_block(store: TokenStore, position: int, pieces: Pieces) -> tuple[int, int, int]:
    """(pieces, tokens, targets) of one source."""
    assert pieces.starts is not None and pieces.stops is not None
    mine = pieces.sources == position
    samples = pieces.samples[mine]
    targets = store.num_targets[samples].astype(np.int64)
    lengths = store.lengths[samples]
    starts, stops = pieces.starts[mine], pieces.stops[mine]
    sizes = stops - starts
    # Every token but the sample's first is predicted, also across a cut: where all of them are
    # supervised nothing need be read.
    cut = sizes < lengths
    every = cut & (targets == lengths - 1)
    targets[every] = np.minimum(stops, lengths - 1)[every] - starts[every]
    for index in np.flatnonzero(cut & ~every).tolist():
        mask = store[int(samples[index])].loss_mask
        targets[index] = int(mask[int(starts[index]) + 1 : int(stops[index]) + 1].sum())
    return len(samples), int(sizes.sum(dtype=np.int64)), int(targets.sum())


def _sources_of(sizes: Sequence[int], order: np.ndarray) -> np.ndarray:
    """Position of the source of each sample, of samples that stand source after source."""
    dtype = _source_type(len(sizes))
    if len(sizes) == 1:
        return np.zeros(len(order), dtype=dtype)
    found: np.ndarray = np.repeat(np.arange(len(sizes), dtype=dtype), sizes)[order]
    return found


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
