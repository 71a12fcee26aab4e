"""A `--fail-if` compares a share with a share and a count with a count, at every place there is."""

from __future__ import annotations

import pytest

from pegboard import ConfigError
from pegboard_plugins.preview.conditions import Measure, broken_conditions, parse_condition

MEASURES = (
    Measure("supervised", "source 'a'", 500, 1000, "tokens"),
    Measure("supervised", "source 'b'", 3, 1000, "tokens"),
    Measure("dropped", "source 'a'", 0, 10, "records"),
    Measure("dropped", "source 'b'", 2, 10, "records"),
    Measure("mismatch", "the packs shown of step 1", 0, 0, "turns"),
)


def broken(text: str) -> list[str]:
    return broken_conditions([parse_condition(text)], MEASURES)


def test_a_source_without_loss_does_not_hide_in_the_mean() -> None:
    assert broken("supervised<1%") == [
        "supervised<1%: source 'b' has 0.30% (3 of 1,000 tokens)",
    ]


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("supervised < 0.3%", False),
        ("supervised<=0.3%", True),
        ("supervised<4", True),
        ("supervised<3", False),
        ("dropped>0", True),
        ("dropped>20%", False),
        ("dropped>=20%", True),
        ("dropped>19.9%", True),
        ("mismatch>=0%", False),  # of no turns at all
    ],
)
def test_shares_and_counts_are_told_apart_by_the_percent_sign(text: str, holds: bool) -> None:
    assert bool(broken(text)) is holds


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("supervised<0.01", "write 1% for the share"),
        ("supervized<1%", "no measure 'supervized'; there are supervised"),
        ("supervised=1%", "expected a measure, one of"),
        ("padding>101%", "at most 100%"),
        ("", "expected a measure"),
    ],
)
def test_a_condition_that_could_never_be_meant_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"--fail-if.*{said}"):
        parse_condition(text)
