"""Freeze refuses, before anything is loaded, to freeze nothing."""

from __future__ import annotations

from typing import Any

import pytest

from pegboard_plugins.freezing.component import Freeze


@pytest.mark.parametrize(
    "fields, problems", [({}, 1), ({"groups": ("vision",)}, 0), ({"prefixes": ("model.",)}, 0)]
)
def test_a_freeze_that_names_nothing_is_a_slip(fields: dict[str, Any], problems: int) -> None:
    run: Any = None
    found = list(Freeze(Freeze.Config(**fields)).check(run, ("transforms", 0)))
    assert len(found) == problems
    assert all("names nothing" in problem.message for problem in found)
