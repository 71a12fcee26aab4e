"""The claim: a file that is one JSON list gives the records that its lines would give, however it is written."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from pegboard import DataError
from pegboard_plugins.jsonl.reading import JsonlRecords
from pegboard_plugins.records import json_array
from pegboard_plugins.records.json_array import is_json_array, iter_array_lines


def _records(count: int) -> list[dict[str, Any]]:
    rng = random.Random(3)
    pieces = ['"', "\\", "]", "[", "{", "}", ",", "\n", "é", "\U0001f600", "a" * 50, "\u2028"]
    return [
        {"text": "".join(rng.choices(pieces, k=rng.randrange(30))), "n": [number, {"x": 1.5}]}
        for number in range(count)
    ]


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 22])
@pytest.mark.parametrize("options", [{}, {"indent": 2}, {"ensure_ascii": False, "indent": 1}])
def test_the_lines_are_the_records(
    tmp_path: Path, options: dict[str, Any], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_array, "_BLOCK_CHARACTERS", block)
    path, records = tmp_path / "a.json", _records(40)
    path.write_text(json.dumps(records, **options), encoding="utf-8")
    lines = list(iter_array_lines(str(path)))
    assert [json.loads(line) for line in lines] == records
    assert all(line.count(b"\n") == 1 and line.endswith(b"\n") for line in lines)


def test_a_dataset_reads_it_by_name_and_names_the_record(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf\r\n[\r\n{"a": 1},\r\n7 , {"a": 2}\r\n]\r\n')
    records = JsonlRecords("d", [str(path)], unpack_dir=str(tmp_path / "unpacked"))
    assert len(records) == 3 and records[2] == {"a": 2}
    assert records.key(2).line == 3 and records.key(2).file == str(path)
    with pytest.raises(DataError, match=r"a\.json:2: found a JSON int, expected an object"):
        records[1]


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_record_that_is_nested_too_deeply_is_an_error_of_one_line(
    tmp_path: Path, end: str
) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, ' + "[" * 100_000 + "]" * 100_000 + "]" + end, encoding="utf-8")
    records = JsonlRecords("d", [str(path)], unpack_dir=str(tmp_path / "unpacked"))
    with pytest.raises(DataError, match="it is no whole JSON list of records: .*recursion"):
        len(records)
    assert not list((tmp_path / "unpacked").iterdir())


def test_lines_in_a_file_called_json_stay_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for lines, count in (([chat, chat], 2), ([{"a": 1}, {"a": 2}, {"a": 3}], 3)):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        assert not is_json_array(str(path))
        assert len(JsonlRecords("d", [str(path)], unpack_dir=str(tmp_path / "u"))) == count
    for records in ([{"a": 1}], [chat, chat], [], [1]):
        path.write_text(json.dumps(records) + "\n", encoding="utf-8")
        assert is_json_array(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"a": ', "record 2: the file ends in it"),
        ('[{"a": 1}, {"a": 2}', "record 2: the file ends in it, or behind it"),
        ('[{"a": 1} {"a": 2}]', "record 1: expected a comma"),
        ('[{"a": 1}, {"a" 2' + " " * 200 + "}]", "record 2: Expecting ':' delimiter"),
        ('[{"a": 1}] {"a": 2}', "something stands behind the list's end"),
        ('[{"a": 1},\n]', "record 1: a comma, but no record behind it"),
        ("[", "record 1: the file ends"),
    ],
)
def test_what_is_no_whole_list_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        len(JsonlRecords("d", [str(path)], unpack_dir=str(tmp_path / "u")))
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert not list((tmp_path / "u").iterdir())


def test_an_empty_list_holds_no_record(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[ ]", encoding="utf-8")
    with pytest.raises(DataError, match="a.json"):
        len(JsonlRecords("d", [str(path)], unpack_dir=str(tmp_path / "u")))
