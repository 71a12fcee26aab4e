"""Packs come in one global order at every world size; samples train as often as ratios say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pegboard import Batch, ConfigError, DataError, Example, SampleKey
from pegboard.data_loading import DataSource, RunData
from pegboard.token_store import TokenStore, build_store
from pegboard_plugins.collators.component import SFTLLMCollator
from pegboard_plugins.packers.component import ExpandSoftPacker, SoftPacker

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
        collator=SFTLLMCollator(SFTLLMCollator.Config()).build(pad_token_id=0),
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


@pytest.mark.parametrize("world", [2, 4])
def test_the_global_order_of_packs_is_the_same_at_every_world_size(
    stores: dict[str, TokenStore], world: int
) -> None:
    alone = epoch_of(run_data(stores))
    ranks = [epoch_of(run_data(stores, rank=rank, world=world)) for rank in range(world)]
    for step, expected in enumerate(alone):
        shares = [rank[step] for rank in ranks]
        assert all(len(share) == 4 // world for share in shares)
        merged = [shares[i % world][i // world] for i in range(4)]
        assert [batch.keys for batch in merged] == [batch.keys for batch in expected]
        for a, b in zip(merged, expected, strict=True):
            assert np.array_equal(a.input_ids_T, b.input_ids_T)


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


def test_the_next_step_is_prepared_in_the_background(stores: dict[str, TokenStore]) -> None:
    """The step comes from the thread: it is the very list that the thread made."""
    data = run_data(stores)
    data.micro_batches(0, 0)
    assert data._next is not None
    prepared = data._next[1].result(timeout=30)
    assert data.micro_batches(0, 1) is prepared


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
