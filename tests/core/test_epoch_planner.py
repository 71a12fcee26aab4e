"""An epoch is planned once, from data, config and seed alone; every process maps the same plan, its
counts are what the packs hold, and what a cutting packer keeps comes in the next epoch."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pegboard import DataError, Example, PackPlan, PluginError, SampleKey
from pegboard import epoch_planner as module
from pegboard.data_loading import DataSource, RunData
from pegboard.epoch_plan import EpochPlan, write_plan
from pegboard.epoch_planner import EpochPlanner, PlanningStopped
from pegboard.token_store import TokenStore, build_store
from pegboard_plugins.collators.component import SFTLLMCollator
from pegboard_plugins.packers.component import ExpandSoftPacker, HardPacker, SoftPacker

PACK = 32


class Rows:
    """A dataset of given rows of ids; a negative id is one without loss."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return {"row": self.rows[index]}

    def key(self, index: int) -> SampleKey:
        return SampleKey("", "rows", index + 1)

    def fingerprint(self) -> None:
        return None


class AsTheyAre:
    max_length = 10_000

    def __call__(self, record: Mapping[str, Any]) -> list[Example]:
        row = np.array(record["row"], dtype=np.int32)
        return [Example(input_ids=np.abs(row), loss_mask=row > 0)]

    def take_counts(self) -> Mapping[str, int]:
        return {}

    def fingerprint(self) -> str:
        return "as they are"


def numbered_rows(lengths: Sequence[int], first: int, seed: int = 0) -> list[list[int]]:
    """Rows of ids that are all different, about two thirds with loss."""
    rng = np.random.default_rng(seed)
    rows, at = [], first
    for length in lengths:
        signs = np.where(rng.random(length) < 0.67, 1, -1)
        rows.append((np.arange(at, at + length) * signs).tolist())
        at += length
    return rows


@pytest.fixture
def stores(tmp_path: Path) -> list[TokenStore]:
    rng = np.random.default_rng(0)
    return [
        build_store(
            tmp_path / name,
            Rows(numbered_rows(rng.integers(1, PACK + 1, count).tolist(), first, count)),
            AsTheyAre(),
            name=name,
        )
        for name, count, first in (("a", 50, 1), ("b", 31, 100_000))
    ]


def sources_of(stores: Sequence[TokenStore], **fields: Any) -> list[DataSource]:
    return [DataSource(store, i, "ab"[i], **fields) for i, store in enumerate(stores)]


EXPAND = ExpandSoftPacker(ExpandSoftPacker.Config(window_size=20)).build()
HARD = HardPacker(HardPacker.Config()).build()


def planner(stores: Sequence[TokenStore], packer: Any = EXPAND, **fields: Any) -> EpochPlanner:
    sources = fields.pop("sources", None) or sources_of(stores)
    return EpochPlanner(sources, packer=packer, pack_max_length=PACK, cached_from=0, **fields)


def content(plan: EpochPlan) -> list[Any]:
    return [
        plan.offsets.tolist(),
        [None if array is None else array.tolist() for array in plan.pieces],
        plan.counts,
    ]


def fed(stores: Sequence[TokenStore], packer: Any, epochs: int, **fields: Any) -> list[Any]:
    """Per epoch, the batches that the model gets."""
    data = RunData(
        sources_of(stores),
        packer=packer,
        collator=SFTLLMCollator(SFTLLMCollator.Config()).build(pad_token_id=0),
        pack_max_length=PACK,
        global_batch_size=3,
        **fields,
    )
    found = []
    for epoch in range(epochs):
        steps = range(data.steps_per_epoch(epoch))
        found.append([batch for step in steps for batch in data.micro_batches(epoch, step)])
    data.close()
    return found


@pytest.mark.parametrize("packer", [EXPAND, SoftPacker(SoftPacker.Config()).build(), HARD])
def test_the_plans_counts_add_up_to_what_the_model_is_fed(
    stores: list[TokenStore], packer: Any
) -> None:
    plans = planner(stores, packer)
    for epoch, batches in enumerate(fed(stores, packer, 4)):
        plan = plans.plan(epoch)
        samples = Counter(key.source for batch in batches for key in batch.keys)
        targets = Counter(i for batch in batches for i in batch.targets.source_ids_K.tolist())
        assert {c.name: c.samples for c in plan.counts} == samples
        assert {i: c.targets for i, c in enumerate(plan.counts)} == targets
        assert plan.num_tokens == sum(batch.num_tokens for batch in batches)
        assert plan.fill == plan.num_tokens / (PACK * plan.num_packs)
        ids = [i for b in batches for i in b.input_ids_T[: b.num_tokens].tolist()]
        assert plan.counts[1].tokens == sum(i >= 100_000 for i in ids)


