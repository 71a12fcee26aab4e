"""A plugin of pytest: what `pegboard.testing.contract_for` makes is marked, readable and summed up.

pytest loads it by its entry point in every environment that Pegboard is installed in, so it imports
nothing but pytest: tests of other projects pay nothing for it. At the end of a run with contract
tests stands, for each part, how many promises were kept, which were broken, and which could not be
tried and why.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

__all__ = ["pytest_configure", "pytest_runtest_makereport", "pytest_terminal_summary"]

MARK = "contract"
_PROPERTY = "pegboard_contract"
_CHECKS = "pegboard.testing.case"
"""Module of the class of our checks: its name is enough, and imports nothing."""


def pytest_configure(config: pytest.Config) -> None:
    """Name the mark; let failing asserts of the checks show their values."""
    config.addinivalue_line(
        "markers", f"{MARK}: a promise of a Pegboard part, made by pegboard.testing.contract_for"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Say in the report of a contract test which part and promise it is about."""
    report = yield
    mark = item.get_closest_marker(MARK)
    check: Any = getattr(getattr(item, "callspec", None), "params", {}).get("check")
    # Other projects mark their contract tests with this word too, and say other things with it.
    if mark is not None and len(mark.args) == 2 and type(check).__module__ == _CHECKS:
        # A property goes along when tests run in other processes (pytest-xdist).
        named = [*(str(value) for value in mark.args), str(check.name)]
        report.user_properties.append((_PROPERTY, named))
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line for each part under contract, and one for each promise that it didn't keep."""
    parts: dict[tuple[str, str], dict[str, list[str]]] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, ()):
            properties = dict(getattr(report, "user_properties", ()))
            if _PROPERTY not in properties:
                continue
            kind, name, check = properties[_PROPERTY]
            found = parts.setdefault((kind, name), {"kept": [], "broken": [], "not tried": []})
            if outcome == "passed":
                found["kept"].append(check)
            elif outcome == "skipped":
                found["not tried"].append(f"{check}: {_reason(report)}")
            else:
                found["broken"].append(check)
    if parts:
        terminalreporter.section("contracts of parts")
    for (kind, name), found in parts.items():
        counts = ", ".join(f"{len(who)} {what}" for what, who in found.items() if who)
        terminalreporter.line(f"{name} ({kind.replace('_', ' ')}): {counts}")
        for what in ("broken", "not tried"):
            for line in found[what]:
                terminalreporter.line(f"  {what}: {line}")


def _reason(report: Any) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return str(text).removeprefix("Skipped: ")


pytest.register_assert_rewrite("pegboard.testing")
