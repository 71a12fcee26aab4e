"""The parts of a token store: spans of records that anybody may make, and how far they are.

Records are cut into parts by their number alone. Workers, ranks and other jobs claim parts in the
store's draft folder and commit each by rename; what a killed build has finished stays there.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pegboard.bad_records import BadRecordPolicy, most_bad_records, refuse_bad_records
from pegboard.file_claims import Claims, describe_owner
from pegboard.record_tokenizing import RecordJob
from pegboard.sample_files import PartSummary, read_summary

__all__ = ["BuildProgress", "PartsOfStore", "make_parts"]

_SMALLEST_PART, _LARGEST_PART = 32, 8192
_PARTS = 512
"""About how many parts a large dataset is cut into."""
_POLL_S = 0.05
_LONGEST_POLL_S = 0.5
_LIST_S = 0.5
"""Seconds for which a listing of the draft folder is good enough."""


class BuildProgress(NamedTuple):
    """How far a build is."""

    num_records: int
    """Records done, by whomever."""
    total_records: int
    num_tokens: int
    """Tokens made by this process and its workers."""
    waiting_for: str = ""
    """Who holds the last parts, if there is nothing left to do here."""


class PartsOfStore:
    """What a draft folder is to become, and how far it is."""

    def __init__(
        self, draft: Path, job: RecordJob, name: str, on_bad_record: BadRecordPolicy
    ) -> None:
        self.draft, self.job, self.name, self.on_bad_record = draft, job, name, on_bad_record
        self.total = len(job.dataset)
        self._most_bad = most_bad_records(on_bad_record, self.total)
        size = _SMALLEST_PART
        while size < _LARGEST_PART and size * _PARTS < self.total:
            size *= 2
        self.size = size
        self.number = -(-self.total // size)
        self.done: set[int] = set()
        self._bad: dict[int, int] = {}
        """Part -> its number of bad records, for those that have any."""
        self._listed_at = -_LIST_S

    def __reduce__(self) -> tuple[type[PartsOfStore], tuple[object, ...]]:
        return PartsOfStore, (self.draft, self.job, self.name, self.on_bad_record)

    def span(self, part: int) -> tuple[int, int]:
        """First record of a part, and the first behind it."""
        return part * self.size, min((part + 1) * self.size, self.total)

    def path(self, part: int) -> Path:
        return self.draft / f"{part:06d}.part"

    def num_done(self) -> int:
        """Records in committed parts."""
        short = self.number * self.size - self.total if self.number - 1 in self.done else 0
        return len(self.done) * self.size - short

    def look(self, *, now: bool = False) -> None:
        """Read the draft folder again, unless that was done just now."""
        if not now and time.monotonic() - self._listed_at < _LIST_S:
            return
        try:
            names = os.listdir(self.draft)
        except FileNotFoundError:  # put together and published by another process
            self.done = set(range(self.number))
            return
        self.done = {int(name[:-5]) for name in names if name.endswith(".part")}
        for name in names:
            if name.endswith(".bad"):
                part, count, _ = name.split(".")
                self._bad[int(part)] = int(count)
        self._listed_at = time.monotonic()

    def make(self, part: int, tell: Callable[[int, int], None]) -> None:
        """Write a part. Its bad records are noted first, for others to see without opening it."""

        def note(summary: PartSummary) -> None:
            if summary.bad:
                (self.draft / f"{part:06d}.{len(summary.bad)}.bad").touch()
                self._bad[part] = len(summary.bad)

        self.job.write_part(self.path(part), *self.span(part), tell, note)
        self.done.add(part)

    def is_wanted(self, part: int) -> bool:
        """Whether the part has to be made; not those behind a first bad record that is fatal."""
        return part not in self.done and part < self._end()

    def is_over(self) -> bool:
        """Whether nothing more has to be made."""
        if self._most_bad and self._num_bad() > self._most_bad:
            return True
        end = self._end()
        return len(self.done) >= end and all(part in self.done for part in range(end))

    def raise_if_too_bad(self) -> None:
        """DataError if there are more bad records than the policy allows."""
        done = sorted(self._bad.keys() & self.done)
        if not done:
            return
        try:
            first = read_summary(self.path(done[0])).bad[0]
        except FileNotFoundError:
            return  # another process has just published the store, which says it too
        refuse_bad_records(
            self.on_bad_record,
            name=self.name,
            first=str(first),
            num_bad=self._num_bad(),
            num_seen=self.num_done(),
            total=self.total,
        )

    def _num_bad(self) -> int:
        return sum(count for part, count in self._bad.items() if part in self.done)

    def _end(self) -> int:
        """The part behind the last that can matter."""
        if self.on_bad_record == "error" and self._bad:
            return min(self._bad) + 1
        return self.number


def make_parts(
    parts: PartsOfStore,
    claims: Claims,
    tell: Callable[[int, int], None],
    part_done: Callable[[], None],
    waiting: Callable[[str], None],
) -> None:
    """Claim parts and make them until none is left; wait for those that living others hold.

    Args:
        tell: called before each record with (its number, tokens of its part so far).
        part_done: called behind each part.
        waiting: called now and then, with who has the parts that are left.
    """
    todo = deque(range(parts.number))
    num_held, pause = 0, _POLL_S
    while todo:
        parts.look()
        if parts.is_over():
            return
        part = todo.popleft()
        if not parts.is_wanted(part):
            continue
        if claims.take(str(part)):
            try:
                if parts.path(part).exists():
                    parts.look(now=True)
                else:
                    parts.make(part, tell)
            finally:
                claims.release(str(part))
            part_done()
            num_held, pause = 0, _POLL_S
            continue
        todo.append(part)
        num_held += 1
        if num_held >= len(todo):  # once around, and others have all that is left
            owner = claims.owner(str(part))
            waiting(describe_owner(owner) if owner else "")
            time.sleep(pause)
            num_held, pause = 0, min(pause * 1.5, _LONGEST_POLL_S)
