"""Every sample is in exactly one pack, never over length, fixed by the seed, and packs are full."""

from __future__ import annotations

import numpy as np
import pytest

from pegboard import DataError, PackPlan
from pegboard.contracts import Packer
from pegboard_plugins.packers import planning
from pegboard_plugins.packers.component import ExpandSoftPacker, SoftPacker


def expand(window_size: int | None) -> Packer:
    return ExpandSoftPacker(ExpandSoftPacker.Config(window_size=window_size)).build()


PACKERS = {
    "next fit": SoftPacker(SoftPacker.Config()).build(),
    "all at once": expand(None),
    "windows": expand(100),
    "windows of one": expand(1),
}
LENGTHS = {
    "one": [7],
    "equal": [5] * 33,
    "full": [16] * 9,
    "ones": [1] * 50,
    "halves": [8, 9] * 20,
    "mixed": np.random.default_rng(1).integers(1, 17, 1000).tolist(),
    "long tail": np.clip(np.random.default_rng(2).geometric(0.3, 777), 1, 16).tolist(),
}


def pack_lengths(plan: PackPlan, lengths: np.ndarray) -> np.ndarray:
    return np.add.reduceat(lengths[plan.samples], plan.offsets[:-1])


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("packer", PACKERS.values(), ids=PACKERS.keys())
def test_every_sample_is_in_exactly_one_pack_and_no_pack_is_over_length(
    packer: Packer, lengths: list[int]
) -> None:
    array = np.array(lengths, dtype=np.int64)
    plan = packer.plan(array, 16, seed=3)
    assert plan.offsets.dtype == plan.samples.dtype == np.int64
    assert sorted(plan.samples.tolist()) == list(range(len(lengths)))
    assert plan.offsets[0] == 0 and plan.offsets[-1] == len(lengths)
    assert (np.diff(plan.offsets) > 0).all()
    assert pack_lengths(plan, array).max() <= 16


@pytest.mark.parametrize("packer", PACKERS.values(), ids=PACKERS.keys())
def test_the_same_seed_gives_the_same_plan_and_another_seed_another(packer: Packer) -> None:
    lengths = np.array(LENGTHS["mixed"])
    plans = [packer.plan(lengths, 16, seed) for seed in (5, 5, 6)]
    assert all(np.array_equal(a, b) for a, b in zip(plans[0], plans[1], strict=True))
    assert not np.array_equal(plans[0].samples, plans[2].samples)


def test_next_fit_starts_a_pack_only_when_the_next_sample_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths = np.array(LENGTHS["mixed"])
    for block in (3, 65_536):
        monkeypatch.setattr(planning, "_BLOCK_SAMPLES", block)
        plan = PACKERS["next fit"].plan(lengths, 16, 0)
        totals = pack_lengths(plan, lengths)
        next_length = lengths[plan.samples[plan.offsets[1:-1]]]
        assert (totals[:-1] + next_length > 16).all() and totals.max() <= 16


@pytest.mark.parametrize("packer", PACKERS.values(), ids=PACKERS.keys())
def test_no_samples_make_no_packs(packer: Packer) -> None:
    plan = packer.plan(np.empty(0, dtype=np.int64), 16, 0)
    assert plan.offsets.tolist() == [0] and len(plan.samples) == 0


@pytest.mark.parametrize("bad", [0, 17])
@pytest.mark.parametrize("packer", PACKERS.values(), ids=PACKERS.keys())
def test_a_length_that_fits_no_pack_is_an_error(packer: Packer, bad: int) -> None:
    with pytest.raises(DataError, match=f"sample 2 has {bad} tokens"):
        packer.plan(np.array([1, 16, bad, 3]), 16, 0)


def test_a_pack_longer_than_16_bits_is_planned() -> None:
    lengths = np.array([70_000, 50_000, 30_000, 100_000, 50_000])
    plan = expand(None).plan(lengths, 100_000, 0)
    assert sorted(pack_lengths(plan, lengths).tolist()) == [100_000] * 3


@pytest.mark.parametrize(("window_size", "fill"), [(None, 0.9995), (8192, 0.999)])
def test_best_fit_fills_packs(window_size: int | None, fill: float) -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6.2, 1.1, 40_000).astype(np.int64), 1, 16_384)
    plan = expand(window_size).plan(lengths, 16_384, 0)
    assert lengths.sum() / (16_384 * (len(plan.offsets) - 1)) >= fill


def test_windows_keep_the_order_random() -> None:
    """Samples of every length are spread over the whole epoch, as a shuffle would."""
    lengths = np.sort(np.random.default_rng(0).integers(1, 1000, 20_000))
    plan = expand(2000).plan(lengths, 4000, 0)
    place = np.arange(len(lengths))
    assert abs(np.corrcoef(place, lengths[plan.samples])[0, 1]) < 0.05
    assert abs(np.corrcoef(place, plan.samples)[0, 1]) < 0.05
