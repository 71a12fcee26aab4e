"""A token store is whole or absent, however it was built, and says what became of each record."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pegboard import DataError
from pegboard.contracts import Dataset
from pegboard.token_store import TokenStore, build_store, open_store, store_fingerprint
from pegboard_plugins.jsonl.component import JsonlDataset

# Spawned workers import what they unpickle: this becomes a module on their path.
TOKENIZE_MODULE = '''
import os
import numpy as np
from pegboard import DataError, DroppedSample, Example

class Characters:
    """One example per word, a token per character, `do` for special effects."""

    def __init__(self, max_length=64, print_="v1"):
        self.max_length = max_length
        self.print = print_
        self.words = 0

    def __call__(self, record):
        do = record.get("do")
        if do == "die":
            os.kill(os.getpid(), 9)
        if do == "drop":
            raise DroppedSample("asked to")
        if do == "fail":
            raise DataError("messages[0]: no role")
        if do == "bug":
            raise KeyError("oops")
        words = record["text"].split()
        self.words += len(words)
        ids = [np.array([ord(c) for c in word], dtype=np.int32) for word in words]
        return [Example(input_ids=row, loss_mask=row % 2 == 0) for row in ids]

    def take_counts(self):
        words, self.words = self.words, 0
        return {"words": words}

    def fingerprint(self):
        return f"{self.print} {self.max_length}"
'''


@pytest.fixture
def characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "characters_fn.py").write_text(TOKENIZE_MODULE)
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    yield importlib.import_module("characters_fn").Characters


def records_of(tmp_path: Path, *lines: Any) -> Dataset:
    path = tmp_path / "data.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n")
    return JsonlDataset(JsonlDataset.Config(anno_path=str(path))).build("d")


GOOD = [{"text": text} for text in ("one two", "three", "four five six", "seven")]


def contents(store: TokenStore) -> list[Any]:
    return [
        (store[i].input_ids.tolist(), store[i].loss_mask.tolist(), store[i].key)
        for i in range(len(store))
    ]


def test_a_store_gives_the_examples_in_order_with_their_keys(
    tmp_path: Path, characters: Any
) -> None:
    store = build_store(tmp_path / "s", records_of(tmp_path, *GOOD), characters(), name="d")
    assert ["".join(map(chr, store[i].input_ids)) for i in range(len(store))] == (
        "one two three four five six seven".split()
    )
    assert store[0].input_ids.dtype == np.int32 and store[0].loss_mask.dtype == np.bool_
    assert all(
        np.array_equal(store[i].loss_mask, store[i].input_ids % 2 == 0) for i in range(len(store))
    )
    assert store.lengths.tolist() == [3, 3, 5, 4, 4, 3, 5] and store.lengths.dtype == np.int64
    assert [(store.key(i).line, store.key(i).part) for i in range(7)] == [
        (1, 0), (1, 1), (2, 0), (3, 0), (3, 1), (3, 2), (4, 0),
    ]  # fmt: skip
    assert store.key(0).source == "d" and str(store.key(0)) == f"{tmp_path}/data.jsonl:1"
    assert store.meta["num_records"] == 4 and store.meta["num_tokens"] == 27
    assert store.meta["events"] == {"words": 7}
    assert not store[0].input_ids.flags.writeable


def test_a_store_opened_again_or_pickled_is_equal(tmp_path: Path, characters: Any) -> None:
    store = build_store(tmp_path / "s", records_of(tmp_path, *GOOD), characters(), name="d")
    assert contents(open_store(tmp_path / "s")) == contents(store)
    assert contents(pickle.loads(pickle.dumps(store))) == contents(store)
    assert open_store(tmp_path / "s").meta == store.meta


def test_workers_change_nothing_and_report_progress(tmp_path: Path, characters: Any) -> None:
    lines = [{"text": f"record number {i}"} for i in range(50)]
    lines[7] = {"text": "x", "do": "drop"}
    records = records_of(tmp_path, *lines)
    alone = build_store(tmp_path / "a", records, characters(), name="d")
    seen: list[tuple[int, int]] = []
    shared = build_store(
        tmp_path / "b", records, characters(), name="d", num_workers=2,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert contents(shared) == contents(alone)
    assert shared.meta == alone.meta
    assert seen[-1] == (50, 50) and seen == sorted(seen)


def test_dropped_samples_are_counted_by_reason(tmp_path: Path, characters: Any) -> None:
    lines = [GOOD[0], {"text": "", "do": "drop"}, {"text": ""}, {"do": "drop"}]
    store = build_store(tmp_path / "s", records_of(tmp_path, *lines), characters(), name="d")
    assert store.meta["dropped"] == {"asked to": 2, "no example": 1}
    assert len(store) == 2


BAD = {
    "nonsense": "invalid JSON",
    "": "blank line",
    '{"do": "fail"}': r"messages\[0\]: no role",
    "[1]": "found a JSON list",
}


@pytest.mark.parametrize(("line", "reason"), BAD.items())
@pytest.mark.parametrize("place", [0, 2])
def test_a_bad_record_stops_the_build_with_file_and_line(
    tmp_path: Path, characters: Any, line: str, reason: str, place: int
) -> None:
    records = records_of(tmp_path, *GOOD[:place], line, *GOOD[place:], "later nonsense")
    with pytest.raises(DataError, match=rf"data\.jsonl:{place + 1}: {reason}") as caught:
        build_store(tmp_path / "s", records, characters(), name="d")
    assert str(caught.value).count("data.jsonl") == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["code"]


def test_skipped_bad_records_are_counted_and_listed(tmp_path: Path, characters: Any) -> None:
    records = records_of(tmp_path, GOOD[0], *BAD, GOOD[1])
    store = build_store(tmp_path / "s", records, characters(), on_bad_record="skip", name="d")
    assert len(store) == 3
    assert store.meta["num_bad"] == len(store.meta["bad_records"]) == 4
    for number, message in enumerate(store.meta["bad_records"], start=2):
        assert message.startswith(f"{tmp_path}/data.jsonl:{number}: ")


def test_the_first_bad_record_of_many_is_named_by_workers(tmp_path: Path, characters: Any) -> None:
    lines: list[Any] = [{"text": f"record {i}"} for i in range(60)]
    lines[20] = lines[21] = lines[55] = "nonsense"
    with pytest.raises(DataError, match=r"data\.jsonl:21: invalid JSON"):
        build_store(
            tmp_path / "s", records_of(tmp_path, *lines), characters(), name="d", num_workers=2
        )


def test_a_dead_worker_is_an_error_and_no_hang(tmp_path: Path, characters: Any) -> None:
    records = records_of(tmp_path, *GOOD, {"do": "die"}, *GOOD)
    with pytest.raises(DataError, match="dataset 'd': a tokenize worker died"):
        build_store(tmp_path / "s", records, characters(), name="d", num_workers=1)
    assert not (tmp_path / "s").exists()


def test_a_programming_error_keeps_its_type_and_names_the_record(
    tmp_path: Path, characters: Any
) -> None:
    with pytest.raises(KeyError, match="oops") as caught:
        build_store(
            tmp_path / "s", records_of(tmp_path, GOOD[0], {"do": "bug"}), characters(), name="d"
        )
    assert caught.value.__notes__ == [f"while tokenizing {tmp_path}/data.jsonl:2"]


def test_a_dataset_without_samples_is_an_error_with_counts(tmp_path: Path, characters: Any) -> None:
    records = records_of(tmp_path, {"do": "drop"}, {"do": "drop"}, "nonsense", {"text": ""})
    with pytest.raises(DataError, match="dataset 'd': none of its 4 records") as caught:
        build_store(tmp_path / "s", records, characters(), on_bad_record="skip", name="d")
    for count in ("asked to: 2", "no example: 1", "bad record: 1", "data.jsonl:3: invalid"):
        assert count in str(caught.value)


def test_an_example_over_max_length_is_an_error(tmp_path: Path, characters: Any) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl:2: 5 tokens, over .* max_length 4"):
        build_store(tmp_path / "s", records_of(tmp_path, *GOOD), characters(4), name="d")


def test_an_equal_store_is_used_and_a_stale_one_replaced(tmp_path: Path, characters: Any) -> None:
    records = records_of(tmp_path, *GOOD)
    first = build_store(tmp_path / "s", records, characters(), name="d")
    again = build_store(
        tmp_path / "s", records, characters(), name="d", progress=lambda *_: pytest.fail()
    )
    assert contents(again) == contents(first)
    other = records_of(tmp_path, *GOOD[:2])
    assert len(build_store(tmp_path / "s", other, characters(), name="d")) == 3
    assert contents(first)[6][0] == [ord(c) for c in "seven"], "an open store outlives its folder"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["code", "data.jsonl", "s"]


def test_the_fingerprint_follows_data_tokenizer_and_policy(tmp_path: Path, characters: Any) -> None:
    records = records_of(tmp_path, *GOOD)
    prints = [
        store_fingerprint(records, characters()),
        store_fingerprint(records, characters(65)),
        store_fingerprint(records, characters(64, "v2")),
        store_fingerprint(records, characters(), "skip"),
        store_fingerprint(records_of(tmp_path, *GOOD[:2]), characters()),
    ]
    assert len(set(prints)) == 5
    assert store_fingerprint(records, characters()) == prints[0]


def test_a_killed_build_leaves_no_store(tmp_path: Path, characters: Any) -> None:
    records = records_of(tmp_path, *GOOD, {"do": "die"})
    process = multiprocessing.get_context("spawn").Process(
        target=build_store, args=(tmp_path / "s", records, characters()), kwargs={"name": "d"}
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert list(tmp_path.glob(".s.*.draft/ids.bin")), "it died while it wrote"
    assert not (tmp_path / "s").exists()
    with pytest.raises(DataError, match="no token store"):
        open_store(tmp_path / "s")
    store = build_store(tmp_path / "s", records_of(tmp_path, *GOOD), characters(), name="d")
    assert len(store) == 7


def test_the_second_of_two_equal_builds_uses_the_first(tmp_path: Path, characters: Any) -> None:
    records = records_of(tmp_path, *GOOD)

    class Overtaken(characters):  # type: ignore[misc]
        """While it tokenizes, another build of the same store starts and ends."""

        def __call__(self, record: Any) -> Any:
            if not (tmp_path / "s").exists():
                build_store(tmp_path / "s", records, characters(), name="d")
                inodes.append((tmp_path / "s" / "meta.json").stat().st_ino)
            return super().__call__(record)

    inodes: list[int] = []
    store = build_store(tmp_path / "s", records, Overtaken(), name="d")
    inodes.append((tmp_path / "s" / "meta.json").stat().st_ino)
    assert len(inodes) == 2 and inodes[0] == inodes[1]
    assert len(store) == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["code", "data.jsonl", "s"]


def test_a_damaged_or_foreign_store_is_refused(tmp_path: Path, characters: Any) -> None:
    store = build_store(tmp_path / "s", records_of(tmp_path, *GOOD), characters(), name="d")
    ids = (tmp_path / "s" / "ids.bin").read_bytes()
    (tmp_path / "s" / "ids.bin").write_bytes(ids[:-4])
    with pytest.raises(DataError, match=r"ids\.bin: 104 bytes, expected 108"):
        open_store(tmp_path / "s")
    (tmp_path / "s" / "ids.bin").write_bytes(ids)
    meta = {**store.meta, "format_version": 999}
    (tmp_path / "s" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match="format 999, expected 1"):
        open_store(tmp_path / "s")
    (tmp_path / "s" / "meta.json").write_text("{")
    with pytest.raises(DataError, match=r"meta\.json is damaged"):
        open_store(tmp_path / "s")