def test_a_hard_packers_epochs_lose_no_token_and_no_target(stores: list[TokenStore]) -> None:
    """Each token once per epoch, though an epoch's tail trains in the next, and each target too."""
    epochs = 3
    tokens: Counter[int] = Counter()
    pairs: Counter[tuple[int, int]] = Counter()
    for batches in fed(stores, HARD, epochs, last_epoch=epochs - 1):
        for batch in batches:
            row = batch.input_ids_T.tolist()
            tokens.update(row[: batch.num_tokens])
            positions = batch.targets.positions_K.tolist()
            labels = batch.targets.labels_K.tolist()
            pairs.update(zip((row[p] for p in positions), labels, strict=True))
    expected_tokens = Counter(
        i for s in stores for k in range(len(s)) for i in s[k].input_ids.tolist()
    )
    assert tokens == Counter({i: n * epochs for i, n in expected_tokens.items()})
    expected = Counter(
        pair
        for store in stores
        for k in range(len(store))
        for pair, is_target in zip(
            zip(store[k].input_ids.tolist(), store[k].input_ids.tolist()[1:], strict=False),
            store[k].loss_mask.tolist()[1:],
            strict=False,
        )
        if is_target
    )
    assert pairs == Counter({pair: n * epochs for pair, n in expected.items()})


def test_hard_packs_are_full_but_for_the_runs_last(stores: list[TokenStore]) -> None:
    plans = planner(stores, HARD, last_epoch=2)
    total = sum(int(store.lengths.sum()) for store in stores)
    for epoch in range(3):
        plan = plans.plan(epoch)
        full = plan.num_packs * PACK
        assert plan.num_tokens == (full if epoch < 2 else full - (-3 * total % PACK))
        assert (plan.kept() is None) == (epoch == 2)
    assert sum(plans.plan(e).num_tokens for e in range(3)) == 3 * total
    # Nothing but the epoch decides what was kept before it.
    assert content(planner(stores, HARD, last_epoch=2).plan(2)) == content(plans.plan(2))


def test_less_data_than_a_hard_pack_still_trains(tmp_path: Path) -> None:
    store = build_store(tmp_path / "s", Rows([[1, 2, 3], [4, 5]]), AsTheyAre(), name="a")
    plan = planner([store], HARD).plan(0)
    assert (plan.num_packs, plan.num_tokens, plan.kept()) == (1, 5, None)


