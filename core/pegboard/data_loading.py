"""From token stores to the micro-batches of each optimizer step.

An epoch is planned whole: which samples (`sample_ratio`), which share a pack (the packer), in which
order. Pack `step * global_batch_size + micro * data_world + rank` is micro-batch `micro` of `rank`,
so the order of packs is the same at every world size, and (epoch, step) is all the state there is.
The next step is collated in a thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from pegboard.contracts import Batch, Collator, Example, Packer
from pegboard.errors import ConfigError, DataError
from pegboard.sampling import derive_seed, sample_indices
from pegboard.token_store import TokenStore

__all__ = ["DataSource", "EpochPlan", "RunData"]


@dataclass(frozen=True)
class DataSource:
    """One dataset of the run."""

    store: TokenStore
    source_id: int
    """Index in the config's list of datasets."""
    name: str
    sample_ratio: float = 1.0
    may_skip: bool = False
    """`on_bad_record` is `skip`: a sample whose media can't be read is left out of its pack, and counted."""


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """Packs of one epoch as they train: pack i is places `offsets[i]` to `offsets[i+1]`."""

    offsets: np.ndarray
    """(num_packs+1,) int64."""
    sources: np.ndarray
    """(num_samples,) int32 position in the list of sources, in pack order."""
    samples: np.ndarray
    """(num_samples,) int64 index in that source's store, in pack order."""
    num_tokens: int
    fill: float
    """Real tokens / room in all packs, in (0, 1]."""

    @property
    def num_packs(self) -> int:
        return len(self.offsets) - 1


