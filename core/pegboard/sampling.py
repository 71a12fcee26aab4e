"""Which records of a dataset an epoch uses, from `sample_ratio` or from a share of tokens.

A ratio of 2.5 is every record twice and half of them once more. What is more than whole copies is a
window of one permutation that depends on seed and dataset name only: nothing else that draws numbers
shifts it. By default the window moves on with each epoch, so that every record has its turn.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, Literal

import numpy as np

from pegboard.errors import ConfigError

__all__ = ["Draw", "derive_seed", "sample_indices", "sample_tokens", "token_quotas"]

Draw = Literal["rotate", "redraw", "fixed"]
"""How epochs differ in the part that is no whole copy: the window moves on, is drawn anew from seed
and epoch, or stays."""


def derive_seed(*parts: str | int) -> int:
    """A 64-bit seed from names and numbers, the same on every machine."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def sample_indices(
    num: int, ratio: float, seed: int, name: str, epoch: int, draw: Draw = "rotate"
) -> np.ndarray:
    """(round(ratio * num),) integer indices in [0, num), sorted inside each copy.

    At least one where ratio and num are positive. Each index appears floor(count / num) times or
    once more.

    Args:
        num: samples of the whole dataset.
        ratio: `sample_ratio`, not negative.
        seed: the run's seed.
        name: the dataset's name.
        epoch: from 0.
        draw: how epochs differ in the fraction.

    Raises:
        ConfigError: the ratio is negative or not finite.
    """
    if not (math.isfinite(ratio) and ratio >= 0):
        raise ConfigError(f"dataset {name!r}: sample_ratio is {ratio}, expected a number from 0 up")
    count = round(ratio * num)
    if num and ratio > 0:
        count = max(count, 1)
    if not count:
        return np.empty(0, dtype=_index_type(num))
    first = epoch * (count % num) if draw == "rotate" else 0
    order = None if count % num == 0 else _order(num, seed, name, epoch, draw)
    return _window(num, order, first, count)


def sample_tokens(
    lengths: np.ndarray, num_tokens: int, seed: int, name: str, epoch: int, draw: Draw = "rotate"
) -> np.ndarray:
    """Indices of samples that hold `num_tokens` tokens, to within one sample; at least one.

    The samples stand in one shuffled order that repeats for ever. Epoch e takes those from token
    `e * num_tokens` of it on, so over the epochs each is used as often as any other, or once more.

    Args:
        lengths: (num_samples,) tokens of each sample of the dataset.
        num_tokens: tokens that the epoch is to have.
        seed, name, epoch, draw: as for `sample_indices`.
    """
    num = len(lengths)
    if not num or num_tokens <= 0:
        return np.empty(0, dtype=_index_type(num))
    order = _order(num, seed, name, epoch, draw)
    sizes = lengths[order]
    middles = np.cumsum(sizes, dtype=np.int64)
    total = int(middles[-1])
    # A sample belongs to the side that holds its middle: half a sample off at most.
    middles -= sizes // 2
    del sizes
    start = epoch * num_tokens if draw == "rotate" else 0
    bounds = []
    for token in (start, start + num_tokens):
        passes, rest = divmod(token, total)
        bounds.append(passes * num + int(np.searchsorted(middles, rest, side="right")))
    first, last = bounds
    return _window(num, order, first, max(last - first, 1))


def token_quotas(num_tokens: list[int], weights: list[float]) -> list[int]:
    """Tokens that each dataset gives an epoch: shares as the weights, together as many as there are.

    Args:
        num_tokens: tokens of each dataset.
        weights: positive `token_weight` of each.
    """
    total, whole = sum(num_tokens), math.fsum(weights)
    return [round(total * weight / whole) for weight in weights]


def _order(num: int, seed: int, name: str, epoch: int, draw: Draw) -> np.ndarray:
    parts: list[str | int] = ["sample_ratio", seed, name]
    if draw == "redraw":
        parts.append(epoch)
    order = np.arange(num, dtype=_index_type(num))
    np.random.default_rng(derive_seed(*parts)).shuffle(order)
    return order


def _window(num: int, order: np.ndarray | None, first: int, count: int) -> np.ndarray:
    """Places `first` to `first + count` of an order that repeats for ever, sorted in each copy."""
    copies, rest = divmod(count, num)
    everything = np.arange(num, dtype=_index_type(num))
    parts = [everything] * copies
    if rest:
        assert order is not None
        start = first % num
        over = max(0, start + rest - num)  # the window goes on at the beginning of the order
        parts.append(np.concatenate([order[start : start + rest], order[:over]]))
        parts[-1].sort()
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _index_type(num: int) -> type[np.integer[Any]]:
    """The smallest that can name each of `num`: of many samples the indices are most of the memory."""
    return np.int32 if num < 2**31 else np.int64
