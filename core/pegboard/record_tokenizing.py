"""Spans of records -> part files: tokenize each record, and say what became of every one.

A record gives samples, or is dropped with a reason, or is bad; none is lost. What a part holds
depends on its records alone, so whoever makes it makes the same bytes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from pegboard.contracts import Dataset, Example, SampleKey, TokenizeFn
from pegboard.errors import ConfigError, DataError, DroppedSample
from pegboard.sample_files import BadRecord, PartSummary, PartWriter

__all__ = ["FirstRecords", "RecordJob", "RecordSchema", "data_files", "load_record_schema"]

_MAX_REASON = 500
"""Characters of a reason that are kept: it may quote a whole record."""


class FirstRecords:
    """The first `limit` records of a dataset, as a dataset."""

    def __init__(self, dataset: Dataset, limit: int) -> None:
        self._dataset = dataset
        self._limit = limit
        self.data_files = data_files(dataset)
        self.record_schema = getattr(dataset, "record_schema", None)

    def __len__(self) -> int:
        return min(len(self._dataset), self._limit)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self._dataset[index]

    def key(self, index: int) -> SampleKey:
        return self._dataset.key(index)

    def fingerprint(self) -> str | None:
        whole = self._dataset.fingerprint()
        return None if whole is None else f"{whole} first {self._limit}"


def data_files(dataset: Dataset) -> tuple[str, ...]:
    """Files that a dataset says its records come from (`data_files`); none if it says nothing."""
    return tuple(getattr(dataset, "data_files", ()))


class RecordJob:
    """Turns spans of a dataset's records into part files; goes to workers by pickle.

    Args:
        dataset: records.
        tokenize_fn: record -> examples.
        schema: what every record must look like; None: anything.
    """

    def __init__(
        self, dataset: Dataset, tokenize_fn: TokenizeFn, schema: RecordSchema | None = None
    ) -> None:
        self.dataset = dataset
        self.tokenize_fn = tokenize_fn
        self.schema = schema
        self._stamps = {file: _stamp(file) for file in data_files(dataset)}

    def write_part(
        self,
        path: Path,
        start: int,
        stop: int,
        tell: Callable[[int, int], None],
        before_commit: Callable[[PartSummary], None],
    ) -> None:
        """Tokenize records `start` to `stop` into the part file `path`.

        Args:
            tell: called before each record with (its number, tokens of the part so far).
            before_commit: called when all is written, before the file gets its name.

        Raises:
            DataError: a file changed since the job was made.
        """
        writer = PartWriter(path)
        summary = writer.summary
        try:
            num_tokens = 0
            files: set[str] = set()
            self.tokenize_fn.take_counts()
            for index in range(start, stop):
                tell(index, num_tokens)
                key = self.dataset.key(index)
                files.add(key.file)
                try:
                    with _NoteKey(key):
                        num_tokens += self._tokenize(index, key, writer)
                except DroppedSample as dropped:
                    summary.dropped[dropped.reason] += 1
                except (DataError, RecursionError) as error:
                    summary.bad.append(BadRecord(key.file, key.line, _reason_of(error, key)))
                    if kind := getattr(error, "reason", None):
                        summary.events[f"bad record: {kind}"] += 1
                summary.num_records += 1
            summary.events.update(self.tokenize_fn.take_counts())
            self._check_unchanged(files)
            before_commit(summary)
            writer.commit()
        finally:
            writer.discard()

    def place(self, start: int, stop: int) -> str:
        """`a.jsonl:1 to b.jsonl:7`, where the records of a span stand."""
        return f"{self.dataset.key(start)} to {self.dataset.key(stop - 1)}"

    def _tokenize(self, index: int, key: SampleKey, writer: PartWriter) -> int:
        record = self.dataset[index]
        if self.schema is not None:
            self.schema.check(record)
        examples = self.tokenize_fn(record)
        if not examples:
            raise DroppedSample("no example")
        rows = []
        for place, example in enumerate(examples):
            part = example.part
            ids = np.asarray(example.input_ids, dtype=np.int32)
            mask = np.asarray(example.loss_mask, dtype=np.bool_)
            if ids.ndim != 1 or ids.shape != mask.shape:
                raise DataError(
                    f"ids of shape {ids.shape} and a mask of {mask.shape}, expected (T,) of both"
                )
            if len(ids) > self.tokenize_fn.max_length:
                raise DataError(
                    f"{len(ids)} tokens, over the tokenize_fn's max_length "
                    f"{self.tokenize_fn.max_length}"
                )
            rows.append(
                (ids, mask, place if part is None else part, example.num_tiles, _details(example))
            )
        num_tokens = 0
        for ids, mask, part, tiles, details in rows:
            if not len(ids):
                writer.summary.dropped["empty"] += 1
                continue
            writer.add(ids, mask, (key.file, key.line, part), tiles, details)
            num_tokens += len(ids)
        return num_tokens

    def _check_unchanged(self, files: set[str]) -> None:
        for file in sorted(files & self._stamps.keys()):
            if _stamp(file) != self._stamps[file]:
                raise DataError(f"{file}: the file changed while it was read; start again")


class RecordSchema:
    """A JSON Schema that records must fit; compiled once in each process.

    Args:
        schema: a JSON Schema; references stay inside it.

    Raises:
        ConfigError: it is not a JSON Schema.
    """

    def __init__(self, schema: Mapping[str, Any], origin: str) -> None:
        import jsonschema

        self.schema = schema
        self._origin = origin
        self._validator: Any = None
        cls = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
        try:
            cls.check_schema(schema)
        except jsonschema.SchemaError as error:
            raise ConfigError(f"{origin}: not a JSON Schema: {_one_problem(error)}") from error

    def check(self, record: Any) -> None:
        """Look at one record.

        Raises:
            DataError: it doesn't fit; the message quotes the field.
            ConfigError: the schema points outside itself, or has a pattern that is none.
        """
        import jsonschema
        import referencing

        if self._validator is None:
            cls = jsonschema.validators.validator_for(self.schema, jsonschema.Draft202012Validator)
            # An empty registry: jsonschema would fetch a reference by http otherwise.
            self._validator = cls(self.schema, registry=referencing.Registry())
        try:
            if self._validator.is_valid(record):
                return
            problem = jsonschema.exceptions.best_match(self._validator.iter_errors(record))
        except referencing.exceptions.Unresolvable as error:
            raise ConfigError(
                f"{self._origin}: reference {error.ref!r} leads out of the schema; write what it "
                'means under "$defs"'
            ) from error
        except re.error as error:
            raise ConfigError(
                f"{self._origin}: {error.pattern!r} is no pattern: {error.msg}"
            ) from error
        raise DataError(_one_problem(problem))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_validator": None}


def load_record_schema(path: str) -> RecordSchema:
    """The JSON Schema in a file; ConfigError if there is none."""
    try:
        schema = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"record_schema: '{path}': {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"record_schema: '{path}': not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise ConfigError(f"record_schema: '{path}': expected an object")
    return RecordSchema(schema, f"record_schema: '{path}'")


class _NoteKey:
    """Tells a programmer's error which record it happened on."""

    def __init__(self, key: SampleKey) -> None:
        self.key = key

    def __enter__(self) -> None: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, DataError):
            error.add_note(f"while tokenizing {self.key}")


