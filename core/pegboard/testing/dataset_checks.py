"""What a dataset promises: records by index, each with its place, the same in every process.

Options: `bad_config`, JSON fields of a dataset in which reading some record fails, or a function of a
fresh folder that gives them; `change`, called to change the data of `config`, after which the
fingerprint must differ: with the folder where `config` is a function, else with nothing.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pegboard.contracts import Dataset, SampleKey
from pegboard.errors import DataError
from pegboard.testing.case import Case, Check

__all__ = ["CHECKS", "OPTIONS"]

OPTIONS = frozenset({"bad_config", "change"})

_READ = """
import pickle, sys
for path in {paths!r}:
    sys.path.insert(0, path)
with open({file!r}, "rb") as stream:
    dataset, index = pickle.load(stream)
print(repr(dict(dataset[index])))
"""


def _has_records(case: Case) -> None:
    dataset = case.make().build("data")
    assert len(dataset) > 0, "the dataset of this config is empty; give one with records"
    assert isinstance(dataset[0], Mapping), f"a record is {type(dataset[0]).__name__}, no mapping"


def _any_order_gives_the_same_records(case: Case) -> None:
    dataset = case.make().build("data")
    forward = [dict(dataset[i]) for i in range(len(dataset))]
    backward = [dict(dataset[i]) for i in reversed(range(len(dataset)))][::-1]
    assert forward == backward, "records differ when they are read backwards"
    again = case.make().build("data")
    assert len(again) == len(dataset), "a second dataset of the config has another length"
    assert [dict(again[i]) for i in range(len(again))] == forward, (
        "a second dataset of the config has other records or another order"
    )


def _an_index_outside_is_an_error(case: Case) -> None:
    dataset = case.make().build("data")
    try:
        dataset[len(dataset)]
    except IndexError:
        return
    except DataError as error:
        raise AssertionError(f"index {len(dataset)} of as many records: {error}") from error
    raise AssertionError(f"index {len(dataset)} of {len(dataset)} records gave one: no IndexError")


def _keys_say_where(case: Case) -> None:
    dataset = case.make().build("some name")
    keys = [dataset.key(i) for i in range(len(dataset))]
    for key in keys:
        assert isinstance(key, SampleKey), f"key() gives {type(key).__name__}, not SampleKey"
        assert key.source == "some name", f"key().source is {key.source!r}, not the dataset's name"
        assert key.file, "key().file is empty: no message could say where a record is"
        assert key.line >= 1, f"key().line is {key.line}; lines count from 1"
    assert len(set(keys)) == len(keys), "two records have one key"


def _pickles_into_a_new_process(case: Case) -> None:
    dataset = case.make().build("data")
    dataset[0]  # what was opened by reading must not come along
    index = len(dataset) - 1
    file = case.folder / "dataset.pickle"
    with file.open("wb") as stream:
        pickle.dump((dataset, index), stream)
    code = _READ.format(paths=[path for path in sys.path if path], file=str(file))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"a new process can't use the pickled dataset:\n{done.stderr}"
    assert done.stdout.strip() == repr(dict(dataset[index])), "it reads another record there"


def _goes_on_from_any_index(case: Case) -> None:
    """A run that is resumed, and a worker, begin in the middle."""
    dataset = case.make().build("data")
    whole = [dict(dataset[i]) for i in range(len(dataset))]
    for start in {len(whole) // 2, len(whole) - 1}:
        fresh = case.make().build("data")
        rest = [dict(fresh[i]) for i in range(start, len(whole))]
        assert rest == whole[start:], f"a fresh dataset has other records from index {start} on"


def _data_files_are_there(case: Case) -> None:
    import pytest

    dataset = case.make().build("data")
    files = getattr(dataset, "data_files", None)
    if files is None:
        pytest.skip("no `data_files`")
    gone = [str(file) for file in files if not Path(file).is_file()]
    assert not gone, f"data_files names what is no file: {', '.join(gone[:3])}"


def _fingerprint_is_stable(case: Case) -> None:
    one, two = (case.make().build("data").fingerprint() for _ in range(2))
    assert one is None or isinstance(one, str), f"fingerprint() is {type(one).__name__}"
    assert one == two, "two datasets of the config have two fingerprints: nothing is ever cached"


def _fingerprint_changes_with_the_data(case: Case) -> None:
    import pytest

    if "change" not in case.options:
        pytest.skip("no option `change`")
    before = case.make().build("data").fingerprint()
    change = case.options["change"]
    change() if case.data_folder is None else change(case.data_folder)
    after = case.make().build("data").fingerprint()
    assert before is None or before != after, "the data changed and the fingerprint didn't"


def _a_bad_record_is_named(case: Case) -> None:
    import pytest

    if "bad_config" not in case.options:
        pytest.skip("no option `bad_config`")
    bad = case.options["bad_config"]
    part = case.make_from(bad(case.folder) if callable(bad) else bad)
    found = []
    try:
        dataset = part.build("data")
        for index in range(len(dataset)):
            try:
                dataset[index]
            except DataError as error:
                found.append(str(error))
                place = str(dataset.key(index))
                assert str(error).startswith(place), f"{error} does not start with {place}"
    except DataError as error:  # all of it can't be read
        found.append(str(error))
    assert found, "no record of `bad_config` raised DataError"


def _a_bad_record_is_bad_alone(case: Case) -> None:
    import pytest

    if "bad_config" not in case.options:
        pytest.skip("no option `bad_config`")
    bad = case.options["bad_config"]
    part = case.make_from(bad(case.folder) if callable(bad) else bad)
    try:
        dataset = part.build("data")
    except DataError:
        pytest.skip("with `bad_config` the whole dataset can't be opened")
    first, again = ([_fate(dataset, i) for i in range(len(dataset))] for _ in range(2))
    assert first == again, "a record that was bad is another one when it is read again"
    assert any(isinstance(fate, dict) for fate in first), "no record can be read beside the bad one"


def _fate(dataset: Dataset, index: int) -> dict[str, Any] | str:
    try:
        return dict(dataset[index])
    except DataError as error:
        return str(error)


CHECKS = (
    Check("has_records", _has_records),
    Check("any_order_gives_the_same_records", _any_order_gives_the_same_records),
    Check("an_index_outside_is_an_error", _an_index_outside_is_an_error),
    Check("keys_say_where", _keys_say_where),
    Check("pickles_into_a_new_process", _pickles_into_a_new_process),
    Check("goes_on_from_any_index", _goes_on_from_any_index),
    Check("data_files_are_there", _data_files_are_there),
    Check("fingerprint_is_stable", _fingerprint_is_stable),
    Check("fingerprint_changes_with_the_data", _fingerprint_changes_with_the_data),
    Check("a_bad_record_is_named", _a_bad_record_is_named),
    Check("a_bad_record_is_bad_alone", _a_bad_record_is_bad_alone),
)