class RunData:
    """The run's data, as one data rank sees it.

    Args:
        sources: the datasets; what they hold must be the same on all ranks.
        packer: plans on the lengths of all sources together.
        collator: makes each pack, and a filler from no examples.
        pack_max_length: tokens of room in a pack.
        global_batch_size: packs per optimizer step, over all data ranks.
        data_rank: this rank among the data ranks, from 0.
        data_world: number of data ranks.
        seed: the run's seed.

    Raises:
        ConfigError: `global_batch_size` is not a multiple of `data_world`.
        DataError: a sample longer than a pack, or no samples at all.
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        *,
        packer: Packer,
        collator: Collator,
        pack_max_length: int,
        global_batch_size: int,
        data_rank: int = 0,
        data_world: int = 1,
        seed: int = 0,
    ) -> None:
        _check_batch_size(global_batch_size, data_world)
        self._max_tiles: int | None = getattr(collator, "max_tiles_per_pack", None)
        for source in sources:
            _check_lengths(source, pack_max_length)
            _check_tiles(source, self._max_tiles)
        self.sources = tuple(sources)
        self.pack_max_length = pack_max_length
        self.global_batch_size = global_batch_size
        self.micro_batches_per_step = global_batch_size // data_world
        self._packer = packer
        self._collator = collator
        self._data_rank = data_rank
        self._data_world = data_world
        self._seed = seed
        self._plan: tuple[int, EpochPlan] | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._next: tuple[tuple[int, int], Future[list[Batch]]] | None = None

    def plan_epoch(self, epoch: int) -> EpochPlan:
        """The plan of `epoch` (from 0), the same on every rank; the last one is kept."""
        if self._plan is None or self._plan[0] != epoch:
            self._plan = (epoch, self._make_plan(epoch))
        return self._plan[1]

    def steps_per_epoch(self, epoch: int) -> int:
        """Optimizer steps of `epoch`.

        No pack is dropped: the last step may hold fewer, and fillers for the rest.
        """
        return math.ceil(self.plan_epoch(epoch).num_packs / self.global_batch_size)

    def micro_batches(self, epoch: int, step_in_epoch: int) -> list[Batch]:
        """This rank's micro-batches of a step (from 0); as many on every rank and in every step.

        The step after it is prepared in the background meanwhile. Call from one thread.
        """
        num_steps = self.steps_per_epoch(epoch)
        if not 0 <= step_in_epoch < num_steps:
            raise IndexError(f"step {step_in_epoch} of epoch {epoch}, which has {num_steps}")
        plan = self.plan_epoch(epoch)
        prepared, self._next = self._next, None
        if prepared is not None and prepared[0] == (epoch, step_in_epoch):
            batches = prepared[1].result()
        else:
            batches = self._collate_step(plan, step_in_epoch)
        if step_in_epoch + 1 < num_steps:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="pegboard-data")
            future = self._thread.submit(self._collate_step, plan, step_in_epoch + 1)
            self._next = ((epoch, step_in_epoch + 1), future)
        return batches

    def close(self) -> None:
        """Stop the background thread; a later call starts it again."""
        self._next = None
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None

    def _make_plan(self, epoch: int) -> EpochPlan:
        chosen = [
            sample_indices(len(source.store), source.sample_ratio, self._seed, source.name, epoch)
            for source in self.sources
        ]
        num_samples = sum(len(samples) for samples in chosen)
        if num_samples == 0:
            names = ", ".join(
                f"{source.name} (sample_ratio {source.sample_ratio})" for source in self.sources
            )
            raise DataError(
                f"datasets: epoch {epoch} has no samples to train on; datasets: {names or 'none'}"
            )
        samples = np.concatenate(chosen)
        sources = np.repeat(np.arange(len(chosen), dtype=np.int32), [len(part) for part in chosen])
        lengths = np.concatenate(
            [source.store.lengths[part] for source, part in zip(self.sources, chosen, strict=True)]
        )
        seed = derive_seed("packs", self._seed, epoch)
        room = self._room_taken(lengths, chosen)
        packs = self._packer.plan(room, self.pack_max_length, seed)
        num_tokens = int(lengths.sum())
        room = (len(packs.offsets) - 1) * self.pack_max_length
        return EpochPlan(
            packs.offsets,
            sources[packs.samples],
            samples[packs.samples],
            num_tokens,
            num_tokens / room,
        )

    def _room_taken(self, lengths: np.ndarray, chosen: Sequence[np.ndarray]) -> np.ndarray:
        """Lengths as a packer sees them: a sample takes the larger of its share of a pack's tokens and of its
        tiles, so no pack has more of either than it may; equal to the lengths where tiles are few."""
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
        return np.maximum(lengths, -(-tiles * self.pack_max_length // most))

    def _collate_step(self, plan: EpochPlan, step: int) -> list[Batch]:
        first = step * self.global_batch_size + self._data_rank
        packs = range(first, (step + 1) * self.global_batch_size, self._data_world)
        return [self._collator(self._examples(plan, pack)) for pack in packs]

    def _examples(self, plan: EpochPlan, pack: int) -> list[Example]:
        """Examples of a pack; none past the last."""
        if pack >= plan.num_packs:
            return []
        span = slice(int(plan.offsets[pack]), int(plan.offsets[pack + 1]))
        examples = []
        for position, index in zip(
            plan.sources[span].tolist(), plan.samples[span].tolist(), strict=True
        ):
            source = self.sources[position]
            example = source.store[index]
            examples.append(replace(example, source_id=source.source_id, may_skip=source.may_skip))
        return examples


def _check_batch_size(global_batch_size: int, data_world: int) -> None:
    below = global_batch_size // data_world * data_world
    if global_batch_size > 0 and below == global_batch_size:
        return
    nearest = [str(size) for size in (below, below + data_world) if size > 0]
    raise ConfigError(
        f"global_batch_size: {global_batch_size} packs can't be shared by {data_world} data ranks; "
        f"the nearest sizes that can: {' and '.join(nearest)}"
    )


def _check_lengths(source: DataSource, pack_max_length: int) -> None:
    lengths = source.store.lengths
    if len(lengths) and int(lengths.max()) > pack_max_length:
        index = int(np.argmax(lengths > pack_max_length))
        raise DataError(
            f"{source.store.key(index)}: {int(lengths[index])} tokens, over pack_max_length "
            f"{pack_max_length}; set max_length of the tokenize_fn of dataset {source.name!r} to "
            f"at most {pack_max_length}"
        )


def _check_tiles(source: DataSource, most: int | None) -> None:
    tiles = source.store.num_tiles
    if most is not None and tiles is not None and int(tiles.max()) > most:
        index = int(np.argmax(tiles > most))
        raise DataError(
            f"{source.store.key(index)}: {int(tiles[index])} image tiles, over max_tiles_per_pack {most} "
            "of dataloader.collator; raise it, or lower max_dynamic_patch of the tokenize_fn"
        )
