"""Every sample is in exactly one pack, never over length, fixed by the seed, and packs are full."""

from __future__ import annotations

import numpy as np
import pytest

from pegboard import DataError, PackPlan
from pegboard.contracts import Packer
from pegboard_plugins.packers import in_order
from pegboard_plugins.packers.component import (
    ExpandSoftPacker,
    HardPacker,
    NoPacker,
    SequentialPacker,
    SoftPacker,
)


def expand(window_size: int | None) -> Packer:
    return ExpandSoftPacker(ExpandSoftPacker.Config(window_size=window_size)).build()


PACKERS = {
    "next fit": SoftPacker(SoftPacker.Config()).build(),
    "all at once": expand(None),
    "windows": expand(100),
    "windows of one": expand(1),
    "spread": expand(65_536),
    "alone": NoPacker(NoPacker.Config()).build(),
    "in order": SequentialPacker(SequentialPacker.Config()).build(),
}
HARD = HardPacker(HardPacker.Config()).build()
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
    assert plan.offsets.dtype == np.int64 and plan.samples.dtype.kind == "i"
    assert sorted(plan.samples.tolist()) == list(range(len(lengths)))
    assert plan.offsets[0] == 0 and plan.offsets[-1] == len(lengths)
    assert (np.diff(plan.offsets) > 0).all()
    assert pack_lengths(plan, array).max() <= 16


@pytest.mark.parametrize("name", [name for name in PACKERS if name != "in order"])
def test_the_same_seed_gives_the_same_plan_and_another_seed_another(name: str) -> None:
    lengths = np.array(LENGTHS["mixed"])
    plans = [PACKERS[name].plan(lengths, 16, seed) for seed in (5, 5, 6)]
    assert np.array_equal(plans[0].offsets, plans[1].offsets)
    assert np.array_equal(plans[0].samples, plans[1].samples)
    assert not np.array_equal(plans[0].samples, plans[2].samples)


def test_next_fit_starts_a_pack_only_when_the_next_sample_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths = np.array(LENGTHS["mixed"])
    for block in (3, 65_536):
        monkeypatch.setattr(in_order, "_BLOCK_SAMPLES", block)
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


def test_a_small_set_gets_packs_of_mixed_lengths_as_full_as_best_fit_makes_them() -> None:
    rng = np.random.default_rng(4)
    lengths = rng.integers(20, 400, 600)
    spread = expand(65_536).plan(lengths, 2048, 1)
    fitted = expand(None).plan(lengths, 2048, 1)
    assert len(spread.offsets) == len(fitted.offsets)

    def means(plan: PackPlan) -> np.ndarray:
        """Mean length of a sample, of each pack."""
        return pack_lengths(plan, lengths) / np.diff(plan.offsets)

    # Samples in random packs of ten would differ by the spread of all over the root of ten.
    chance = lengths.std() / np.sqrt(10)
    assert means(spread).std() < 0.5 * chance
    assert means(fitted).std() > 2 * chance


def test_which_samples_of_a_small_set_meet_changes_with_the_seed() -> None:
    lengths = np.random.default_rng(4).integers(20, 400, 600)
    pairs = []
    for seed in (0, 1):
        plan = expand(65_536).plan(lengths, 2048, seed)
        packs = np.split(plan.samples, plan.offsets[1:-1])
        pairs.append(
            {(a, b) for pack in packs for a in pack.tolist() for b in pack.tolist() if a < b}
        )
    assert len(pairs[0] & pairs[1]) < len(pairs[0]) / 5


def test_a_few_copies_of_few_samples_are_packed_together_with_others() -> None:
    """Equal lengths must not share packs only with each other."""
    lengths = np.repeat([100, 200, 300, 400], 8)
    plan = expand(65_536).plan(lengths, 1000, 0)
    kinds = [set(lengths[pack].tolist()) for pack in np.split(plan.samples, plan.offsets[1:-1])]
    assert len(kinds) == 8 and all(len(kind) > 1 for kind in kinds)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("pack_max_length", [3, 16, 100])
def test_a_hard_pack_is_exactly_full_and_every_token_is_in_one_piece(
    lengths: list[int], pack_max_length: int
) -> None:
    array = np.array(lengths, dtype=np.int64)
    plan = HARD.plan(array, pack_max_length, seed=3)
    assert plan.starts is not None and plan.stops is not None
    sizes = plan.stops - plan.starts
    assert (sizes > 0).all()
    packed = int(plan.offsets[-1])
    totals = [int(pack.sum()) for pack in np.split(sizes[:packed], plan.offsets[1:-1])]
    assert totals == [pack_max_length] * (len(plan.offsets) - 1) or not packed
    assert sizes[packed:].sum() == array.sum() % pack_max_length, "the rest is kept, not dropped"
    tokens = sorted(
        (int(sample), place)
        for sample, start, stop in zip(plan.samples, plan.starts, plan.stops, strict=True)
        for place in range(start, stop)
    )
    assert tokens == [(i, place) for i, length in enumerate(lengths) for place in range(length)]


def test_a_hard_packer_takes_samples_longer_than_a_pack_and_shuffles() -> None:
    lengths = np.array([1000] * 20)
    plan = HARD.plan(lengths, 256, 0)
    assert len(plan.offsets) - 1 == 20_000 // 256
    assert plan.samples.tolist() != sorted(plan.samples.tolist())
    with pytest.raises(DataError, match="sample 1 has 0 tokens, expected at least 1"):
        HARD.plan(np.array([5, 0]), 256, 0)


def test_no_packer_gives_each_sample_a_pack() -> None:
    plan = PACKERS["alone"].plan(np.array(LENGTHS["mixed"]), 16, 0)
    assert (np.diff(plan.offsets) == 1).all()
    assert plan.samples.tolist() != sorted(plan.samples.tolist())


def test_the_sequential_packer_keeps_the_order_of_the_data() -> None:
    plan = PACKERS["in order"].plan(np.array(LENGTHS["mixed"]), 16, 0)
    assert plan.samples.tolist() == list(range(1000))