def test_a_plan_is_made_once_and_mapped_afterwards(
    stores: list[TokenStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for packer in (EXPAND, HARD):
        folder = tmp_path / type(packer).__name__
        alone = planner(stores, packer)
        made = planner(stores, packer, folder=folder)
        for epoch in range(3):
            assert content(made.plan(epoch)) == content(alone.plan(epoch))
        with monkeypatch.context() as context:
            context.setattr(EpochPlanner, "_make", None)  # whoever plans again fails
            other = planner(stores, packer, folder=folder)
            mapped = other.plan(2)
            assert content(mapped) == content(alone.plan(2))
            assert [other.num_packs(e) for e in range(3)] == [made.num_packs(e) for e in range(3)]
        base = mapped.pieces.samples.base
        assert isinstance(base, np.memmap), "the file is mapped, not read"
        assert not list(folder.rglob("*.draft"))


@pytest.mark.parametrize("name", ["plan.json", "samples.npy", "offsets.npy"])
def test_a_damaged_plan_is_made_again(stores: list[TokenStore], tmp_path: Path, name: str) -> None:
    expected = content(planner(stores, folder=tmp_path / "plans").plan(0))
    (path,) = tmp_path.rglob(name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert content(planner(stores, folder=tmp_path / "plans").plan(0)) == expected
    path.unlink()
    assert content(planner(stores, folder=tmp_path / "plans").plan(0)) == expected
    assert path.exists()


def test_a_plan_that_another_machine_publishes_meanwhile_is_left_in_place(
    stores: list[TokenStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, others = tmp_path / "plans", list[EpochPlan]()

    def write_late(draft: Path, plan: EpochPlan) -> None:
        monkeypatch.setattr(module, "write_plan", write_plan)
        others.append(planner(stores, folder=folder).plan(0))
        write_plan(draft, plan)

    monkeypatch.setattr(module, "write_plan", write_late)
    plan = planner(stores, folder=folder).plan(0)
    assert content(plan) == content(others[0])
    (path,) = folder.rglob("samples.npy")
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert str(path) in maps
    assert f"{path} (deleted)" not in maps, "ranks of the other machine have it mapped"


def test_a_rank_that_does_not_plan_waits_for_the_one_that_does(
    stores: list[TokenStore], tmp_path: Path
) -> None:
    waiting = planner(stores, folder=tmp_path / "plans", makes=False)
    found: list[EpochPlan] = []
    thread = threading.Thread(target=lambda: found.append(waiting.plan(0)))
    thread.start()
    time.sleep(0.2)
    assert not found
    made = planner(stores, folder=tmp_path / "plans").plan(0)
    thread.join(timeout=10)
    assert content(found[0]) == content(made)


def test_a_waiting_rank_can_be_stopped_and_plans_itself_if_nobody_does(
    stores: list[TokenStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = planner(stores, folder=tmp_path / "plans", makes=False)
    waiting.stop()
    with pytest.raises(PlanningStopped):
        waiting.plan(0)
    waiting.resume()
    monkeypatch.setattr(module, "_WAIT_S", 0.1)
    assert content(waiting.plan(0)) == content(planner(stores).plan(0))
    assert not (tmp_path / "plans").exists(), "it leaves the files to the one that plans"


def test_where_plans_cant_be_written_they_stay_in_memory(
    stores: list[TokenStore], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    plan = planner(stores, folder=tmp_path / "file").plan(0)
    assert content(plan) == content(planner(stores).plan(0))


def test_a_small_set_is_planned_by_every_rank_without_files(
    stores: list[TokenStore], tmp_path: Path
) -> None:
    for makes in (True, False):
        small = EpochPlanner(
            sources_of(stores),
            packer=EXPAND,
            pack_max_length=PACK,
            folder=tmp_path / "plans",
            makes=makes,
        )
        assert content(small.plan(0)) == content(planner(stores).plan(0))
    assert not (tmp_path / "plans").exists()


def test_earlier_epochs_are_forgotten_on_disk_too(stores: list[TokenStore], tmp_path: Path) -> None:
    plans = planner(stores, folder=tmp_path / "plans")
    counts = [plans.plan(epoch).num_packs for epoch in range(4)]
    plans.forget_before(2)
    (folder,) = (tmp_path / "plans").iterdir()
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["epoch_00002", "epoch_00003"]
    assert [plans.num_packs(epoch) for epoch in range(4)] == counts
    assert plans.plan(0).num_packs == counts[0]


def identities(stores: list[TokenStore]) -> Iterator[tuple[str, EpochPlanner]]:
    yield "datasets", planner(stores, sources=sources_of(stores, sample_ratio=1.5))
    yield "datasets", planner(stores, sources=sources_of(stores, draw="fixed"))
    yield "datasets", planner(stores, sources=sources_of(stores, token_weight=1.0))
    yield "datasets", planner(stores[:1])
    yield "datasets", planner(stores[::-1])
    yield "packer", planner(stores, packer_identity="another")
    yield "packer", planner(stores, max_tiles=4)
    yield "seed", planner(stores, seed=1)
    other = EpochPlanner(sources_of(stores), packer=EXPAND, pack_max_length=PACK + 1)
    yield "pack_max_length", other


def test_the_identity_names_the_part_that_changed(stores: list[TokenStore]) -> None:
    base = planner(stores).identity()
    assert planner(stores).identity() == base
    for name, changed in identities(stores):
        found = changed.identity()
        assert [part for part in base if found[part] != base[part]] == [name]


def test_other_content_is_another_identity_and_a_copy_is_not(tmp_path: Path) -> None:
    rows = numbered_rows([5, 6, 7], 1)
    changed = [rows[0], [*rows[1][:-1], 77], rows[2]]
    found = []
    for name, data in (("one", rows), ("copy", rows), ("changed", changed)):
        store = build_store(tmp_path / name, Rows(data), AsTheyAre(), name="a")
        found.append(planner([store]).identity()["datasets"])
    assert found[0] == found[1] != found[2]


def test_token_weights_share_out_the_epochs_tokens(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    stores = [
        build_store(
            tmp_path / name,
            Rows(numbered_rows(rng.integers(1, high, count).tolist(), 1)),
            AsTheyAre(),
            name=name,
        )
        for name, count, high in (("a", 400, 10), ("b", 100, 33))
    ]
    total = sum(int(store.lengths.sum()) for store in stores)
    sources = [
        DataSource(stores[0], 0, "a", token_weight=3.0),
        DataSource(stores[1], 1, "b", token_weight=1.0),
    ]
    plans = planner(stores, sources=sources)
    sums = np.zeros(2)
    for epoch in range(5):
        tokens = np.array([counts.tokens for counts in plans.plan(epoch).counts])
        assert np.abs(tokens - [0.75 * total, 0.25 * total]).max() <= PACK
        sums += tokens
    # What one epoch has too much the next has less.
    assert np.abs(sums - np.array([0.75, 0.25]) * 5 * total).max() <= PACK


def test_a_token_weight_for_some_only_is_an_error(stores: list[TokenStore]) -> None:
    sources = [DataSource(stores[0], 0, "a", token_weight=1.0), DataSource(stores[1], 1, "b")]
    with pytest.raises(DataError, match="some have a token_weight and some have not"):
        planner(stores, sources=sources).plan(0)


class Losing:
    """A packer that leaves a sample out."""

    def plan(self, lengths: np.ndarray, pack_max_length: int, seed: int) -> PackPlan:
        del pack_max_length, seed
        return PackPlan(np.arange(len(lengths)), np.arange(len(lengths) - 1))


def test_a_packer_that_loses_samples_is_found_out(stores: list[TokenStore]) -> None:
    with pytest.raises(PluginError, match="packer Losing: planned 80 of 81 samples"):
        planner(stores, Losing()).plan(0)


def test_a_sample_longer_than_a_pack_is_cut_or_named(tmp_path: Path) -> None:
    store = build_store(tmp_path / "s", Rows([[1] * 5, [2] * 100]), AsTheyAre(), name="a")
    assert planner([store], HARD).plan(0).num_packs == 3
    with pytest.raises(DataError, match=r"rows:2: 100 tokens, over pack_max_length 32"):
        planner([store])
