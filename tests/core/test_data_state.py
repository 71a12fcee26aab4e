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
