"""A JSON-lines dataset is its files in sorted order, with the place of every record."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from pegboard import DataError, SampleKey
from pegboard_plugins.jsonl import reading
from pegboard_plugins.jsonl.component import JsonlDataset, VLMJsonlDataset

NO_RUN: Any = None


def dataset(anno_path: Path, **fields: Any) -> JsonlDataset:
    return JsonlDataset(JsonlDataset.Config(anno_path=str(anno_path), **fields))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """b.jsonl has 2 records, a/z.jsonl 1, c.jsonl 3; the rest is not data."""
    root = tmp_path / "data"
    for name, numbers in {"b.jsonl": [0, 1], "a/z.jsonl": [2], "c.jsonl": [3, 4, 5]}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"n": n}) + "\n" for n in numbers))
    (root / "notes.txt").write_text("not data")
    (root / ".hidden.jsonl").write_text("not data")
    (root / ".cache").mkdir()
    (root / ".cache" / "x.jsonl").write_text("not data")
    os.symlink(root, root / "a" / "circle")
    return root


def test_a_folder_is_its_files_sorted_by_path(folder: Path) -> None:
    records = dataset(folder).build("d")
    assert [records[i]["n"] for i in range(len(records))] == [2, 0, 1, 3, 4, 5]
    with pytest.raises(IndexError):
        records[6]


def test_a_key_is_the_file_and_line_of_its_record(folder: Path) -> None:
    records = dataset(folder).build("d")
    for i in range(len(records)):
        key = records.key(i)
        assert key == SampleKey("d", key.file, key.line, 0)
        line = Path(key.file).read_text().splitlines()[key.line - 1]
        assert json.loads(line) == records[i]


def test_a_bad_line_of_a_later_file_is_named(folder: Path) -> None:
    (folder / "c.jsonl").write_text('{"n": 3}\nnonsense\n{"n": 5}\n')
    records = dataset(folder).build("d")
    with pytest.raises(DataError, match=r"c\.jsonl:2: invalid JSON"):
        records[4]
    assert records[5]["n"] == 5


def test_an_empty_file_in_a_folder_is_named(folder: Path) -> None:
    (folder / "b.jsonl").write_text("")
    records = dataset(folder).build("d")
    with pytest.raises(DataError, match=r"b\.jsonl:1: the file is empty"):
        len(records)


def test_no_file_is_read_before_a_record_is_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_open_all", lambda *_: pytest.fail("scanned"))
    records = dataset(folder).build("d")
    assert records.fingerprint()
    assert [Path(file).name for file in records.data_files] == ["z.jsonl", "b.jsonl", "c.jsonl"]  # type: ignore[attr-defined]


def test_many_files_opened_together_keep_their_order_and_the_first_wrong_one_is_named(
    tmp_path: Path,
) -> None:
    for number in range(20):
        (tmp_path / f"{number:02}.jsonl").write_bytes(b'{"n": %d}\n' % number * (number + 1))
    records = dataset(tmp_path).build("d")
    assert [records[i]["n"] for i in range(len(records))] == [
        n for n in range(20) for _ in range(n + 1)
    ]
    for number in (17, 4):
        (tmp_path / f"{number:02}.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match=r"/04\.jsonl:1: the file is empty"):
        len(dataset(tmp_path).build("d"))


def test_max_records_keeps_the_first(folder: Path) -> None:
    records = dataset(folder, max_records=2).build("d")
    assert [records[i]["n"] for i in range(len(records))] == [2, 0]
    assert len(dataset(folder, max_records=100).build("d")) == 6


def test_few_files_stay_open_and_all_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_MAX_OPEN_FILES", 1)
    records = dataset(folder).build("d")
    assert [records[i]["n"] for i in (5, 0, 1, 5, 2)] == [5, 2, 0, 5, 1]


def test_a_pickled_dataset_is_the_same(folder: Path) -> None:
    records = dataset(folder).build("d")
    records[0]
    copy = pickle.loads(pickle.dumps(records))
    assert [copy[i] for i in range(6)] == [records[i] for i in range(6)]
    assert copy.fingerprint() == records.fingerprint()


def test_the_fingerprint_follows_size_time_and_selection(folder: Path) -> None:
    prints = [dataset(folder).build("d").fingerprint()]
    assert dataset(folder).build("other name").fingerprint() == prints[0]
    prints.append(dataset(folder, max_records=3).build("d").fingerprint())
    stat = (folder / "b.jsonl").stat()
    os.utime(folder / "b.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    prints.append(dataset(folder).build("d").fingerprint())
    with open(folder / "b.jsonl", "a") as file:
        file.write('{"n": 9}\n')
    os.utime(folder / "b.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    prints.append(dataset(folder).build("d").fingerprint())
    assert len(set(prints)) == 4


def test_check_reports_what_is_missing(tmp_path: Path, folder: Path) -> None:
    place = ("datasets", 0, "dataset")
    (tmp_path / "bare").mkdir()
    assert not list(dataset(folder).check(NO_RUN, place))
    for path in (tmp_path / "nowhere.jsonl", tmp_path / "bare"):
        (problem,) = dataset(path).check(NO_RUN, place)
        assert problem.path == (*place, "anno_path")
        assert path.name in problem.message
    config = VLMJsonlDataset.Config(anno_path=str(folder), media_root=str(tmp_path / "no images"))
    (problem,) = VLMJsonlDataset(config).check(NO_RUN, place)
    assert problem.path == (*place, "media_root")


def test_a_vision_dataset_gives_text_and_image_records_as_they_are(tmp_path: Path) -> None:
    content = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "?"}]
    lines = [{"messages": [{"role": "user", "content": text}]} for text in ("hello", content)]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    config = VLMJsonlDataset.Config(anno_path=str(path), media_root=str(tmp_path))
    records = VLMJsonlDataset(config).build("v")
    assert [records[i] for i in range(2)] == lines


def test_a_line_may_be_a_bare_list_of_messages(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "x.jsonl").write_text(json.dumps(messages) + '\n[{"text": "t"}]\n')
    records = dataset(tmp_path / "x.jsonl").build("d")
    assert records[0] == {"messages": messages}
    with pytest.raises(DataError, match=r"x\.jsonl:2: found a JSON list"):
        records[1]


def test_a_folder_may_mix_kinds_of_files(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    zstandard = pytest.importorskip("zstandard")
    from pyarrow import parquet

    records = [{"messages": [{"role": "user", "content": str(n)}]} for n in range(8)]
    lines = [json.dumps(record) + "\n" for record in records]
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jsonl").write_text(lines[0] + lines[1])
    (data / "b.jsonl.gz").write_bytes(gzip.compress((lines[2] + lines[3]).encode()))
    packed = zstandard.ZstdCompressor().compress((lines[4] + lines[5]).encode())
    (data / "c.jsonl.zst").write_bytes(packed)
    parquet.write_table(pyarrow.Table.from_pylist(records[6:]), data / "d.parquet")
    built = dataset(data, unpack_dir=str(tmp_path / "unpacked")).build("d")
    assert [built[i] for i in range(len(built))] == records
    assert [(Path(built.key(i).file).name, built.key(i).line) for i in (3, 4, 7)] == [
        ("b.jsonl.gz", 2),
        ("c.jsonl.zst", 1),
        ("d.parquet", 2),
    ]
    copy = pickle.loads(pickle.dumps(built))
    assert [copy[i] for i in (7, 0, 5)] == [records[i] for i in (7, 0, 5)]
    assert not list(dataset(data).check(NO_RUN, ("datasets", 0, "dataset")))
