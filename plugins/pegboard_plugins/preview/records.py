"""The record that a sample came from, found by its key.

A dataset tells the key of a record but not the record of a key. Keys of one file stand together and
their lines rise, so a few dozen look-ups find it among millions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pegboard import DataError

if TYPE_CHECKING:
    from pegboard.contracts import Dataset, SampleKey

__all__ = ["RecordFinder"]


class RecordFinder:
    """Looks records of one dataset up by key."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._files: dict[str, tuple[int, int]] | None = None

    def find(self, key: SampleKey) -> Mapping[str, Any] | None:
        """The record, or None if it is not found or no longer readable."""
        if self._files is None:
            self._files = _find_files(self._dataset)
        start, end = self._files.get(key.file, (0, 0))
        if start == end:
            return None
        key_of = self._dataset.key
        # Nearly always the lines of a file have no gaps.
        guess = start + key.line - key_of(start).line
        if not (start <= guess < end and key_of(guess).line == key.line):
            guess = _first(start, end, lambda index: key_of(index).line >= key.line)
            if guess == end or key_of(guess).line != key.line:
                return None
        try:
            return self._dataset[guess]
        except DataError:
            return None


def _find_files(dataset: Dataset) -> dict[str, tuple[int, int]]:
    """File -> first record and one past the last."""
    files: dict[str, tuple[int, int]] = {}
    start = 0
    while start < len(dataset):
        name = dataset.key(start).file
        end = _first(start, len(dataset), lambda index, name=name: dataset.key(index).file != name)  # type: ignore[misc]
        files[name] = (start, end)
        start = end
    return files


def _first(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """First index in [low, high) where it holds, given that it holds from there on; else high."""
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
