"""What a run's data comes to, as a table: from records to the tokens that are trained.

What is trained is counted, not estimated: an epoch's samples, tokens and supervised tokens are what
its packs hold, and every record of a dataset is a sample, dropped for a reason, or bad. A tokenize
function may estimate what it would have given under another config; such numbers are marked with ~.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pegboard.data_loading import DataSource, EpochPlan
    from pegboard.stored_samples import TokenStore

__all__ = ["Count", "describe_plan", "describe_store", "read_counts"]

_SHOWN_BAD_RECORDS = 20


class Count(NamedTuple):
    """How often something happened, or how much of it there is."""

    number: int
    is_estimate: bool = False

    def __str__(self) -> str:
        """`1,234`; an estimate in three digits, `~1,230`."""
        if not self.is_estimate:
            return f"{self.number:,}"
        return f"~{float(f'{self.number:.3g}'):,.0f}"


def read_counts(events: Mapping[str, int]) -> dict[str, Count]:
    """A tokenize function's counts by name, what it estimated of each (`~name`) added."""
    counts: dict[str, Count] = {}
    for event, number in events.items():
        name = event.removeprefix("~")
        known = counts.get(name, Count(0))
        is_estimate = known.is_estimate or name != event
        counts[name] = Count(known.number + number, is_estimate)
    return counts


def describe_plan(
    sources: Sequence[DataSource], plan: EpochPlan, *, global_batch_size: int
) -> list[str]:
    """Lines of a table: what each source gives to an epoch, and how well packs are filled."""
    rows: list[tuple[str, ...]] = [
        (
            "source",
            "records",
            "samples",
            "tokens",
            "supervised",
            "share",
            "dropped",
            "bad",
            "truncated",
        )
    ]
    sums = [0, 0, 0, 0, 0, 0, 0]
    for source, counts in zip(sources, plan.counts, strict=True):
        meta = source.store.meta
        numbers = [
            meta["num_records"],
            counts.samples,
            counts.tokens,
            counts.targets,
            sum(meta["dropped"].values()),
            meta["num_bad"],
            _num_truncated(meta["events"]),
        ]
        sums = [total + number for total, number in zip(sums, numbers, strict=True)]
        rows.append(_row(source.name, numbers, plan.num_tokens))
    if len(sources) > 1:
        rows.append(_row("all", sums, plan.num_tokens))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    steps = -(-plan.num_packs // global_batch_size)
    lines.append(
        f"an epoch: {plan.num_packs:,} packs of {plan.pack_max_length:,} tokens, "
        f"{100 * plan.fill:.2f}% full, {steps:,} steps of {global_batch_size:,} packs"
    )
    return lines


def describe_store(store: TokenStore) -> list[str]:
    """Lines: what there is, what was dropped and why, what was counted, and the bad records."""
    meta = store.meta
    lines = [
        f"{store.name}: {meta['num_records']:,} records: {meta['num_samples']:,} samples of "
        f"{meta['num_tokens']:,} tokens, {meta['num_supervised']:,} supervised"
    ]
    for what, events in (("dropped", meta["dropped"]), ("counted", meta["events"])):
        counts = read_counts(events)
        alone = {name: count for name, count in counts.items() if ": " not in name}
        if alone:
            reasons = ", ".join(f"{reason} {count}" for reason, count in alone.items())
            lines.append(f"{store.name}: {what}: {reasons}")
        lines += [f"{store.name}: {line}" for line in _tabulate(counts)]
    if meta["num_bad"]:
        lines.append(f"{store.name}: {meta['num_bad']:,} bad records, left out:")
        shown = list(islice(store.bad_records(), _SHOWN_BAD_RECORDS))
        lines += [f"  {record}" for record in shown]
        if meta["num_bad"] > len(shown):
            path = store.folder / "bad_records.jsonl"
            lines.append(f"  and {meta['num_bad'] - len(shown):,} more, all in {path}")
    return lines


def _num_truncated(events: dict[str, int]) -> int:
    """Samples that were cut: counts whose name says so."""
    return sum(count for name, count in events.items() if name.startswith("truncated"))


def _row(name: str, numbers: Sequence[int], all_tokens: int) -> tuple[str, ...]:
    records, samples, tokens, targets, dropped, bad, truncated = numbers
    share = 100 * tokens / all_tokens if all_tokens else 0.0
    supervised = 100 * targets / tokens if tokens else 0.0
    return (
        name,
        f"{records:,}",
        f"{samples:,}",
        f"{tokens:,}",
        f"{targets:,} ({supervised:.1f}%)",
        f"{share:.1f}%",
        f"{dropped:,}",
        f"{bad:,}",
        f"{truncated:,}",
    )


def _tabulate(counts: Mapping[str, Count]) -> list[str]:
    """One line for each group of counts that are named `group: what`, the largest first in it."""
    groups: dict[str, list[tuple[Count, str]]] = {}
    for name, count in counts.items():
        group, separator, what = name.partition(": ")
        if separator:
            groups.setdefault(group, []).append((count, what))
    width = max(map(len, groups), default=0)
    return [
        f"{group:<{width}}  "
        + ", ".join(f"{count} {what}" for count, what in sorted(groups[group], reverse=True))
        for group in sorted(groups)
    ]
