"""`--fail-if`: a measure, a comparison and a limit, such as `supervised<1%`.

A limit with `%` is compared with a share, one without it with a count. Every place that has the
measure is looked at (each source, the step), so that a source without loss does not hide in a mean.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pegboard import ConfigError

__all__ = ["MEASURES", "Condition", "Measure", "broken_conditions", "parse_condition"]

MEASURES = {
    "supervised": "tokens that get loss, of each source's tokens in the epoch",
    "dropped": "records that gave no sample, of each source's records (bad ones included)",
    "bad": "records that could not be read, of each source's records",
    "truncated": "samples cut at max_length, of each source's samples",
    "padding": "padding tokens, of the tokens in the step's rows",
    "fill": "tokens, of the room in the epoch's packs",
    "mismatch": "assistant turns that train after another prompt than at inference, of those shown",
}
"""What can be compared, and of what a share is."""

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True)
class Measure:
    """A count and what it is a part of, at one place."""

    name: str
    """One of MEASURES."""
    place: str
    """Such as `source 'a'` or `step 3`."""
    count: int
    total: int
    unit: str
    """What `total` counts, such as `tokens`."""

    @property
    def share(self) -> float:
        """In [0, 1]; 0 of nothing."""
        return self.count / self.total if self.total else 0.0


@dataclass(frozen=True)
class Condition:
    """A parsed `--fail-if`."""

    text: str
    measure: str
    comparison: str
    limit: float
    """A share in [0, 1], or a count."""
    is_share: bool

    def holds(self, measure: Measure) -> bool:
        """Whether it holds at this measure's place; nothing holds of a part of nothing."""
        if self.is_share and not measure.total:
            return False
        found = measure.share if self.is_share else float(measure.count)
        return _COMPARISONS[self.comparison](found, self.limit)


def parse_condition(text: str) -> Condition:
    """`supervised<1%` -> Condition.

    Raises:
        ConfigError: one line that says what is wrong with it.
    """
    match = re.fullmatch(r"\s*([a-z]+)\s*(<=|>=|<|>)\s*([0-9]*\.?[0-9]+)\s*(%?)\s*", text)
    where = f"--fail-if {text!r}"
    if match is None:
        raise ConfigError(
            f"{where}: expected a measure, one of < <= > >=, and a share or a count, such as "
            "'supervised<1%' or 'dropped>0'"
        )
    measure, comparison, number, percent = match.groups()
    if measure not in MEASURES:
        raise ConfigError(f"{where}: no measure '{measure}'; there are {', '.join(MEASURES)}")
    limit = float(number)
    if percent:
        if limit > 100:
            raise ConfigError(f"{where}: a share is at most 100%")
        return Condition(text.strip(), measure, comparison, limit / 100, True)
    if "." in number:
        raise ConfigError(
            f"{where}: {number} is neither a share nor a count; write {100 * limit:g}% for the share"
        )
    return Condition(text.strip(), measure, comparison, limit, False)


def broken_conditions(conditions: Sequence[Condition], measures: Sequence[Measure]) -> list[str]:
    """One line for each condition that holds, with the places where it does."""
    lines = []
    for condition in conditions:
        found = [m for m in measures if m.name == condition.measure and condition.holds(m)]
        if found:
            places = "; ".join(
                f"{m.place} has {m.share:.2%} ({m.count:,} of {m.total:,} {m.unit})" for m in found
            )
            lines.append(f"{condition.text}: {places}")
    return lines
