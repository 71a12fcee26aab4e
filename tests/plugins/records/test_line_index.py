"""Every valid spelling of a JSON-lines file is read; a broken line is named by file and line."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from pegboard import DataError
from pegboard_plugins.records import line_index
from pegboard_plugins.records.line_index import LineIndex, parse_json_line

RECORDS = [{"a": 1}, {"text": "zwei\u00e9\u4e8c"}, {"c": [3, {"d": None}]}]
LINES = [json.dumps(record, ensure_ascii=False).encode() for record in RECORDS]


def write(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    "content",
    [
        b"\n".join(LINES) + b"\n",
        b"\n".join(LINES),
        b"\r\n".join(LINES) + b"\r\n",
        b"\xef\xbb\xbf" + b"\n".join(LINES),
        b"\n".join(LINES) + b"\n\n \r\n\t\n\n",
        b"\n".join(LINES) + b"\n" + b" " * 9000,
    ],
    ids=["plain", "no last newline", "CRLF", "BOM", "blank tail", "long blank tail"],
)
def test_every_valid_spelling_gives_the_same_records(tmp_path: Path, content: bytes) -> None:
    index = LineIndex(write(tmp_path, content))
    assert [index.read_record(i) for i in range(len(index))] == RECORDS


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", "blank line"),
        (b"  \t", "blank line"),
        (b'{"a": ', "invalid JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[1, 2]", "found a JSON list"),
        (b"null", "found a JSON NoneType"),
        (b'{"a": "\\ud800"}', "lone surrogate"),
        (b"[" * 100_000, "can't be read"),
    ],
)
@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_bad_line_is_named_and_its_neighbours_read(
    tmp_path: Path, line: bytes, reason: str, ending: bytes, place: int
) -> None:
    lines = [*LINES[:place], line, *LINES[place:]]
    index = LineIndex(write(tmp_path, ending.join(lines)))
    with pytest.raises(DataError, match=reason) as caught:
        index.read_record(place)
    assert str(caught.value).startswith(f"{index.path}:{place + 1}: ")
    assert "\n" not in str(caught.value)
    assert [index.read_record(i) for i in range(len(index)) if i != place] == RECORDS


@pytest.mark.parametrize("content", [b"", b"\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n \n", b"  "])
def test_a_file_without_records_is_an_error(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl:1: the file is empty"):
        LineIndex(write(tmp_path, content))


def test_lines_that_straddle_blocks_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_index, "_BLOCK_BYTES", 7)
    index = LineIndex(write(tmp_path, b"\n".join(LINES)))
    assert [index.read_record(i) for i in range(len(index))] == RECORDS


@pytest.mark.parametrize("num_threads", [1, 3])
def test_ranges_that_threads_share_give_every_line_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_threads: int
) -> None:
    lines = [json.dumps({"n": "x" * (i % 13)}).encode() for i in range(200)]
    path = write(tmp_path, b"\n".join(lines))
    for size in (8, 16, 24, 1000):
        monkeypatch.setattr(line_index, "_BLOCK_BYTES", size)
        monkeypatch.setattr(line_index, "_RANGE_BYTES", 3 * size + 5)
        index = LineIndex(path, num_threads=num_threads)
        assert [index.read_bytes(i).rstrip() for i in range(len(index))] == lines


@pytest.mark.parametrize(
    "text",
    ['{"a": NaN}', '{"a": 1e999}', '{"a": 123456789012345678901234567890}', '{"a": "\\u00e9\\ud83d\\ude00"}',
     '{"a": ' + "[" * 300 + "]" * 300 + "}", '{"a": 1, "a": 2}', '{"a": -0.0, "b": 0.1}', '\t{"a": ""}  '],
)  # fmt: skip
def test_a_line_means_what_the_standard_library_says(text: str) -> None:
    assert repr(parse_json_line(text.encode(), "x:1")) == repr(json.loads(text))


def test_a_pickled_index_reads_the_same(tmp_path: Path) -> None:
    index = LineIndex(write(tmp_path, b"\n".join(LINES)))
    index.read_record(0)
    copy = pickle.loads(pickle.dumps(index))
    assert [copy.read_record(i) for i in range(len(copy))] == RECORDS


def test_a_file_cut_short_after_indexing_is_an_error(tmp_path: Path) -> None:
    index = LineIndex(write(tmp_path, b"\n".join(LINES)))
    Path(index.path).write_bytes(LINES[0])
    with pytest.raises(DataError, match=r"data\.jsonl:3: the file became shorter"):
        index.read_record(2)
