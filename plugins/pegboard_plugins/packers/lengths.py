"""The check of lengths that every packer makes first."""

from __future__ import annotations

import numpy as np

from pegboard import DataError

__all__ = ["check_lengths"]


def check_lengths(lengths: np.ndarray, longest: int | None) -> None:
    """DataError unless each is from 1 to `longest` (None: any)."""
    if not len(lengths):
        return
    limit = np.iinfo(np.int64).max if longest is None else longest
    if not (1 <= lengths.min() and lengths.max() <= limit):
        first = int(np.flatnonzero((lengths < 1) | (lengths > limit))[0])
        expected = "at least 1" if longest is None else f"1 to pack_max_length = {longest}"
        raise DataError(f"sample {first} has {int(lengths[first])} tokens, expected {expected}")
