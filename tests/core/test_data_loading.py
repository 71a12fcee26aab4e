"""Steps hold the same packs at every world size and number of workers; samples train as often as
ratios say, none is dropped and none repeated to fill up."""

from __future__ import annotations

import dataclasses
import importlib
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pegboard import Batch, ConfigError, DataError, Example, SampleKey, step_loader
from pegboard.data_loading import Cursor, DataSource, RunData, deal_packs
from pegboard.step_loader import _who_died
from pegboard.token_store import TokenStore, build_store
from pegboard_plugins.collators.component import SFTLLMCollator
from pegboard_plugins.packers.component import ExpandSoftPacker, NoPacker, SoftPacker

PACK = 16


class Numbers:
    """A dataset of records {"n": length, "at": index}."""

    def __init__(self, name: str, lengths: Sequence[int]) -> None:
        self.name = name
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return {"n": self.lengths[index], "at": index}

    def key(self, index: int) -> SampleKey:
        return SampleKey(self.name, f"{self.name}.jsonl", index + 1)

    def fingerprint(self) -> None:
        return None


class Repeat:
    """Tokens that are all the record's index."""

    max_length = PACK

    def __call__(self, record: Mapping[str, Any]) -> list[Example]:
        ids = np.full(record["n"], record["at"], dtype=np.int32)
        return [Example(input_ids=ids, loss_mask=np.ones(len(ids), dtype=np.bool_))]

    def take_counts(self) -> Mapping[str, int]:
        return {}

    def fingerprint(self) -> str:
        return "repeat"


@pytest.fixture
def stores(tmp_path: Path) -> dict[str, TokenStore]:
    rng = np.random.default_rng(0)
    return {
        name: build_store(
            tmp_path / name,
            Numbers(name, rng.integers(1, PACK + 1, count).tolist()),
            Repeat(),
            name=name,
        )
        for name, count in (("a", 60), ("b", 33))
    }


def run_data(
    stores: dict[str, TokenStore], *, rank: int = 0, world: int = 1, batch: int = 4, **fields: Any
) -> RunData:
    ratios = fields.pop("ratios", {"a": 1.0, "b": 2.5})
    sources = [
        DataSource(store, source_id, name, ratios[name])
        for source_id, (name, store) in enumerate(stores.items())
    ]
    return RunData(
        sources,
        packer=fields.pop("packer", ExpandSoftPacker(ExpandSoftPacker.Config())).build(),
        collator=fields.pop(
            "collator", SFTLLMCollator(SFTLLMCollator.Config()).build(pad_token_id=0)
        ),
        pack_max_length=fields.pop("pack_max_length", PACK),
        global_batch_size=batch,
        data_rank=rank,
        data_world=world,
        **fields,
    )


def epoch_of(data: RunData, epoch: int = 0) -> list[list[Batch]]:
    return [data.micro_batches(epoch, step) for step in range(data.steps_per_epoch(epoch))]


def test_every_sample_trains_as_often_as_its_ratio_says(stores: dict[str, TokenStore]) -> None:
    for packer in (ExpandSoftPacker(ExpandSoftPacker.Config()), SoftPacker(SoftPacker.Config())):
        data = run_data(stores, packer=packer)
        times = Counter(key for step in epoch_of(data) for batch in step for key in batch.keys)
        by_source: dict[str, list[int]] = {"a": [], "b": []}
        for key, count in times.items():
            by_source[key.source].append(count)
        assert by_source["a"] == [1] * 60
        assert sorted(by_source["b"]) == [2] * 17 + [3] * 16


def rows(batches: Iterable[Batch]) -> list[Any]:
    """What a step trains on, in no order."""
    return sorted((batch.keys, batch.input_ids_T.tolist()) for batch in batches)


