"""What a tokenize function promises: whole examples, errors that are DataError, a faithful fingerprint.

Options: `records`, records it reads (a chat of two turns by default); `broken`, records it must
refuse; `tokenizer` (built), `model` (a component); `other_values`, field -> another JSON value, for
fields whose change can't be guessed; `segments(record, tokenizer)`, the (text, whether it gets loss)
pairs of each example, such as what the chat template renders, or None to say nothing of a record.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args, get_origin

import numpy as np
from pydantic import ValidationError

from pegboard.contracts import Example
from pegboard.errors import DataError, DroppedSample, PegboardError
from pegboard.testing.case import Case, Check

__all__ = ["CHECKS", "OPTIONS"]

OPTIONS = frozenset({"broken", "model", "other_values", "records", "segments", "tokenizer"})

_CHAT = {
    "messages": [
        {"role": "user", "content": "What is two and two?"},
        {"role": "assistant", "content": "Four."},
    ]
}
_BROKEN: tuple[Any, ...] = (
    {},
    {"messages": 3},
    {"messages": []},
    {"messages": [{"role": "user"}]},
    {"messages": [None]},
    {"text": 3},
    {"messages": [{"role": "nobody", "content": "a"}]},
)


def _built(case: Case, **changes: Any) -> Any:
    return case.make(**changes).build(case.tokenizer(), case.model())


def _records(case: Case) -> Sequence[Any]:
    records: Sequence[Any] = case.options.get("records", (_CHAT,))
    return records


def _examples(case: Case, **changes: Any) -> list[Example]:
    tokenize = _built(case, **changes)
    return [example for record in _records(case) for example in tokenize(record)]


def _gives_whole_examples(case: Case) -> None:
    vocab_size, examples = case.tokenizer().vocab_size, _examples(case)
    assert examples, "no record gave an example; give the option `records`"
    for example in examples:
        ids, mask = example.input_ids, example.loss_mask
        assert ids.dtype == np.int32, f"input_ids are {ids.dtype}, not int32"
        assert mask.dtype == np.bool_, f"loss_mask is {mask.dtype}, not bool"
        assert ids.ndim == 1 and ids.shape == mask.shape, f"shapes {ids.shape} and {mask.shape}"
        assert len(ids), "an example of no tokens"
        assert 0 <= ids.min() and ids.max() < vocab_size, "an id is not in the vocabulary"
        assert mask.any(), "an example without loss; raise DroppedSample instead"
        assert not mask[0], "the first token has loss, but nothing predicts it"


def _wanted(case: Case) -> Iterator[tuple[Example, list[tuple[str, bool]]]]:
    import pytest

    if "segments" not in case.options:
        pytest.skip("no option `segments`")
    tokenize, tokenizer = _built(case), case.tokenizer()
    for record in _records(case):
        wanted = case.options["segments"](record, tokenizer)
        if wanted is None:
            continue
        examples = list(tokenize(record))
        assert len(examples) == len(wanted), (
            f"{len(examples)} examples of a record, `segments` says {len(wanted)}"
        )
        yield from zip(examples, wanted, strict=True)


def _ids_spell_the_text(case: Case) -> None:
    for example, segments in _wanted(case):
        found, text = case.tokenizer().decode(example.input_ids), "".join(t for t, _ in segments)
        assert found == text, f"the ids spell {found!r}, expected {text!r}"


def _loss_lies_where_it_should(case: Case) -> None:
    for example, segments in _wanted(case):
        ids, mask = example.input_ids, example.loss_mask
        if case.tokenizer().decode(ids) != "".join(text for text, _ in segments):
            continue  # another check says so
        edges = np.flatnonzero(np.diff(mask)) + 1
        parts = zip(np.split(ids, edges), np.split(mask, edges), strict=True)
        found = [(case.tokenizer().decode(part), bool(own[0])) for part, own in parts]
        wanted: list[tuple[str, bool]] = []
        for text, trained in segments:
            if wanted and wanted[-1][1] == trained:
                text = wanted.pop()[0] + text
            wanted.append((text, trained))
        assert found == wanted, f"(text, loss) is {found}, expected {wanted}"


def _keeps_to_max_length(case: Case) -> None:
    limit = max(4, max(len(example.input_ids) for example in _examples(case)) // 2)
    tokenize = _built(case, max_length=limit)
    assert tokenize.max_length == limit, f"max_length is {tokenize.max_length}, not {limit}"
    for record in _records(case):
        try:
            for example in tokenize(record):
                found = len(example.input_ids)
                assert found <= limit, f"an example has {found} tokens, over max_length {limit}"
                assert example.loss_mask.any(), "cut so that no loss is left; drop it instead"
        except DroppedSample:
            continue


def _same_record_same_example(case: Case) -> None:
    tokenize = _built(case)
    for record in _records(case):
        before = json.dumps(record, default=str)
        one, two = list(tokenize(record)), list(tokenize(record))
        assert json.dumps(record, default=str) == before, "the record was changed"
        for a, b in zip(one, two, strict=True):
            assert np.array_equal(a.input_ids, b.input_ids), "ids differ the second time"
            assert np.array_equal(a.loss_mask, b.loss_mask), "the mask differs the second time"


def _broken_records_are_data_errors(case: Case) -> None:
    tokenize = _built(case)
    for record in case.options.get("broken", _BROKEN):
        try:
            tokenize(record)
        except PegboardError as error:
            assert isinstance(error, (DataError, DroppedSample)), f"{record!r}: {error!r}"
            assert str(error).strip(), f"{record!r}: an error without a word"
            continue
        except Exception as error:  # noqa: BLE001 (that it may be anything is what is tested)
            raise AssertionError(f"{record!r} raised {error!r}, expected DataError") from error
        raise AssertionError(f"{record!r} was taken, expected DataError")


def _pickles(case: Case) -> None:
    tokenize = _built(case)
    record = _records(case)[0]
    copy = pickle.loads(pickle.dumps(tokenize))
    for a, b in zip(tokenize(record), copy(record), strict=True):
        assert np.array_equal(a.input_ids, b.input_ids), "the pickled one gives other ids"
    assert copy.fingerprint() == tokenize.fingerprint(), "the pickled one has another fingerprint"


def _counts_are_taken_once(case: Case) -> None:
    tokenize = _built(case)
    for record in _records(case):
        tokenize(record)
    counts = tokenize.take_counts()
    assert all(isinstance(n, int) and n >= 0 for n in counts.values()), f"counts are {counts}"
    left = {name: n for name, n in tokenize.take_counts().items() if n}
    assert not left, f"counts are still {left} after they were taken"


def _fingerprint_changes_with_every_field(case: Case) -> None:
    first = _built(case).fingerprint()
    assert first == _built(case).fingerprint(), "two of one config have two fingerprints"
    silent = []
    for name, value in _other_values(case):
        try:
            other = _built(case, **{name: value})
        except (ValidationError, PegboardError):
            continue
        if other.fingerprint() == first:
            silent.append(name)
    assert not silent, (
        f"the fingerprint is the same with another {', '.join(silent)}: a stale cache would be used"
    )


class _AnotherTokenizer:
    """The same ids under another fingerprint, as a new version of a tokenizer may have them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def fingerprint(self) -> str:
        return "another tokenizer"


