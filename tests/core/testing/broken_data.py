"""Datasets and record formats with one fault each."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from broken_parts import Broken, Sound
from pydantic import Field

import pegboard
from pegboard import DataError, RecordChat, RecordContent, SampleKey

__all__ = ["BROKEN", "SOUND"]


class Rows:
    """The lines of a file, each a JSON object."""

    def __init__(self, name: str, path: str) -> None:
        self.name, self.path = name, path
        self.lines = Path(path).read_text(encoding="utf-8").splitlines()

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Any:
        try:
            return json.loads(self.lines[index])
        except ValueError as error:
            raise DataError(f"{self.key(index)}: no JSON") from error

    def key(self, index: int) -> SampleKey:
        return SampleKey(self.name, self.path, index + 1)

    def fingerprint(self) -> str | None:
        return hashlib.sha256(Path(self.path).read_bytes()).hexdigest()


class ListOfPairs(Rows):
    def __getitem__(self, index: int) -> Any:
        return list(super().__getitem__(index).items())


class Wrapping(Rows):
    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index % len(self))


class OneKey(Rows):
    def key(self, index: int) -> SampleKey:
        return SampleKey(self.name, self.path, 1)


class FromZero(Rows):
    def key(self, index: int) -> SampleKey:
        return SampleKey(self.name, self.path, index)


class OtherSource(Rows):
    def key(self, index: int) -> SampleKey:
        return SampleKey("data", self.path, index + 1)


class Restless(Rows):
    def fingerprint(self) -> str | None:
        return os.urandom(8).hex()


class Stale(Rows):
    def fingerprint(self) -> str | None:
        return self.path


class Remembering(Rows):
    last = -1

    def __getitem__(self, index: int) -> Any:
        back, self.last = index < self.last, index
        return {**super().__getitem__(index), **({"back": True} if back else {})}


class Unpicklable(Rows):
    def __init__(self, name: str, path: str) -> None:
        super().__init__(name, path)
        self.open = lambda: 1


class OpenedByTheFirst(Rows):
    opened = False

    def __getitem__(self, index: int) -> Any:
        self.opened = self.opened or index == 0
        found = super().__getitem__(index)
        return found if self.opened else {}


class GoneFiles(Rows):
    data_files = ("no/such/file.jsonl",)


class Nameless(Rows):
    def __getitem__(self, index: int) -> Any:
        try:
            return super().__getitem__(index)
        except DataError:
            raise DataError("a line is no JSON") from None


class Forgiving(Rows):
    asked = frozenset[int]()

    def __getitem__(self, index: int) -> Any:
        if index in self.asked:
            return {}
        try:
            return super().__getitem__(index)
        except DataError:
            self.asked = self.asked | {index}
            raise


def dataset(rows: type[Rows]) -> type[pegboard.DatasetComponent]:
    class Lines(pegboard.DatasetComponent):
        """The lines of a file."""

        class Config(pegboard.ComponentConfig):
            path: str = Field(description="The file.")

        config: Config

        def build(self, name: str) -> Any:
            return rows(name, self.config.path)

    return Lines


def good(folder: Path) -> Mapping[str, Any]:
    lines = [json.dumps({"text": str(number)}) for number in range(5)]
    (folder / "good.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return {"path": str(folder / "good.jsonl")}


def bad(folder: Path) -> Mapping[str, Any]:
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n{"text": "c"}', encoding="utf-8")
    return {"path": str(folder / "bad.jsonl")}


def change(folder: Path) -> None:
    (folder / "good.jsonl").write_text('{"text": "changed"}', encoding="utf-8")


class Quiz:
    """Records of a question and its answer."""

    def accepts(self, record: Any) -> bool:
        return isinstance(record, dict) and "quiz" in record

    def read(self, record: Any) -> RecordContent:
        pair = record["quiz"]
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"quiz: expected two texts, found {pair!r}")
        roles = ("user", "assistant")
        return RecordChat([{"role": r, "content": c} for r, c in zip(roles, pair, strict=True)])


class Picky(Quiz):
    def accepts(self, record: Any) -> bool:
        return super().accepts(record) and "hint" in record


class Greedy(Quiz):
    def accepts(self, record: Any) -> bool:
        return isinstance(record, dict) and bool(record.keys() & {"quiz", "messages"})


class Empty(Quiz):
    def read(self, record: Any) -> RecordContent:
        super().read(record)
        return RecordChat([])


class Trusting(Quiz):
    def read(self, record: Any) -> RecordContent:
        question, answer = record["quiz"]
        messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        return RecordChat(list(messages))


class Emptying(Quiz):
    def read(self, record: Any) -> RecordContent:
        content = super().read(dict(record))
        record["quiz"] = None
        return content


class Closed(Quiz):
    def __init__(self) -> None:
        self.open = lambda: 1


def record_format(form: type[Quiz]) -> type[pegboard.RecordFormatComponent]:
    class QuizFormat(pegboard.RecordFormatComponent):
        """Records of a question and its answer."""

        config: Any

        def build(self) -> Any:
            return form()

    return QuizFormat


def quizzes() -> dict[str, Any]:
    """Fresh ones: a part that changes them must not spoil the next test."""
    return {
        "records": [{"quiz": ["who?", "me"]}],
        "foreign": [{"messages": []}],
        "broken": [{"quiz": ["who?"]}, {"quiz": 3}],
    }


DATASET = {"bad_config": bad, "change": change}
SOUND = {
    "dataset": Sound(dataset(Rows), good, DATASET),
    "record_format": Sound(record_format(Quiz), {}, quizzes()),
}


def _dataset(fault: str, check: str, rows: type[Rows], *also: str) -> Broken:
    return Broken(fault, check, dataset(rows), good, DATASET, frozenset(also))


def _format(fault: str, check: str, form: type[Quiz], *also: str) -> Broken:
    return Broken(fault, check, record_format(form), {}, quizzes(), frozenset(also))


BROKEN = [
    _dataset("gives lists of pairs in place of mappings", "has_records", ListOfPairs),
    _dataset("wraps around behind its last record", "an_index_outside_is_an_error", Wrapping),
    _dataset("gives all records one key", "keys_say_where", OneKey),
    _dataset("counts lines from 0", "keys_say_where", FromZero),
    _dataset("does not pass on the name it was given", "keys_say_where", OtherSource),
    _dataset("has a fingerprint of its own each time", "fingerprint_is_stable", Restless),
    _dataset("has the fingerprint of its path", "fingerprint_changes_with_the_data", Stale),
    _dataset(
        "reads backwards differently",
        "any_order_gives_the_same_records",
        Remembering,
        "a_bad_record_is_bad_alone",
    ),
    _dataset("holds what does not pickle", "pickles_into_a_new_process", Unpicklable),
    _dataset("opens with its first record", "goes_on_from_any_index", OpenedByTheFirst),
    _dataset("names files that are not there", "data_files_are_there", GoneFiles),
    _dataset("does not say where a bad record is", "a_bad_record_is_named", Nameless),
    _dataset("gives a made-up record the second time", "a_bad_record_is_bad_alone", Forgiving),
    _format("does not know a record without a hint", "knows_its_records", Picky, "pickles"),
    _format("takes records of another form", "accepts_nothing_else", Greedy),
    _format("reads a chat of no messages", "reads_what_it_accepts", Empty),
    _format("raises ValueError for a broken record", "broken_records_are_data_errors", Trusting),
    _format("empties the record it reads", "records_are_left_alone", Emptying),
    _format("holds what does not pickle", "pickles", Closed),
]