@pytest.mark.parametrize("world", [2, 4])
def test_a_step_holds_the_same_packs_at_every_world_size(
    stores: dict[str, TokenStore], world: int
) -> None:
    alone = epoch_of(run_data(stores))
    ranks = [epoch_of(run_data(stores, rank=rank, world=world)) for rank in range(world)]
    for step, expected in enumerate(alone):
        shares = [rank[step] for rank in ranks]
        assert all(len(share) == 4 // world for share in shares)
        assert rows(batch for share in shares for batch in share) == rows(expected)


def test_a_single_rank_trains_packs_in_the_order_of_the_plan(
    stores: dict[str, TokenStore],
) -> None:
    data = run_data(stores)
    plan = data.plan_epoch(0)
    found = [key for step in epoch_of(data) for batch in step for key in batch.keys]
    names = list(stores)
    planned = [
        stores[names[source]].key(sample)
        for source, sample in zip(plan.sources.tolist(), plan.samples.tolist(), strict=True)
    ]
    assert found == planned


def test_workers_change_nothing(stores: dict[str, TokenStore]) -> None:
    expected = epoch_of(run_data(stores, batch=6))
    data = run_data(stores, batch=6, num_workers=1)
    try:
        data.start_workers(wait=True)
        found = epoch_of(data)
        again = data.micro_batches(0, 3)
    finally:
        data.close()
    assert [[vars_of(b) for b in step] for step in found] == [
        [vars_of(b) for b in step] for step in expected
    ]
    assert [vars_of(b) for b in again] == [vars_of(b) for b in expected[3]]


# Spawned workers import what they unpickle: this becomes a module on their path.
COLLATE_MODULE = '''
import os
import time
from pegboard_plugins.collators.component import SFTLLMCollator

class Uneven:
    """Takes longer for some packs than for others, so that they are not done in their order."""

    def __init__(self):
        self.collate = SFTLLMCollator(SFTLLMCollator.Config()).build(pad_token_id=0)

    def __call__(self, examples):
        batch = self.collate(examples)
        time.sleep(batch.num_tokens * 7 % 5 / 500)
        batch.extras["made_by"] = os.getpid()
        return batch

def wait_for_all(folder, number):
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < number:
        time.sleep(0.01)
'''


class KeptPool(ProcessPoolExecutor):
    """A pool that the loaders of all ranks use, as one process stands for all of them here."""

    def shutdown(self, *args: Any, **kwargs: Any) -> None:
        """Not yet."""


@pytest.fixture
def uneven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A collator; workers are started once for each number of them."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "uneven_collator.py").write_text(COLLATE_MODULE)
    monkeypatch.syspath_prepend(str(folder))
    module = importlib.import_module("uneven_collator")
    pools: dict[int, KeptPool] = {}

    def kept(number: int, **fields: Any) -> KeptPool:
        if number not in pools:
            pools[number] = pool = KeptPool(number, **fields)
            started = tmp_path / f"{number} started"
            started.mkdir()
            for waiting in [
                pool.submit(module.wait_for_all, started, number) for _ in range(number)
            ]:
                waiting.result()
        return pools[number]

    monkeypatch.setattr(step_loader, "ProcessPoolExecutor", kept)
    yield module.Uneven()
    for pool in pools.values():
        ProcessPoolExecutor.shutdown(pool)


@pytest.mark.slow
def test_any_number_of_ranks_and_workers_sees_the_same_order_of_samples(
    stores: dict[str, TokenStore], uneven: Any
) -> None:
    """Each of 1, 2, 4 ranks with each of 0, 1, 4 workers, from the middle of an epoch into the next."""
    begin, batch_size, num_steps = Cursor(0, 24), 4, 24

    def steps_of(rank: int, world: int, workers: int) -> list[list[Batch]]:
        data = run_data(
            stores, rank=rank, world=world, num_workers=workers, batch=batch_size, collator=uneven
        )
        data.start_workers(wait=True)
        cursor, steps = begin, []
        for left in range(num_steps, 0, -1):
            steps.append(data.batches_at(cursor, steps_left=left))
            cursor = data.next_cursor(cursor)
        data.close()
        assert cursor.epoch == 1 and cursor.pack
        return steps

    planned = []
    data = run_data(stores)
    for epoch in (0, 1):
        plan = data.plan_epoch(epoch)
        packs = [
            tuple(
                stores["ab"[source]].key(sample)
                for source, sample in zip(pack.sources.tolist(), pack.samples.tolist(), strict=True)
            )
            for pack in map(plan.pieces.part, plan.offsets[:-1].tolist(), plan.offsets[1:].tolist())
        ]
        packs += [()] * (-len(packs) % batch_size)  # fillers
        planned += [packs[at : at + batch_size] for at in range(0, len(packs), batch_size)]
    expected = planned[begin.pack // batch_size :][:num_steps]
    makers: dict[int, set[int]] = {0: set(), 1: set(), 4: set()}
    for world in (1, 2, 4):
        without_workers = None
        for workers in (0, 1, 4):
            ranks = [steps_of(rank, world, workers) for rank in range(world)]
            everything = [batch for rank in ranks for step in rank for batch in step]
            makers[workers] |= {batch.extras["made_by"] for batch in everything}
            for batch in everything:
                batch.extras = {}
            shares = [[[b.keys for b in step] for step in rank] for rank in ranks]
            assert [sorted(sum(step, [])) for step in zip(*shares, strict=True)] == [
                sorted(step) for step in expected
            ], (world, workers)
            if world == 1:
                assert shares[0] == expected
            found = [vars_of(batch) for batch in everything]
            without_workers = without_workers or found
            assert found == without_workers, (world, workers)
    assert makers[0] == {os.getpid()} and not makers[1] & makers[0]
    assert len(makers[1]) == 1 and len(makers[4] - makers[0]) == 4


def vars_of(batch: Batch) -> dict[str, Any]:
    """Everything in a batch, in comparable form."""

    def plain(value: Any) -> Any:
        return (str(value.dtype), value.tolist()) if isinstance(value, torch.Tensor) else value

    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    targets = {name: plain(value) for name, value in fields.pop("targets")._asdict().items()}
    return {name: plain(value) for name, value in fields.items()} | targets


def test_a_worker_that_dies_is_an_error_and_no_hang(stores: dict[str, TokenStore]) -> None:
    data = run_data(stores, num_workers=1)
    try:
        data.start_workers(wait=True)
        data.micro_batches(0, 0)
        (child,) = multiprocessing.active_children()
        child.kill()
        killed = time.monotonic()
        with pytest.raises(DataError, match="a data worker process died") as caught:
            epoch_of(data)
        assert time.monotonic() - killed < 5
    finally:
        data.close()
    assert f"(process {child.pid}, killed by SIGKILL, perhaps for" in str(caught.value)


def test_workers_go_on_after_a_sigterm_for_the_rank_has_a_step_to_finish(
    stores: dict[str, TokenStore],
) -> None:
    data = run_data(stores, num_workers=2)
    try:
        data.start_workers(wait=True)
        data.micro_batches(0, 0)
        children = multiprocessing.active_children()
        for child in children:
            assert child.pid is not None
            os.kill(child.pid, signal.SIGTERM)  # as torchrun does to a rank's whole group
        keys = [[batch.keys for batch in step] for step in epoch_of(data)]
        assert keys == [[batch.keys for batch in step] for step in epoch_of(run_data(stores))]
        assert [child.exitcode for child in children] == [None, None]
        children[0].kill()
        with pytest.raises(DataError, match="a data worker process died") as caught:
            epoch_of(data)
        assert f"(process {children[0].pid}, killed by SIGKILL" in str(caught.value)
    finally:
        data.close()
    assert not multiprocessing.active_children()


def test_of_several_workers_the_one_that_died_by_itself_is_named() -> None:
    def ended(*codes: int | None) -> str:
        return _who_died([SimpleNamespace(pid=70 + i, exitcode=c) for i, c in enumerate(codes)])

    assert ended(-26, -11, None) == "process 71, killed by SIGSEGV"
    assert ended(3, -26) == "process 70, exit code 3"
    assert ended(-15, -26) == "process 70, killed by SIGTERM"
    assert ended(-26, -26) == "process 70, killed by SIGVTALRM; or process 71, killed by SIGVTALRM"
    assert ended(-40) == "process 70, killed by signal 40"


def test_an_error_in_the_background_is_raised_where_the_step_is_asked_for(
    stores: dict[str, TokenStore],
) -> None:
    data = run_data(stores, collator=Refusing(5))
    with pytest.raises(DataError, match="no more than 5"):
        epoch_of(data)
    data.close()


class Refusing:
    """A collator that fails after a number of packs."""

    def __init__(self, limit: int) -> None:
        self.limit, self.calls = limit, 0
        self.collate = SFTLLMCollator(SFTLLMCollator.Config()).build(pad_token_id=0)

    def __call__(self, examples: Sequence[Example]) -> Batch:
        self.calls += 1
        if self.calls > self.limit:
            raise DataError(f"no more than {self.limit}")
        return self.collate(examples)


def test_packs_are_dealt_so_that_ranks_take_as_long() -> None:
    rng = np.random.default_rng(0)
    for num_ranks, rounds in ((2, 3), (4, 4), (8, 16)):
        costs = rng.lognormal(0, 1, num_ranks * rounds)
        dealt = deal_packs(costs, num_ranks)
        assert sorted(dealt.ravel().tolist()) == list(range(len(costs)))
        assert dealt.shape == (num_ranks, rounds)
        even = costs.sum() / num_ranks
        worst = costs[dealt].sum(axis=1).max()
        assert worst <= max(1.1 * even, costs.max() * 1.5)
        assert worst <= costs.reshape(rounds, num_ranks).sum(axis=0).max()
        # In each round the packs cost about the same: ranks wait for each other there, too.
        spread = costs[dealt].max(axis=0) - costs[dealt].min(axis=0)
        assert (
            spread[:-1] <= costs[dealt].max(axis=0)[:-1] - costs[dealt].max(axis=0)[1:] + 1e-9
        ).all()


def test_ranks_are_balanced_by_what_the_model_says_a_sample_costs(
    stores: dict[str, TokenStore],
) -> None:
    def square(lengths: np.ndarray, tiles: np.ndarray) -> np.ndarray:
        assert not tiles.any()
        return lengths**2

    def worst(costs: Any) -> float:
        """Sum over steps of the costliest rank's cost, over an even share."""
        ranks = [
            run_data(
                stores,
                rank=r,
                world=2,
                batch=8,
                packer=NoPacker(NoPacker.Config()),
                sample_costs=costs,
            )
            for r in range(2)
        ]
        total = 0.0
        for steps in zip(*map(epoch_of, ranks), strict=True):
            loads = [sum(float(b.num_tokens) ** 2 for b in share) for share in steps]
            total += max(loads) / (sum(loads) / 2)
        return total

    assert worst(square) < worst(lambda lengths, tiles: np.ones_like(lengths))


def test_a_cursor_goes_from_the_last_pack_of_an_epoch_to_the_first_of_the_next(
    stores: dict[str, TokenStore],
) -> None:
    data = run_data(stores, batch=7)
    cursor, seen = Cursor(), []
    for _ in range(data.steps_per_epoch(0) + data.steps_per_epoch(1)):
        seen.append(cursor)
        assert data.batches_at(cursor)
        cursor = data.next_cursor(cursor)
    data.close()
    assert cursor == Cursor(2, 0)
    assert [c for c in seen if c.pack == 0] == [Cursor(0, 0), Cursor(1, 0)]
    assert data.steps_from(Cursor(), 2) == len(seen)
    assert [data.steps_from(c, 2) for c in seen] == list(range(len(seen), 0, -1))
    assert data.steps_from(Cursor(2, 0), 2) == 0


def test_the_order_of_packs_does_not_depend_on_the_batch_size(
    stores: dict[str, TokenStore],
) -> None:
    """So a run goes on with another batch size and no sample is lost or seen twice."""

    def keys(data: RunData, cursor: Cursor) -> list[Any]:
        found = []
        while cursor.epoch == 0:
            found += [batch.keys for batch in data.batches_at(cursor) if batch.keys]
            cursor = data.next_cursor(cursor)
        data.close()
        return found

    whole = keys(run_data(stores, batch=2), Cursor())
    assert keys(run_data(stores, batch=6), Cursor(0, 10)) == whole[10:]


def test_a_batch_holds_what_the_store_holds(stores: dict[str, TokenStore]) -> None:
    for step in epoch_of(run_data(stores)):
        for batch in step:
            assert batch.num_tokens <= PACK
            bounds = batch.cu_seqlens.tolist()
            for i, key in enumerate(batch.keys):
                ids = batch.input_ids_T[bounds[i] : bounds[i + 1]].tolist()
                assert ids == stores[key.source][key.line - 1].input_ids.tolist()
            sources = {{"a": 0, "b": 1}[key.source] for key in batch.keys}
            assert set(batch.targets.source_ids_K.tolist()) <= sources


def test_the_last_step_is_filled_so_that_no_rank_is_short(stores: dict[str, TokenStore]) -> None:
    batch_size = 7
    data = run_data(stores, batch=batch_size)
    num_packs = data.plan_epoch(0).num_packs
    assert num_packs % batch_size, "choose a batch size that leaves a rest"
    steps = epoch_of(data)
    assert [len(step) for step in steps] == [batch_size] * len(steps)
    fillers = [batch for batch in steps[-1] if not batch.keys]
    assert len(fillers) == -num_packs % batch_size
    assert all(b.num_tokens == 0 and len(b.targets.labels_K) == 0 for b in fillers)
    assert all(batch.keys for step in steps[:-1] for batch in step)


def test_epochs_differ_and_a_seed_fixes_them(stores: dict[str, TokenStore]) -> None:
    def keys(epoch: int, seed: int = 0) -> list[Any]:
        data = run_data(stores, seed=seed)
        return [batch.keys for step in epoch_of(data, epoch) for batch in step]

    assert keys(1) == keys(1)
    assert keys(0) != keys(1)
    assert keys(0, seed=1) != keys(0)
    packs = [{frozenset(pack) for pack in keys(epoch)} for epoch in (0, 1)]
    assert len(packs[0] & packs[1]) < len(packs[0]) / 2, "packs are formed anew each epoch"


def test_any_step_can_be_asked_for_first(stores: dict[str, TokenStore]) -> None:
    whole = epoch_of(run_data(stores))
    data = run_data(stores)
    for step in (5, 2, 3, 3, len(whole) - 1):
        found = [batch.keys for batch in data.micro_batches(0, step)]
        assert found == [batch.keys for batch in whole[step]]
    data.close()
    assert [b.keys for b in data.micro_batches(0, 1)] == [b.keys for b in whole[1]]
    with pytest.raises(IndexError, match="which has"):
        data.micro_batches(0, len(whole))


@pytest.mark.parametrize(
    ("batch", "world", "sizes"), [(10, 4, "8 and 12"), (3, 4, "4"), (0, 2, "2"), (5, 2, "4 and 6")]
)
def test_a_batch_size_that_ranks_cant_share_names_the_nearest(
    stores: dict[str, TokenStore], batch: int, world: int, sizes: str
) -> None:
    with pytest.raises(ConfigError, match=rf"global_batch_size: {batch} .*: {sizes}$"):
        run_data(stores, batch=batch, world=world)


def test_a_sample_longer_than_a_pack_is_named(stores: dict[str, TokenStore]) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:\d+: \d+ tokens, over pack_max_length 8"):
        run_data(stores, pack_max_length=8)


def test_no_samples_at_all_is_an_error(stores: dict[str, TokenStore]) -> None:
    data = run_data(stores, ratios={"a": 0.0, "b": 0.0})
    with pytest.raises(DataError, match="no samples to train on"):
        data.plan_epoch(0)


def test_the_plan_says_how_full_the_packs_are(stores: dict[str, TokenStore]) -> None:
    data = run_data(stores)
    plan = data.plan_epoch(0)
    tokens = sum(batch.num_tokens for step in epoch_of(data) for batch in step)
    assert plan.num_tokens == tokens
    assert plan.fill == tokens / (plan.num_packs * PACK)
    assert 0.9 < plan.fill <= 1
