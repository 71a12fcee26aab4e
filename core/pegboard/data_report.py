"""What became of a dataset's records, in words: every one is a sample, dropped for a reason, or bad."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pegboard.stored_samples import TokenStore

__all__ = ["describe_store"]

_SHOWN_BAD_RECORDS = 20


def describe_store(store: TokenStore) -> list[str]:
    """Lines: what there is, what was dropped and why, what was counted, and the bad records."""
    meta = store.meta
    lines = [
        f"{store.name}: {meta['num_records']:,} records: {meta['num_samples']:,} samples of "
        f"{meta['num_tokens']:,} tokens, {meta['num_supervised']:,} supervised"
    ]
    for what, counts in (("dropped", meta["dropped"]), ("counted", meta["events"])):
        if counts:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in counts.items())
            lines.append(f"{store.name}: {what}: {reasons}")
    if meta["num_bad"]:
        lines.append(f"{store.name}: {meta['num_bad']:,} bad records, left out:")
        shown = list(islice(store.bad_records(), _SHOWN_BAD_RECORDS))
        lines += [f"  {record}" for record in shown]
        if meta["num_bad"] > len(shown):
            path = store.folder / "bad_records.jsonl"
            lines.append(f"  and {meta['num_bad'] - len(shown):,} more, all in {path}")
    return lines
