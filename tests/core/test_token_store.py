"""A token store is whole or absent, the same whoever built it, and says what became of each record."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import pickle
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pegboard import ConfigError, DataError
from pegboard.bad_records import BadRecordLimit, most_bad_records
from pegboard.contracts import Dataset
from pegboard.record_tokenizing import RecordSchema
from pegboard.stored_samples import damaged_files
from pegboard.token_store import (
    BuildProgress,
    TokenStore,
    build_store,
    open_store,
    store_fingerprint,
)
from pegboard_plugins.jsonl.component import JsonlDataset

# Spawned workers import what they unpickle: this becomes a module on their path.
TOKENIZE_MODULE = '''
import os
import time
import numpy as np
from pegboard import DataError, DroppedSample, Example

class Odd(Exception):
    """It pickles, but nothing can make it again."""

    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")

class Characters:
    """One example per word, a token per character, `do` for special effects."""

    def __init__(self, max_length=64, print_="v1"):
        self.max_length = max_length
        self.print = print_
        self.words = 0

    def __call__(self, record):
        do = record.get("do")
        if do == "die":
            with open(record.get("note", os.devnull), "w") as note:
                note.write(f"{os.getpid()} {time.monotonic()}")
            os.kill(os.getpid(), 9)
        if do == "drop":
            raise DroppedSample("asked to")
        if do == "fail":
            raise DataError("messages[0]: no role")
        if do == "bug":
            raise KeyError("oops")
        if do == "shout":
            raise ValueError("x" * 300_000)
        if do == "be odd":
            raise Odd("this", "that")
        if do == "open":
            open(record["path"])
        if do == "go deep":
            self(dict(record))
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


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
    assert store.lengths.tolist() == [3, 3, 5, 4, 4, 3, 5] and store.lengths.dtype == np.int32
    assert [(store.key(i).line, store.key(i).part) for i in range(7)] == [
        (1, 0), (1, 1), (2, 0), (3, 0), (3, 1), (3, 2), (4, 0),
    ]  # fmt: skip
    assert store.key(0).source == "d" and str(store.key(0)) == f"{tmp_path}/data.jsonl:1"
    assert store.meta["num_records"] == 4 and store.meta["num_tokens"] == 27
    assert store.meta["events"] == {"words": 7}
    counts = [int(store[i].loss_mask[1:].sum()) for i in range(len(store))]
    assert store.num_targets.tolist() == counts and store.meta["num_supervised"] == sum(counts)
    assert not store[0].input_ids.flags.writeable


def test_a_store_opened_again_or_pickled_is_equal(tmp_path: Path, characters: Any) -> None:
    store = build_store(tmp_path / "s", records_of(tmp_path, *GOOD), characters(), name="d")
    assert contents(open_store(tmp_path / "s", "d")) == contents(store)
    assert contents(pickle.loads(pickle.dumps(store))) == contents(store)
    assert open_store(tmp_path / "s").meta == store.meta


def test_workers_change_nothing_and_report_progress(tmp_path: Path, characters: Any) -> None:
    lines = [{"text": f"record number {i}"} for i in range(50)]
    lines[7] = {"text": "x", "do": "drop"}
    records = records_of(tmp_path, *lines)
    alone = build_store(tmp_path / "a", records, characters(), name="d")
    seen: list[BuildProgress] = []
    shared = build_store(
        tmp_path / "b", records, characters(), name="d", num_workers=2, progress=seen.append
    )
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert contents(shared) == contents(alone)
    assert seen[-1][:2] == (50, 50)
    done = [progress.num_records for progress in seen]
    assert done == sorted(done)


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
    assert not (tmp_path / "s").exists()


def test_skipped_bad_records_are_counted_and_listed(tmp_path: Path, characters: Any) -> None:
    records = records_of(tmp_path, GOOD[0], *BAD, GOOD[1])
    store = build_store(tmp_path / "s", records, characters(), on_bad_record="skip", name="d")
    assert len(store) == 3
    assert store.meta["num_bad"] == len(store.meta["bad_records"]) == 4
    for number, message in enumerate(store.meta["bad_records"], start=2):
        assert message.startswith(f"{tmp_path}/data.jsonl:{number}: ")
    bad = list(store.bad_records())
    assert [str(record) for record in bad] == store.meta["bad_records"]
    assert [(record.file, record.line) for record in bad] == [
        (f"{tmp_path}/data.jsonl", line) for line in range(2, 6)
    ]


def test_what_to_do_with_bad_records_changes_no_store_and_is_asked_again_each_time(
    tmp_path: Path, characters: Any
) -> None:
    records = records_of(tmp_path, *GOOD, *BAD)

    def build(policy: Any) -> TokenStore:
        return build_store(tmp_path / "s", records, characters(), on_bad_record=policy, name="d")

    for policy in ("error", BadRecordLimit(count=3), BadRecordLimit(share=0.4)):
        with pytest.raises(DataError, match=r"data\.jsonl:5: invalid JSON"):
            build(policy)
    before = build("skip")
    made = (tmp_path / "s" / "meta.json").stat().st_ino
    for policy in (BadRecordLimit(count=4), BadRecordLimit(share=0.5), "skip"):
        assert contents(build(policy)) == contents(before)
    with pytest.raises(DataError, match=r"data\.jsonl:5: invalid JSON"):
        build("error")
    with pytest.raises(DataError, match=r"4 bad records among 8 of 8, more than the 3 that"):
        build(BadRecordLimit(count=3, share=0.9))
    assert (tmp_path / "s" / "meta.json").stat().st_ino == made


def test_a_limit_stops_the_build_before_the_rest_is_read(tmp_path: Path, characters: Any) -> None:
    lines: list[Any] = [*["nonsense"] * 100, *[{"text": "x", "do": "fail"}] * 900]
    records = records_of(tmp_path, *lines)
    with pytest.raises(DataError, match=r"data\.jsonl:1: .* 32 bad records among 32 of 1,000"):
        build_store(
            tmp_path / "s", records, characters(), on_bad_record=BadRecordLimit(count=9), name="d"
        )


def test_a_share_of_bad_records_is_the_one_that_is_written() -> None:
    for hundredths in range(1, 100):
        limit = BadRecordLimit(share=hundredths / 100)
        assert most_bad_records(limit, 100) == hundredths
        assert most_bad_records(limit, 10_050) == hundredths * 10_050 // 100
    assert most_bad_records(BadRecordLimit(share=1e-7), 10**7) == 1


def test_a_record_nested_too_deeply_is_bad_and_the_others_are_kept(
    tmp_path: Path, characters: Any
) -> None:
    records = records_of(tmp_path, GOOD[0], {"do": "go deep"}, GOOD[1])
    with pytest.raises(DataError, match=r"data\.jsonl:2: nested too deeply to be read"):
        build_store(tmp_path / "s", records, characters(), name="d")
    store = build_store(tmp_path / "s", records, characters(), name="d", on_bad_record="skip")
    assert (len(store), store.meta["num_bad"]) == (3, 1)


def test_media_and_extras_are_kept_as_they_are(tmp_path: Path, characters: Any) -> None:
    class Pictures(characters):  # type: ignore[misc]
        """Every second word has a picture, every third an extra."""

        def __call__(self, record: Any) -> Any:
            examples = super().__call__(record)
            for number, example in enumerate(examples):
                if number % 2 == 0:
                    example.media = {"images": [f"{number}.png", "\u00e9"]}
                    example.num_tiles = number + 3
                if number % 3 == 0:
                    example.extras = {"score": 0.5}
            return examples

    store = build_store(tmp_path / "s", records_of(tmp_path, *GOOD), Pictures(), name="d")
    assert [store[i].num_tiles for i in range(7)] == [3, 0, 3, 3, 0, 5, 3]
    assert store.num_tiles is not None and store.num_tiles.tolist() == [3, 0, 3, 3, 0, 5, 3]
    assert store[5].media == {"images": ["2.png", "\u00e9"]} and store[5].extras == {}
    assert store[0].extras == {"score": 0.5} and store[1].extras == {} == store[1].media
    plain = build_store(tmp_path / "t", records_of(tmp_path, *GOOD), characters(), name="d")
    assert plain.num_tiles is None
    assert not (tmp_path / "t" / "details.bin").exists()


def test_the_first_bad_record_of_many_is_named_by_workers(tmp_path: Path, characters: Any) -> None:
    lines: list[Any] = [{"text": f"record {i}"} for i in range(60)]
    lines[20] = lines[21] = lines[55] = "nonsense"
    with pytest.raises(DataError, match=r"data\.jsonl:21: invalid JSON"):
        build_store(
            tmp_path / "s", records_of(tmp_path, *lines), characters(), name="d", num_workers=2
        )


def test_a_dead_worker_is_an_error_and_no_hang(tmp_path: Path, characters: Any) -> None:
    note = tmp_path / "note"
    records = records_of(tmp_path, *GOOD, {"do": "die", "note": str(note)}, *GOOD)
    with pytest.raises(DataError, match="a tokenize worker of dataset 'd' died") as caught:
        build_store(tmp_path / "s", records, characters(), name="d", num_workers=2)
    noticed = time.monotonic()  # one clock for all processes of a machine
    pid, died = note.read_text().split()
    assert 0 < noticed - float(died) < 5
    assert str(caught.value).startswith(f"{tmp_path}/data.jsonl:5: ")
    assert f"of its span {tmp_path}/data.jsonl:1 to {tmp_path}/data.jsonl:9" in str(caught.value)
    assert f"(process {pid}, killed by SIGKILL, perhaps for want of memory)" in str(caught.value)
    assert not (tmp_path / "s").exists()


def test_a_programming_error_keeps_its_type_and_names_the_record(
    tmp_path: Path, characters: Any
) -> None:
    with pytest.raises(KeyError, match="oops") as caught:
        build_store(
            tmp_path / "s", records_of(tmp_path, GOOD[0], {"do": "bug"}), characters(), name="d"
        )
    assert caught.value.__notes__ == [f"while tokenizing {tmp_path}/data.jsonl:2"]


def test_a_programming_error_in_a_worker_keeps_its_type_and_names_the_record(
    tmp_path: Path, characters: Any
) -> None:
    records = records_of(tmp_path, GOOD[0], {"do": "bug"})
    with pytest.raises(KeyError, match="oops") as caught:
        build_store(tmp_path / "s", records, characters(), name="d", num_workers=2)
    assert caught.value.__notes__ == [f"while tokenizing {tmp_path}/data.jsonl:2"]


def test_any_error_of_a_worker_comes_back(tmp_path: Path, characters: Any) -> None:
    gone = str(tmp_path / "gone.png")
    for record, expected, message in (
        ({"do": "shout"}, ValueError, "x" * 300_000),  # more than a pipe holds
        ({"do": "be odd"}, RuntimeError, "Odd: this and that while tokenizing"),
        ({"do": "open", "path": gone}, FileNotFoundError, gone),
    ):
        records = records_of(tmp_path, GOOD[0], record)
        with pytest.raises(expected, match=message) as caught:
            build_store(tmp_path / "s", records, characters(), name="d", num_workers=1)
        notes = getattr(caught.value, "__notes__", [str(caught.value)])
        assert f"while tokenizing {tmp_path}/data.jsonl:2" in notes[0]


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


def test_the_fingerprint_follows_data_tokenizer_and_schema(tmp_path: Path, characters: Any) -> None:
    records = records_of(tmp_path, *GOOD)
    prints = [
        store_fingerprint(records, characters()),
        store_fingerprint(records, characters(65)),
        store_fingerprint(records, characters(64, "v2")),
        store_fingerprint(records, characters(), RecordSchema({"type": "object"}, "x")),
        store_fingerprint(records, characters(), RecordSchema({"required": ["text"]}, "x")),
        store_fingerprint(records_of(tmp_path, *GOOD[:2]), characters()),
    ]
    assert len(set(prints)) == 6
    assert store_fingerprint(records, characters()) == prints[0]


class TellingDisk:
    """Tokenizes as `characters` does; notes each record, so that a test sees what was done twice."""

    def __init__(self, inner: Any, log: Path) -> None:
        self.inner, self.log, self.max_length = inner, log, inner.max_length

    def __call__(self, record: Any) -> Any:
        with self.log.open("a") as file:
            file.write(record["text"] + "\n")
        return self.inner(record)

    def take_counts(self) -> Any:
        return self.inner.take_counts()

    def fingerprint(self) -> str:
        return str(self.inner.fingerprint())


def test_a_killed_build_leaves_no_store_and_what_it_did_is_not_done_again(
    tmp_path: Path, characters: Any
) -> None:
    lines: list[Any] = [{"text": f"record {i}"} for i in range(100)]
    path = Path(
        records_of(tmp_path, *lines[:70], {"text": "x", "do": "die"}, *lines[71:]).key(0).file
    )
    records = JsonlDataset(JsonlDataset.Config(anno_path=str(path))).build("d")
    process = multiprocessing.get_context("spawn").Process(
        target=build_store,
        args=(tmp_path / "s", records, characters()),
        kwargs={"name": "d", "fingerprint": "f"},
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    parts = sorted(path.name for path in tmp_path.glob(".s.*.draft/*.part"))
    assert parts == ["000000.part", "000001.part"], "it died while it wrote the third"
    assert list(tmp_path.glob(".s.*.draft/2.claim"))
    assert not (tmp_path / "s").exists()
    with pytest.raises(DataError, match="no token store"):
        open_store(tmp_path / "s")

    whole = records_of(tmp_path, *lines)
    log = tmp_path / "log"
    build_store(tmp_path / "s", whole, TellingDisk(characters(), log), name="d", fingerprint="f")
    assert log.read_text().splitlines() == [line["text"] for line in lines[64:]]
    build_store(tmp_path / "t", whole, characters(), name="d", fingerprint="f")
    assert files_of(tmp_path / "s") == files_of(tmp_path / "t")
    assert {path.name for path in tmp_path.iterdir()} == {"code", "data.jsonl", "s", "t", "log"}


@pytest.mark.parametrize("damage", ["cut short", "a byte"])
def test_a_part_that_a_power_cut_damaged_is_made_again(
    tmp_path: Path, characters: Any, damage: str
) -> None:
    lines: list[Any] = [{"text": f"record {i}"} for i in range(70)]
    records = records_of(tmp_path, *lines)
    build_store(tmp_path / "t", records, characters(), name="d", fingerprint="f")
    bad = records_of(tmp_path, *lines[:69], "nonsense")
    with pytest.raises(DataError, match="data.jsonl:70"):
        build_store(tmp_path / "s", bad, characters(), name="d", fingerprint="f")
    (draft,) = tmp_path.glob(".s.*.draft")
    for name in ("000002.part", "000002.1.bad"):
        (draft / name).unlink()
    part = draft / "000001.part"
    content = part.read_bytes()
    if damage == "cut short":
        part.write_bytes(content[:-30])
    else:
        part.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    records = records_of(tmp_path, *lines)
    build_store(tmp_path / "s", records, characters(), name="d", fingerprint="f")
    assert files_of(tmp_path / "s") == files_of(tmp_path / "t")


def test_a_file_that_changes_while_it_is_read_stops_the_build(
    tmp_path: Path, characters: Any
) -> None:
    records = records_of(tmp_path, *GOOD)

    class Writing(characters):  # type: ignore[misc]
        """Somebody appends to the file meanwhile."""

        def __call__(self, record: Any) -> Any:
            with (tmp_path / "data.jsonl").open("a") as file:
                file.write("{}\n")
            return super().__call__(record)

    with pytest.raises(DataError, match=r"data\.jsonl: the file changed while it was read"):
        build_store(tmp_path / "s", records, Writing(), name="d")


def test_processes_that_build_one_store_share_the_work(tmp_path: Path, characters: Any) -> None:
    records = records_of(tmp_path, *[{"text": f"record {i}"} for i in range(300)])
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(
            target=build_store,
            args=(tmp_path / "s", records, TellingDisk(characters(), log)),
            kwargs={"name": "d", "num_workers": 0},
        )
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(log.read_text().splitlines()) == sorted(f"record {i}" for i in range(300))
    assert len(open_store(tmp_path / "s")) == 600
    assert {path.name for path in tmp_path.iterdir()} == {"code", "data.jsonl", "s", "log"}


def test_a_damaged_or_foreign_store_is_refused(tmp_path: Path, characters: Any) -> None:
    store = build_store(tmp_path / "s", records_of(tmp_path, *GOOD), characters(), name="d")
    ids = (tmp_path / "s" / "ids.bin").read_bytes()
    (tmp_path / "s" / "ids.bin").write_bytes(ids[:-4])
    with pytest.raises(DataError, match=r"ids\.bin: 104 bytes, expected 108"):
        open_store(tmp_path / "s")
    (tmp_path / "s" / "ids.bin").write_bytes(ids)
    assert damaged_files(tmp_path / "s") == []
    (tmp_path / "s" / "ids.bin").write_bytes(ids[:-1] + b"\x09")
    assert damaged_files(tmp_path / "s") == ["ids.bin"]
    meta = {**store.meta, "format_version": 999}
    (tmp_path / "s" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match="format 999, expected 2"):
        open_store(tmp_path / "s")
    (tmp_path / "s" / "meta.json").write_text("{")
    with pytest.raises(DataError, match=r"meta\.json is damaged"):
        open_store(tmp_path / "s")


def test_a_copy_of_the_data_elsewhere_has_the_same_content(tmp_path: Path, characters: Any) -> None:
    stores = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        records = records_of(tmp_path / name, *GOOD)
        stores.append(build_store(tmp_path / name / "s", records, characters(), name=name))
    assert stores[0].content_identity() == stores[1].content_identity()
    other = build_store(tmp_path / "s", records_of(tmp_path, *GOOD[:3]), characters(), name="d")
    assert other.content_identity() != stores[0].content_identity()


SCHEMA = {
    "type": "object",
    "required": ["text"],
    "properties": {
        "text": {"type": "string"},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}},
    },
}


def test_a_record_that_does_not_fit_the_schema_is_bad_and_the_field_is_quoted(
    tmp_path: Path, characters: Any
) -> None:
    lines = [GOOD[0], {"text": "x", "tags": ["a", "c"]}, {"txt": ""}, {"text": 5}]
    store = build_store(
        tmp_path / "s", records_of(tmp_path, *lines), characters(), name="d",
        schema=RecordSchema(SCHEMA, "schema"), on_bad_record="skip",
    )  # fmt: skip
    assert [record.reason for record in store.bad_records()] == [
        "tags[1]: 'c' is not one of ['a', 'b']",
        "'text' is a required property",
        "text: 5 is not of type 'string'",
    ]


def test_what_is_no_json_schema_is_refused() -> None:
    with pytest.raises(ConfigError, match="s.json: not a JSON Schema: type: 'objekt' is not valid"):
        RecordSchema({"type": "objekt"}, "s.json")


def test_a_store_that_another_process_publishes_at_the_last_moment_is_used(
    tmp_path: Path, characters: Any
) -> None:
    """A draft goes away with its publication: who was about to join it takes what was published."""
    records = records_of(tmp_path, *GOOD)

    class Overtaken:
        others = 0

        def __len__(self) -> int:  # asked for when the draft is there and not yet joined
            if not self.others:
                self.others = 1
                build_store(tmp_path / "s", records, characters(), name="d", fingerprint="one")
            return len(records)

    late: Any = Overtaken()
    store = build_store(tmp_path / "s", late, characters(), name="d", fingerprint="one")
    assert late.others == 1 and len(store) == 7
    left = sorted(path.name for path in tmp_path.iterdir() if "draft" in path.name)
    assert not left
