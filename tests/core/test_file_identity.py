"""A file's hash follows its content, and is worked out again only where the file may have changed."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from pegboard import DataError, file_identity
from pegboard.file_identity import content_hashes


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of files that are read."""
    seen: list[str] = []
    read = file_identity._hash_range

    def note(place: str, start: int) -> bytes:
        seen.append(Path(place).name)
        return read(place, start)

    monkeypatch.setattr(file_identity, "_hash_range", note)
    return seen


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that was left alone for long enough."""
    monkeypatch.setattr(file_identity, "_QUIET_S", 0.1)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"content")
    time.sleep(0.15)
    return path


def hash_of(path: Path) -> str:
    (found,) = content_hashes([str(path)], path.parent / "ledger")
    return found


def test_a_file_is_read_once(file: Path, reads: list[str]) -> None:
    assert hash_of(file) == hash_of(file)
    assert reads == ["a.jsonl"]


def test_a_change_that_keeps_size_and_time_is_seen(file: Path, reads: list[str]) -> None:
    stat = file.stat()
    before = hash_of(file)
    file.write_bytes(b"Content")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert hash_of(file) != before
    time.sleep(0.15)
    file.write_bytes(b"content")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert hash_of(file) == before, "the hash is of the content alone"


def test_a_hash_made_too_soon_after_a_change_is_not_trusted(file: Path, reads: list[str]) -> None:
    file.write_bytes(b"fresh")
    hash_of(file)
    hash_of(file)
    assert len(reads) >= 2


def test_ranges_of_a_large_file_make_one_hash(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    monkeypatch.setattr(file_identity, "_RANGE_BYTES", 3)
    told: list[tuple[int, int]] = []
    first = content_hashes([str(file)], tmp_path / "one", lambda *done: told.append(done))
    assert reads == ["a.jsonl"] * 3 and told == [(3, 7), (6, 7), (7, 7)]
    monkeypatch.setattr(file_identity, "_READ_BYTES", 2)
    assert content_hashes([str(file)], tmp_path / "two") == first
    file.write_bytes(b"contend")
    assert content_hashes([str(file)], tmp_path / "three") != first


def test_files_that_share_a_ledger_are_read_when_one_of_them_changed(
    file: Path, tmp_path: Path, reads: list[str]
) -> None:
    other = tmp_path / "b.jsonl"
    other.write_bytes(b"more")
    time.sleep(0.15)
    files = [str(file), str(other)]
    before = content_hashes(files, tmp_path / "ledger")
    other.write_bytes(b"most")
    time.sleep(0.15)
    after = content_hashes(files, tmp_path / "ledger")
    assert reads == ["a.jsonl", "b.jsonl", "b.jsonl"]
    assert before[0] == after[0] and before[1] != after[1]


def test_a_damaged_ledger_costs_a_reading(file: Path, tmp_path: Path) -> None:
    before = hash_of(file)
    (ledger,) = (tmp_path / "ledger").glob("*.json")
    for text in ("", "[]", json.dumps({str(file): 3}), json.dumps({str(file): [1, 2]})):
        ledger.write_text(text)
        assert hash_of(file) == before


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.jsonl: can't read the file: No such file"):
        content_hashes([str(tmp_path / "no.jsonl")], tmp_path / "ledger")


def test_of_many_processes_one_reads(file: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=content_hashes, args=([str(file)], tmp_path / "ledger"))
        for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert [path.suffix for path in (tmp_path / "ledger").iterdir()] == [".json"]
