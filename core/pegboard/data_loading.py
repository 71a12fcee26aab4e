"""From token stores to the micro-batches of each optimizer step.

An epoch is planned whole; a step is the next `global_batch_size` packs of its order. Which packs and
samples a step holds depends on nothing but data, config, seed and the cursor (epoch, pack): not on
ranks and not on workers. Only inside a step are packs dealt to ranks, so that all take as long.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pegboard.contracts import Batch, Collator, Packer
from pegboard.epoch_plan import DataSource, EpochPlan, Pieces
from pegboard.epoch_planner import EpochPlanner
from pegboard.errors import ConfigError
from pegboard.step_loader import BatchMaker, StepLoader

__all__ = ["Cursor", "DataSource", "EpochPlan", "PlanCache", "RunData", "deal_packs"]

_STEPS_APART = 64
"""More steps than ranks can be apart, what is prepared included."""

SampleCosts = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(lengths, vision tiles) of samples, float64 -> what training on each costs."""


class Cursor(NamedTuple):
    """A place in the run's order of packs: where a step begins. All that a checkpoint keeps of the
    data; the same at every number of ranks and workers."""

    epoch: int = 0
    """From 0."""
    pack: int = 0
    """Packs of the epoch that are done; always less than it has."""


@dataclass(frozen=True)
class PlanCache:
    """Where plans are kept, and who makes them.

    Args:
        folder: of all plans; each has a folder of its own name in it.
        makes: this process plans; others wait for its files.
    """

    folder: Path
    makes: bool = True


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
        packer_identity: changes with anything that changes the packer's result.
        plan_cache: keeps plans for other ranks and later starts; None plans in memory.
        last_epoch: the run's last, where it is known.
        sample_costs: what packs are dealt to ranks by; None: their tokens.
        num_workers: processes that make batches; 0 makes them in a thread.
        pin_memory: give batches in page-locked memory.

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
        packer_identity: str = "",
        plan_cache: PlanCache | None = None,
        last_epoch: int | None = None,
        sample_costs: SampleCosts | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        _check_batch_size(global_batch_size, data_world)
        self.sources = tuple(sources)
        self.pack_max_length = pack_max_length
        self.global_batch_size = global_batch_size
        self.micro_batches_per_step = global_batch_size // data_world
        self.planner = EpochPlanner(
            self.sources,
            packer=packer,
            pack_max_length=pack_max_length,
            seed=seed,
            max_tiles=getattr(collator, "max_tiles_per_pack", None),
            packer_identity=packer_identity,
            folder=plan_cache.folder if plan_cache else None,
            makes=plan_cache.makes if plan_cache else True,
            last_epoch=last_epoch,
        )
        self._sample_costs = sample_costs
        self._seed = seed
        self._data_rank = data_rank
        self._data_world = data_world
        self._loader = StepLoader(
            BatchMaker(self.sources, collator),
            num_workers=num_workers,
            pin_memory=pin_memory,
            # A worker makes one pack at a time: twice as many packs as workers keep all of them busy.
            steps_ahead=min(max(2, -(-2 * num_workers // self.micro_batches_per_step)), 32),
        )
        self._expected: Cursor | None = None

    def plan_epoch(self, epoch: int) -> EpochPlan:
        """The plan of `epoch` (from 0), the same on every rank."""
        return self.planner.plan(epoch)

    def steps_per_epoch(self, epoch: int) -> int:
        """Optimizer steps of `epoch`.

        No pack is dropped: the last step may hold fewer, and fillers for the rest.
        """
        return math.ceil(self.planner.num_packs(epoch) / self.global_batch_size)

    def steps_from(self, cursor: Cursor, num_epochs: int) -> int:
        """Optimizer steps from `cursor` to the end of `num_epochs` epochs."""
        if cursor.epoch >= num_epochs:
            return 0
        # From the last: what a cutting packer keeps is passed on, so it says the earlier ones too.
        epochs = reversed(range(cursor.epoch + 1, num_epochs))
        later = sum(self.steps_per_epoch(epoch) for epoch in epochs)
        rest = self.planner.num_packs(cursor.epoch) - cursor.pack
        return later + math.ceil(rest / self.global_batch_size)

    def next_cursor(self, cursor: Cursor) -> Cursor:
        """Where the step after the one at `cursor` begins; past the last pack, the next epoch."""
        pack = cursor.pack + self.global_batch_size
        if pack < self.planner.num_packs(cursor.epoch):
            return Cursor(cursor.epoch, pack)
        return Cursor(cursor.epoch + 1, 0)

    def nearest_cursor(self, cursor: Cursor) -> Cursor:
        """`cursor`, or the next epoch's start where the epoch has no such pack."""
        if cursor.pack < self.planner.num_packs(cursor.epoch):
            return cursor
        return Cursor(cursor.epoch + 1, 0)

    def batches_at(self, cursor: Cursor, *, steps_left: int | None = None) -> list[Batch]:
        """This rank's micro-batches of the step at `cursor`; as many on every rank and in every step.

        The steps after it are prepared in the background meanwhile. Call from one thread.

        Args:
            cursor: any; where it is not the one that follows, preparing starts anew.
            steps_left: steps that will be asked for, this one included: no more are prepared.
        """
        if cursor != self._expected:
            num_packs = self.planner.num_packs(cursor.epoch)
            if not 0 <= cursor.pack < num_packs:
                raise IndexError(
                    f"pack {cursor.pack} of epoch {cursor.epoch}, which has {num_packs}"
                )
            self._loader.start(islice(self._steps(cursor), steps_left))
        batches = self._loader.next_step()
        last = steps_left == 1
        self._expected = None if last else self.next_cursor(cursor)
        return batches

    def micro_batches(self, epoch: int, step_in_epoch: int) -> list[Batch]:
        """`batches_at` by number of the step in its epoch; nothing of the next epoch is prepared."""
        num_steps = self.steps_per_epoch(epoch)
        if not 0 <= step_in_epoch < num_steps:
            raise IndexError(f"step {step_in_epoch} of epoch {epoch}, which has {num_steps}")
        cursor = Cursor(epoch, step_in_epoch * self.global_batch_size)
        return self.batches_at(cursor, steps_left=num_steps - step_in_epoch)

    def start_workers(self, *, wait: bool = False) -> None:
        """Start worker processes early, as they take seconds to come up; `wait` until they are."""
        self._loader.start_workers(wait=wait)

    def close(self) -> None:
        """Stop the background work; a later call starts it again."""
        self._expected = None
        self.planner.stop()
        self._loader.close()
        self.planner.resume()

    def _steps(self, cursor: Cursor) -> Iterator[list[Pieces]]:
        """This rank's packs of each step from `cursor` on; planning happens in here."""
        while True:
            yield self._share(cursor)
            following = self.next_cursor(cursor)
            if following.epoch != cursor.epoch:
                # Other ranks are a few steps behind: in the epoch that ends, or, where epochs are
                # short, in one further back.
                long = self.steps_per_epoch(cursor.epoch) > _STEPS_APART
                self.planner.forget_before(cursor.epoch - (0 if long else _STEPS_APART))
            cursor = following

    def _share(self, cursor: Cursor) -> list[Pieces]:
        plan = self.plan_epoch(cursor.epoch)
        end = min(cursor.pack + self.global_batch_size, plan.num_packs)
        offsets = plan.offsets[cursor.pack : end + 1].astype(np.int64)
        pieces = plan.pieces.part(int(offsets[0]), int(offsets[-1]))
        pieces = pieces._replace(
            draws=self._first_draw(cursor.epoch)
            + offsets[0].astype(np.uint64)
            + np.arange(len(pieces.samples), dtype=np.uint64)
        )
        offsets -= offsets[0]
        packs = range(self.global_batch_size)
        if self._data_world > 1:
            costs = np.zeros(self.global_batch_size)
            costs[: end - cursor.pack] = np.add.reduceat(self._costs(pieces), offsets[:-1])
            packs = deal_packs(costs, self._data_world)[self._data_rank].tolist()
        # A pack past the last is a filler.
        offsets = np.append(offsets, np.full(self.global_batch_size, offsets[-1]))
        return [pieces.part(int(offsets[pack]), int(offsets[pack + 1])) for pack in packs]

    def _first_draw(self, epoch: int) -> np.uint64:
        digest = hashlib.blake2b(f"{self._seed} {epoch}".encode(), digest_size=7).digest()
        return np.uint64(int.from_bytes(digest, "little"))

    def _costs(self, pieces: Pieces) -> np.ndarray:
        """(n,) float64 cost of each piece."""
        lengths = np.empty(len(pieces.samples), dtype=np.float64)
        tiles = np.zeros(len(pieces.samples), dtype=np.float64)
        for position, source in enumerate(self.sources):
            mine = pieces.sources == position
            samples = pieces.samples[mine]
            lengths[mine] = source.store.lengths[samples]
            if source.store.num_tiles is not None:
                tiles[mine] = source.store.num_tiles[samples]
        if pieces.starts is not None and pieces.stops is not None:
            lengths = (pieces.stops - pieces.starts).astype(np.float64)
        return lengths if self._sample_costs is None else self._sample_costs(lengths, tiles)


def deal_packs(costs: np.ndarray, num_ranks: int) -> np.ndarray:
    """(num_ranks, packs per rank) int64 numbers of packs: who trains which, in which order.

    Ranks wait for each other in every micro-batch and at the end of the step, so packs go out from
    the costliest down, a round at a time, and in each round the rank that has least gets the most.

    Args:
        costs: (num_packs,) of one step; a multiple of `num_ranks`.
    """
    rounds = np.argsort(-costs, kind="stable").reshape(-1, num_ranks)
    dealt = np.empty((num_ranks, len(rounds)), dtype=np.int64)
    loads = np.zeros(num_ranks)
    for number, packs in enumerate(rounds):
        ranks = np.argsort(loads, kind="stable")
        dealt[ranks, number] = packs
        loads[ranks] += costs[packs]
    return dealt


def _check_batch_size(global_batch_size: int, data_world: int) -> None:
    below = global_batch_size // data_world * data_world
    if global_batch_size > 0 and below == global_batch_size:
        return
    nearest = [str(size) for size in (below, below + data_world) if size > 0]
    raise ConfigError(
        f"global_batch_size: {global_batch_size} packs can't be shared by {data_world} data ranks; "
        f"the nearest sizes that can: {' and '.join(nearest)}"
    )
