"""Which records of a dataset an epoch uses, from `sample_ratio`.

A ratio of 2.5 is every record twice and half of them once more. The fraction is a window of one
permutation that depends on seed and dataset name only, and moves on with each epoch: nothing else
that draws numbers shifts it, and over the epochs every record has its turn.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

from pegboard.errors import ConfigError

__all__ = ["derive_seed", "sample_indices"]


def derive_seed(*parts: str | int) -> int:
    """A 64-bit seed from names and numbers, the same on every machine."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def sample_indices(num: int, ratio: float, seed: int, name: str, epoch: int) -> np.ndarray:
    """(round(ratio * num),) int64 indices in [0, num).

    At least one where ratio and num are positive. Each index appears floor(count / num) times or
    once more. The order means nothing: the packer shuffles.

    Args:
        num: samples of the whole dataset.
        ratio: `sample_ratio`, not negative.
        seed: the run's seed.
        name: the dataset's name.
        epoch: from 0; moves the window of the fraction.

    Raises:
        ConfigError: the ratio is negative or not finite.
    """
    if not (math.isfinite(ratio) and ratio >= 0):
        raise ConfigError(f"dataset {name!r}: sample_ratio is {ratio}, expected a number from 0 up")
    count = round(ratio * num)
    if num and ratio > 0:
        count = max(count, 1)
    if not count:
        return np.empty(0, dtype=np.int64)
    copies, rest = divmod(count, num)
    everything = np.arange(num, dtype=np.int64)
    if not rest:
        return np.tile(everything, copies)
    order = np.random.default_rng(derive_seed("sample_ratio", seed, name)).permutation(num)
    window = (np.arange(rest, dtype=np.int64) + (epoch * rest) % num) % num
    extra = np.sort(order[window]).astype(np.int64, copy=False)
    return np.concatenate([np.tile(everything, copies), extra])