def _fingerprint_changes_with_the_tokenizer(case: Case) -> None:
    first = _built(case).fingerprint()
    other = case.make().build(_AnotherTokenizer(case.tokenizer()), case.model()).fingerprint()
    assert other != first, "the fingerprint is the same with another tokenizer: stale ids are used"


def _other_values(case: Case) -> Iterator[tuple[str, Any]]:
    """A changed JSON value for each field, as far as one can be guessed."""
    given = case.options.get("other_values", {})
    fields = json.loads(case.make().config.model_dump_json())
    annotations = {n: f.annotation for n, f in type(case.make().config).model_fields.items()}
    for name, value in fields.items():
        annotation = annotations.get(name)  # None: of a config_schema
        choices = get_args(annotation) if get_origin(annotation) is Literal else ()
        if name in given:
            yield name, given[name]
        elif choices:
            yield from ((name, choice) for choice in choices if choice != value)
        elif isinstance(value, bool):
            yield name, not value
        elif isinstance(value, int):
            yield name, value + 1
        elif isinstance(value, float):
            yield name, value / 2 + 0.125


CHECKS = (
    Check("gives_whole_examples", _gives_whole_examples),
    Check("ids_spell_the_text", _ids_spell_the_text),
    Check("loss_lies_where_it_should", _loss_lies_where_it_should),
    Check("keeps_to_max_length", _keeps_to_max_length),
    Check("same_record_same_example", _same_record_same_example),
    Check("broken_records_are_data_errors", _broken_records_are_data_errors),
    Check("pickles", _pickles),
    Check("counts_are_taken_once", _counts_are_taken_once),
    Check("fingerprint_changes_with_every_field", _fingerprint_changes_with_every_field),
    Check("fingerprint_changes_with_the_tokenizer", _fingerprint_changes_with_the_tokenizer),
)
