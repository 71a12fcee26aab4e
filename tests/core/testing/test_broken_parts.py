"""The claim: each fault is found by the check that it is planted for, and by no other than those its row names; the
same part without the fault passes every check of its kind; the table in the documentation is these rows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from broken_parts import (
    PAGE,
    Broken,
    broken_parts,
    is_of_any_kind,
    page_with_table,
    sound_parts,
)
from broken_texts import WithoutFields, Words, schema_tokenize_fn, texts

from pegboard.registry import HOOKS
from pegboard.testing import Case, Check, checks_for, contract_for
from pegboard.testing.part_checks import CHECKS as EVERY_PART
from pegboard_plugins.blocks.feed_forward import GatedFeedForward

ROWS = broken_parts()
SOUND = sound_parts()
ON_RANKS = frozenset({"two_ranks_are_one", "a_rank_of_text_alone_is_no_trouble"})
DEAR = {"command", "dataset", "model", "saver", "tokenize_fn", "tokenizer", "transform"}
"""Kinds whose checks cost enough that all of them on every broken part are a slow test."""


def _name(row: Broken) -> str:
    return f"{row.kind}-{row.check}-{row.fault.replace(' ', '_')}"


def _rows(slow: frozenset[str]) -> list[Any]:
    return [
        pytest.param(row, id=_name(row), marks=[pytest.mark.slow] if row.check in slow else [])
        for row in ROWS
    ]


@pytest.fixture(autouse=True)
def _no_class_stays_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    place = "pegboard_plugins.qwen3.modeling.GatedFeedForward"
    monkeypatch.setattr(place, GatedFeedForward)


def fails(check: Check, row: Any, folder: Path) -> BaseException | None:
    """What a check has to say against a part; None if nothing, or if it can't be tried."""
    given = row.options if row.options is not None else SOUND[row.kind].options
    options = copy.deepcopy(given)  # a part that changes its records must not spoil the next check
    work, data = folder / check.name / "work", folder / check.name / "data"
    work.mkdir(parents=True)
    data.mkdir()
    if callable(row.config):
        case = Case(row.component, row.config(data), work, options, data)
    else:
        case = Case(row.component, row.config, work, options)
    try:
        check.run(case)
    except pytest.skip.Exception:
        return None
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("row", _rows(ON_RANKS))
def test_a_fault_is_found_by_its_check(row: Broken, tmp_path: Path) -> None:
    check = next(check for check in checks_for(row.kind) if check.name == row.check)
    error = fails(check, row, tmp_path)
    assert error is not None, f"{row.check} finds nothing"
    assert str(error).strip(), "found without a word"
    if row.kind not in DEAR:
        assert_no_other_check_finds_it(row, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("row", [r for r in ROWS if r.kind in DEAR], ids=_name)
def test_a_fault_of_a_dear_kind_is_found_by_no_other_check(row: Broken, tmp_path: Path) -> None:
    assert_no_other_check_finds_it(row, tmp_path)


def assert_no_other_check_finds_it(row: Broken, folder: Path) -> None:
    """But for those that the row names. A part that is none of its kind keeps none of its promises."""
    checks = EVERY_PART if is_of_any_kind(row) else checks_for(row.kind)
    found = {
        check.name: error
        for check in checks
        if check.name not in (row.check, *ON_RANKS)
        and (error := fails(check, row, folder)) is not None
    }
    told = {name: str(error)[:300] for name, error in found.items()}
    assert found.keys() == row.also - ON_RANKS, told


@pytest.mark.parametrize("kind", sorted(HOOKS))
def test_the_part_without_a_fault_passes_every_check(kind: str, tmp_path: Path) -> None:
    part = SOUND[kind]
    row = Broken("is sound", "", part.component, part.config, part.options)
    for check in checks_for(kind):
        if check.name not in ON_RANKS:
            assert (error := fails(check, row, tmp_path)) is None, f"{check.name}: {error!r}"


def test_a_tokenize_function_with_a_schema_is_checked_as_any_other(tmp_path: Path) -> None:
    sound = Broken("is sound", "", schema_tokenize_fn(Words), {}, texts())
    for check in checks_for("tokenize_fn"):
        assert (error := fails(check, sound, tmp_path)) is None, f"{check.name}: {error!r}"
    check = next(c for c in checks_for("tokenize_fn") if c.name.startswith("fingerprint_changes_w"))
    broken = Broken("", check.name, schema_tokenize_fn(WithoutFields), {}, texts())
    assert "the same with another prompt" in str(fails(check, broken, tmp_path / "broken"))


def test_every_check_has_a_fault_that_it_finds() -> None:
    planted = {(row.kind, row.check) for row in ROWS}
    everywhere = {row.check for row in ROWS if is_of_any_kind(row)}
    assert everywhere == {check.name for check in EVERY_PART}
    missing = [
        f"{kind}: {check.name}"
        for kind in HOOKS
        for check in checks_for(kind)
        if (kind, check.name) not in planted and check not in EVERY_PART
    ]
    # Only a model with pictures can fail it; the whole of it is tried on the built-in ones.
    assert missing == ["model: a_rank_of_text_alone_is_no_trouble"]


def test_the_table_of_the_documentation_is_these_rows() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == page_with_table(page), "run: python tests/core/testing/broken_parts.py"


def test_a_check_that_does_not_exist_cannot_be_skipped() -> None:
    with pytest.raises(ValueError, match="no check named tidy; there are is_a_part"):
        contract_for(SOUND["dataset"].component, skip={"tidy": "because"})


def test_an_option_that_no_check_reads_is_an_error() -> None:
    with pytest.raises(ValueError, match="of a dataset take no option record; there are bad_con"):
        contract_for(SOUND["dataset"].component, record=[{"text": "a"}])
    with pytest.raises(ValueError, match="of a lr_schedule take no option seed; there are none"):
        contract_for(SOUND["lr_schedule"].component, seed=1)
