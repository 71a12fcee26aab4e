"""A compressed file reads like the file inside; what is wrong is named by its own name and line."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from pegboard.errors import DataError
from pegboard_plugins.records import file_kinds
from pegboard_plugins.records.compressed_lines import CompressedLines

RECORDS = [{"n": n, "text": "\u00e9" * n} for n in range(50)]
PLAIN = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def packed(data: bytes, ending: str) -> bytes:
    if ending == ".gz":
        return gzip.compress(data)
    zstandard = pytest.importorskip("zstandard")
    return bytes(zstandard.ZstdCompressor().compress(data))


@pytest.fixture(params=[".gz", ".zst"])
def ending(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def write(folder: Path, ending: str, data: bytes = PLAIN) -> Path:
    path = folder / f"x.jsonl{ending}"
    path.write_bytes(packed(data, ending))
    return path


def opened(path: Path) -> CompressedLines:
    return CompressedLines(str(path), str(path.parent / "unpacked"))


def test_records_are_those_of_the_file_inside_in_any_order(tmp_path: Path, ending: str) -> None:
    lines = opened(write(tmp_path, ending))
    assert len(lines) == 50
    assert [lines.read_record(i) for i in (49, 0, 7)] == [RECORDS[i] for i in (49, 0, 7)]
    copy = pickle.loads(pickle.dumps(lines))
    lines.close()
    assert [copy.read_record(i) for i in range(50)] == RECORDS
    with pytest.raises(IndexError):
        lines.read_record(50)


def test_several_members_or_frames_are_one_file(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path, ending)
    half = PLAIN.index(b"\n") + 1
    path.write_bytes(packed(PLAIN[:half], ending) + packed(PLAIN[half:], ending))
    assert [opened(path).read_record(i) for i in range(50)] == RECORDS


def test_a_bad_line_is_named_in_the_compressed_file(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path, ending, b'{"n": 1}\nnonsense\n')
    with pytest.raises(DataError) as error:
        opened(path).read_record(1)
    assert str(error.value).startswith(f"{path}:2: invalid JSON")
    path = write(tmp_path, ending, b"")
    with pytest.raises(DataError) as error:
        opened(path)
    assert str(error.value).startswith(f"{path}:1: the file is empty")


def test_a_cut_off_or_damaged_file_is_refused_and_leaves_nothing(
    tmp_path: Path, ending: str
) -> None:
    whole = packed(PLAIN, ending)
    for data in (whole[: len(whole) // 2], whole[:-1], b"\x00" * 40):
        path = write(tmp_path, ending)
        path.write_bytes(data)
        with pytest.raises(DataError) as error:
            opened(path)
        assert str(error.value).startswith(f"{path}: can't unpack it")
        assert os.listdir(tmp_path / "unpacked") == []
    with pytest.raises(DataError, match="can't unpack it"):
        opened(tmp_path / f"nowhere.jsonl{ending}")


def test_a_changed_file_is_unpacked_again_and_an_equal_one_is_not(
    tmp_path: Path, ending: str
) -> None:
    path = write(tmp_path, ending)
    opened(path)
    (first,) = (tmp_path / "unpacked").glob("*.jsonl")
    made = first.stat().st_ino
    os.utime(first, (0, 0))
    opened(path)
    assert first.stat().st_ino == made
    assert first.stat().st_mtime > 0, "its time says when it was last opened"
    write(tmp_path, ending, b'{"n": 0}\n')
    assert len(opened(path)) == 1


def test_a_change_that_keeps_size_and_time_is_unpacked_again(tmp_path: Path) -> None:
    for name, texts in {
        "x.jsonl.gz": [gzip.compress(b'{"n": %d}\n' % n, mtime=0) for n in (1, 2)],
        "x.json": [b'[{"n": 1}]', b'[{"n": 2}]'],
    }.items():
        path = tmp_path / name
        last = 0
        for n, text in enumerate(texts, start=1):
            path.write_bytes(text)
            os.utime(path, (1e9, 1e9))
            while path.stat().st_ctime_ns == last:  # the system's clock goes in steps
                os.utime(path, (1e9, 1e9))
            last = path.stat().st_ctime_ns
            assert path.stat().st_size == len(texts[0])
            assert opened(path).read_record(0) == {"n": n}


def test_an_unpacked_file_that_a_power_cut_left_short_is_made_again(
    tmp_path: Path, ending: str
) -> None:
    path = write(tmp_path, ending)
    opened(path)
    (unpacked,) = (tmp_path / "unpacked").glob("*.jsonl")
    note = unpacked.with_suffix(".note.json")
    os.truncate(unpacked, PLAIN.index(b"\n") + 1)
    assert len(opened(path)) == 50
    os.truncate(note, 0)
    os.truncate(unpacked, 0)
    assert len(opened(path)) == 50
    note.unlink()
    made = unpacked.stat().st_ino
    assert len(opened(path)) == 50
    assert unpacked.stat().st_ino == made, "without a note nothing speaks against it"


def test_an_unpacked_file_that_somebody_deleted_is_unpacked_again(
    tmp_path: Path, ending: str
) -> None:
    path = write(tmp_path, ending)
    lines = opened(path)
    expected = lines.read_record(0)
    for deleted in (tmp_path / "unpacked").iterdir():
        deleted.unlink()
    assert lines.read_record(0) == expected
    lines.close()
    for deleted in (tmp_path / "unpacked").iterdir():
        deleted.unlink()
    write(tmp_path, ending, b'{"n": 0}\n')
    with pytest.raises(DataError, match="the file changed while it was read; start again"):
        lines.read_record(0)


def test_a_package_that_is_missing_is_named_with_the_command() -> None:
    code = (
        "import sys; sys.modules['zstandard'] = None; sys.modules['pyarrow'] = None\n"
        "from pegboard_plugins.records.file_kinds import missing_package\n"
        "print(missing_package('a.jsonl.zst')); print(missing_package('a.parquet'))\n"
        "print(missing_package('a.jsonl.gz'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    zstd, parquet, gz = done.stdout.splitlines()
    assert "'zstandard'" in zstd and "pip install 'pegboard[zstd]'" in zstd
    assert "'pyarrow'" in parquet and "pip install 'pegboard[parquet]'" in parquet
    assert gz == "None"


def test_the_default_folder_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert file_kinds.default_unpack_dir() == "/somewhere/pegboard/unpacked"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert file_kinds.default_unpack_dir().startswith(os.path.expanduser("~"))