def _reason_of(error: Exception, key: SampleKey) -> str:
    """Why a record is bad, in one line of limited length."""
    reason = str(error).removeprefix(f"{key}:").strip()
    if isinstance(error, RecursionError):
        reason = f"nested too deeply to be read ({reason}); flatten the record"
    if len(reason) > _MAX_REASON:
        reason = reason[: _MAX_REASON - 3] + "..."
    return " ".join(reason.split())


def _details(example: Example) -> bytes:
    """JSON text of media and extras; empty without either."""
    found = {"media": dict(example.media), "extras": dict(example.extras)}
    found = {name: value for name, value in found.items() if value}
    if not found:
        return b""
    try:
        text = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"a tokenize function's media and extras must be plain JSON data: {error}"
        ) from error
    return text.encode("utf-8", "surrogatepass")


def _one_problem(error: Any) -> str:
    """`messages[0].role: 'usr' is not one of ['user', 'assistant']`."""
    path = ""
    for step in error.absolute_path:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else str(step)
    message = " ".join(str(error.message).split())
    if len(message) > 200:
        message = f"{message[:100]} ... {message[-90:]}"
    return f"{path}: {message}" if path else message


def _stamp(file: str) -> tuple[int, int] | None:
    try:
        stat = os.stat(file)
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns
