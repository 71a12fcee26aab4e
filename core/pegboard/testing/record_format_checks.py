"""What a record format promises: it knows its records, reads them whole and refuses broken ones.

Options: `records`, records of this form (needed); `foreign`, records of other forms; `broken`,
records of this form that are wrong.
"""

from __future__ import annotations

import pickle
from typing import Any

from pegboard.contracts import RecordChat, RecordText, RecordTokens
from pegboard.errors import DataError
from pegboard.testing.case import Case, Check

__all__ = ["CHECKS", "OPTIONS"]

OPTIONS = frozenset({"broken", "foreign", "records"})

_NOTHING: tuple[Any, ...] = ({}, [], "text", 3, None, {"no": "such keys"})


def _knows_its_records(case: Case) -> None:
    form = case.make().build()
    assert case.options.get("records"), "give the option `records`: records of this form"
    for record in case.options["records"]:
        assert form.accepts(record) is True, f"{record!r} is not accepted"


def _accepts_nothing_else(case: Case) -> None:
    form = case.make().build()
    for record in (*_NOTHING, *case.options.get("foreign", ())):
        assert form.accepts(record) is False, f"{record!r} is accepted"


def _reads_what_it_accepts(case: Case) -> None:
    form = case.make().build()
    for record in case.options["records"]:
        content = form.read(record)
        kinds = (RecordChat, RecordText, RecordTokens)
        assert isinstance(content, kinds), f"read() gives {type(content).__name__}"
        if isinstance(content, RecordChat):
            assert content.messages, f"{record!r} gives no message"
        elif isinstance(content, RecordText):
            assert any(loss for _, loss in content.pieces), f"{record!r} gives no text with loss"


def _broken_records_are_data_errors(case: Case) -> None:
    form = case.make().build()
    for record in case.options.get("broken", ()):
        try:
            form.read(record)
        except DataError:
            continue
        except Exception as error:  # noqa: BLE001 (that it may be anything is what is tested)
            raise AssertionError(f"{record!r} raised {error!r}, expected DataError") from error
        raise AssertionError(f"{record!r} was read, expected DataError")


def _records_are_left_alone(case: Case) -> None:
    form = case.make().build()
    for record in case.options["records"]:
        before = repr(record)
        form.accepts(record)
        form.read(record)
        assert repr(record) == before, f"the record became {record!r}"


def _pickles(case: Case) -> None:
    copy = pickle.loads(pickle.dumps(case.make().build()))
    assert copy.accepts(case.options["records"][0]), "the pickled one knows its records no more"


CHECKS = (
    Check("knows_its_records", _knows_its_records),
    Check("accepts_nothing_else", _accepts_nothing_else),
    Check("reads_what_it_accepts", _reads_what_it_accepts),
    Check("broken_records_are_data_errors", _broken_records_are_data_errors),
    Check("records_are_left_alone", _records_are_left_alone),
    Check("pickles", _pickles),
)
