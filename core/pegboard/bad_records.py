"""What to do about records that can't be used: stop, leave them out, or leave out so many at most."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

from pydantic import Field, model_validator

from pegboard.component import ComponentConfig
from pegboard.errors import DataError

__all__ = ["BadRecordLimit", "BadRecordPolicy", "most_bad_records", "refuse_bad_records"]


class BadRecordLimit(ComponentConfig):
    """Leave bad records out, unless there are too many."""

    count: int | None = Field(default=None, ge=0, description="Most bad records of the dataset.")
    share: float | None = Field(
        default=None, ge=0, le=1, description="Most bad records, as a share of all its records."
    )

    @model_validator(mode="after")
    def _has_a_limit(self) -> BadRecordLimit:
        if self.count is None and self.share is None:
            raise ValueError('write "count" or "share", such as {"share": 0.001}')
        return self


BadRecordPolicy = Literal["error", "skip"] | BadRecordLimit


def most_bad_records(policy: BadRecordPolicy, num_records: int) -> int | None:
    """Bad records that a dataset of `num_records` may have; None: any number."""
    if isinstance(policy, str):
        return 0 if policy == "error" else None
    limits = [] if policy.count is None else [policy.count]
    if policy.share is not None:
        # Of the number as it is written: 0.29 * 100 is 28.999999999999996.
        limits.append(int(Fraction(str(policy.share)) * num_records))
    return min(limits)


def refuse_bad_records(
    policy: BadRecordPolicy, *, name: str, first: str, num_bad: int, num_seen: int, total: int
) -> None:
    """DataError if the policy does not allow `num_bad`; it starts with the first one's place.

    Args:
        name: of the dataset.
        first: the first bad record, `file:line: reason`.
        num_seen: records looked at so far, of `total`.
    """
    most = most_bad_records(policy, total)
    if most is None or num_bad <= most:
        return
    if policy == "error":
        raise DataError(first)
    raise DataError(
        f"{first} (dataset {name!r}: {num_bad:,} bad records among {num_seen:,} of {total:,}, "
        f"more than the {most:,} that on_bad_record allows)"
    )
