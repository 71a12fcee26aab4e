"""A checkpoint's cursor is taken up where the order is the same; else the run says what changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pegboard import CheckpointError, Example, SampleKey
from pegboard.contracts import Packer
from pegboard.data_loading import Cursor, DataSource, RunData
from pegboard.data_state import cursor_of, data_state
from pegboard.token_store import build_store
from pegboard_plugins.collators.component import SFTLLMCollator
from pegboard_plugins.packers.component import HardPacker, SoftPacker

FOLDER = Path("step_00000003")


class Numbers:
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return {"n": index % 7 + 1}

    def key(self, index: int) -> SampleKey:
        return SampleKey("", "numbers", index + 1)

    def fingerprint(self) -> None:
        return None


class Ones:
    max_length = 8

    def __call__(self, record: Mapping[str, Any]) -> list[Example]:
        return [Example(input_ids=np.ones(record["n"], int), loss_mask=np.ones(record["n"], bool))]

    def take_counts(self) -> Mapping[str, int]:
        return {}

    def fingerprint(self) -> str:
        return "ones"


def data_of(
    folder: Path,
    count: int = 40,
    seed: int = 0,
    batch: int = 2,
    rank: int = 0,
    packer: Packer | None = None,
    last_epoch: int | None = None,
) -> RunData:
    store = build_store(folder / f"{count}", Numbers(count), Ones(), name="d")
    return RunData(
        [DataSource(store, 0, "d")],
        packer=packer or SoftPacker(SoftPacker.Config()).build(),
        collator=SFTLLMCollator(SFTLLMCollator.Config()).build(pad_token_id=0),
        pack_max_length=8,
        global_batch_size=batch,
        data_rank=rank,
        data_world=2,
        seed=seed,
        last_epoch=last_epoch,
    )


def saved(data: RunData, cursor: Cursor) -> Any:
    return json.loads(json.dumps(data_state(data, cursor)))


def test_the_same_data_goes_on_where_it_was(tmp_path: Path) -> None:
    data = data_of(tmp_path)
    for cursor in (Cursor(0, 0), Cursor(3, 6)):
        state = saved(data, cursor)
        assert state == saved(data_of(tmp_path, rank=1), cursor), "every rank saves the same"
        assert cursor_of(state, data_of(tmp_path, rank=1), FOLDER, go_on=False) == cursor


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"count": 41}, "the datasets"),
        ({"seed": 1}, "seed"),
        ({"batch": 4}, "global_batch_size"),
        ({"seed": 1, "batch": 4}, "seed, global_batch_size"),
    ],
)
def test_what_changed_is_named_and_refused_unless_told_to_go_on(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    state = saved(data_of(tmp_path), Cursor(1, 4))
    other = data_of(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=rf"changed since: {words}.*on_changed_data"):
        cursor_of(state, other, FOLDER, go_on=False)
    assert cursor_of(state, other, FOLDER, go_on=True) == Cursor(1, 4)


def test_a_place_that_the_new_order_has_not_is_the_next_epochs_start(tmp_path: Path) -> None:
    state = saved(data_of(tmp_path), Cursor(1, 18))
    assert cursor_of(state, data_of(tmp_path, count=7), FOLDER, go_on=True) == Cursor(2, 0)


def test_a_longer_run_takes_up_the_rest_that_was_to_end_the_shorter_one(tmp_path: Path) -> None:
    hard = HardPacker(HardPacker.Config()).build()
    short = data_of(tmp_path, packer=hard, last_epoch=0, count=41)
    longer = data_of(tmp_path, packer=hard, last_epoch=1, count=41)
    packs = longer.planner.num_packs(0)
    assert short.planner.num_packs(0) == packs + 1
    assert cursor_of(saved(short, Cursor(0, packs)), longer, FOLDER, go_on=False) == Cursor(1, 0)


def test_a_run_that_is_lengthened_after_its_end_repeats_and_drops_nothing(tmp_path: Path) -> None:
    """HardPacker, ended twice and lengthened twice: each token once per epoch, each pack once."""
    hard = HardPacker(HardPacker.Config()).build()
    total = int(data_of(tmp_path, count=41).sources[0].store.lengths.sum())
    state: Any = None
    trained = 0
    for last_epoch in (0, 1, 3):
        data = data_of(tmp_path, packer=hard, last_epoch=last_epoch, count=41)
        data.steps_from(Cursor(), last_epoch + 1)  # as a run plans before it reads the checkpoint
        cursor = Cursor()
        if state is not None:
            cursor = cursor_of(state, data, FOLDER, go_on=False)
            assert cursor == Cursor(state["cursor"]["epoch"], 0)
        steps = data.steps_from(cursor, last_epoch + 1)
        while cursor.epoch <= last_epoch:
            plan = data.plan_epoch(cursor.epoch)
            assert cursor.pack or plan.num_samples >= 41, "an epoch begins with all its samples"
            ends = plan.offsets[cursor.pack : cursor.pack + 3]
            packs = plan.pieces.part(int(ends[0]), int(ends[-1]))
            assert packs.starts is not None and packs.stops is not None
            trained += int((packs.stops - packs.starts).sum())
            cursor, steps = data.next_cursor(cursor), steps - 1
        assert steps == 0
        assert trained == (last_epoch + 1) * total
        state = saved(data, cursor)
    assert state["ended_epochs"] == [0, 1, 3]


def test_a_lengthened_run_caches_its_plans_apart_from_those_of_one_run(tmp_path: Path) -> None:
    hard = HardPacker(HardPacker.Config()).build()
    apart, whole = (data_of(tmp_path, packer=hard, last_epoch=2, count=41).planner for _ in "ab")
    for planner in (apart, whole):
        planner._folder = tmp_path / "plans"
    apart.end_epochs([0])
    for epoch in range(3):
        assert apart.plan(epoch).num_tokens >= 0 and whole.plan(epoch).num_tokens >= 0
    assert apart.plan(0).kept() is None
    assert whole.plan(0).kept() is not None
    names = {path.name for path in (tmp_path / "plans").iterdir() if path.is_dir()}
    assert names == {
        "epoch_00000", "epoch_00000_last", "epoch_00001", "epoch_00001_from_00001",
        "epoch_00002_from_00001_last", "epoch_00002_last",
    }  # fmt: skip
