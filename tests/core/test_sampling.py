"""sample_ratio is whole copies and a deterministic fraction of the dataset."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from pegboard import ConfigError
from pegboard.sampling import Draw, sample_indices, sample_tokens, token_quotas


@pytest.mark.parametrize("num", [1, 2, 7, 100, 1003])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 1.0, 1.1, 1.5, 2.0, 3.25])
def test_each_index_appears_floor_or_ceil_of_the_ratio(num: int, ratio: float) -> None:
    indices = sample_indices(num, ratio, 0, "d", 0)
    assert indices.dtype == np.int32, "half the memory of int64"
    count = max(round(ratio * num), 1)
    assert len(indices) == count
    times = Counter(indices.tolist())
    assert all(0 <= index < num for index in times)
    low, rest = divmod(count, num)
    assert Counter(times[index] for index in range(num)) == Counter({low: num - rest}) + Counter(
        {low + 1: rest}
    )


def test_the_fraction_depends_on_seed_and_name_only() -> None:
    first = sample_indices(100, 0.3, 1, "d", 0)
    np.random.default_rng(0).random(5)
    assert np.array_equal(first, sample_indices(100, 0.3, 1, "d", 0))
    assert not np.array_equal(first, sample_indices(100, 0.3, 2, "d", 0))
    assert not np.array_equal(first, sample_indices(100, 0.3, 1, "e", 0))


def test_the_fraction_is_drawn_over_the_whole_dataset() -> None:
    indices = sample_indices(10_000, 0.1, 0, "d", 0)
    parts = np.bincount(indices // 1000, minlength=10)
    assert parts.min() > 60 and parts.max() < 140


def test_over_the_epochs_every_record_has_its_turn() -> None:
    times = Counter(
        i for epoch in range(10) for i in sample_indices(10, 0.3, 0, "d", epoch).tolist()
    )
    assert set(times.values()) == {3} and len(times) == 10


def test_nothing_is_drawn_from_nothing_and_something_from_something() -> None:
    assert len(sample_indices(0, 2.0, 0, "d", 0)) == 0
    assert len(sample_indices(5, 0.0, 0, "d", 0)) == 0
    assert len(sample_indices(3, 0.01, 0, "d", 0)) == 1


@pytest.mark.parametrize("ratio", [-0.1, float("nan"), float("inf")])
def test_a_ratio_that_means_nothing_is_an_error(ratio: float) -> None:
    with pytest.raises(ConfigError, match="dataset 'd': sample_ratio"):
        sample_indices(5, ratio, 0, "d", 0)


def test_each_way_to_draw_differs_over_epochs_as_it_says() -> None:
    def epochs(draw: Draw) -> list[list[int]]:
        return [sample_indices(100, 0.3, 0, "d", epoch, draw).tolist() for epoch in range(4)]

    rotated, redrawn, fixed = epochs("rotate"), epochs("redraw"), epochs("fixed")
    assert fixed == [fixed[0]] * 4
    assert rotated[0] == fixed[0]
    assert not set(rotated[0]) & set(rotated[1]), "the next ones, before any comes again"
    assert len({tuple(one) for one in redrawn}) == 4
    assert 0 < len(set(redrawn[0]) & set(redrawn[1])) < 20, "drawn without regard to the last"
    assert redrawn == epochs("redraw")


@pytest.mark.parametrize("share", [0.05, 0.4, 1.0, 2.7])
def test_tokens_are_met_to_within_a_sample_in_each_epoch_and_in_all(share: float) -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 300)
    wanted = round(share * int(lengths.sum()))
    times = np.zeros(300)
    for epoch in range(6):
        indices = sample_tokens(lengths, wanted, 1, "d", epoch)
        assert abs(int(lengths[indices].sum()) - wanted) <= 50
        times += np.bincount(indices, minlength=300)
    assert abs(float((times * lengths).sum()) - 6 * wanted) <= 50
    assert times.max() - times.min() <= 1, "each sample as often as any other, or once more"


def test_samples_for_tokens_are_the_same_for_the_same_seed_and_draw() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 300)

    def drawn(epoch: int, draw: Draw, seed: int = 1) -> tuple[int, ...]:
        return tuple(sample_tokens(lengths, 1000, seed, "d", epoch, draw).tolist())

    draws: tuple[Draw, ...] = ("rotate", "redraw", "fixed")
    for draw in draws:
        assert drawn(1, draw) == drawn(1, draw)
        assert (drawn(0, draw) == drawn(1, draw)) == (draw == "fixed")
        assert drawn(0, draw) != drawn(0, draw, seed=2)
    assert len(sample_tokens(lengths, 0, 1, "d", 0)) == 0
    assert len(sample_tokens(lengths, 1, 1, "d", 0)) == 1


def test_quotas_share_all_tokens_by_weight() -> None:
    assert token_quotas([100, 300], [1.0, 3.0]) == [100, 300]
    assert token_quotas([100, 300], [2.0, 2.0]) == [200, 200]
