"""What a packer promises: every sample once, no pack over its length, the same plan for one seed.

Options: `keeps_order`, True for a packer whose plan does not depend on the seed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pegboard.testing.case import Case, Check

__all__ = ["CHECKS", "OPTIONS"]

OPTIONS = frozenset({"keeps_order"})

LIMIT = 64


def _lengths(number: int = 200) -> np.ndarray:
    return np.random.default_rng(3).integers(1, LIMIT + 1, number).astype(np.int64)


def _plan(case: Case, lengths: np.ndarray, seed: int = 1) -> Any:
    return case.make().build().plan(lengths, LIMIT, seed)


def _every_sample_once(case: Case) -> None:
    import pytest

    if getattr(case.component, "cuts_samples", False):
        pytest.skip("cuts samples")
    lengths = _lengths()
    plan = _plan(case, lengths)
    counts = np.bincount(plan.samples, minlength=len(lengths))
    twice, never = np.flatnonzero(counts > 1), np.flatnonzero(counts == 0)
    assert not len(twice), f"samples in two packs: {twice[:5].tolist()}"
    assert not len(never), f"samples in no pack: {never[:5].tolist()}"


def _offsets_cut_the_samples(case: Case) -> None:
    import pytest

    if getattr(case.component, "cuts_samples", False):
        pytest.skip("cuts samples")
    plan = _plan(case, _lengths())
    offsets = plan.offsets
    assert offsets[0] == 0 and offsets[-1] == len(plan.samples), "offsets do not cover the samples"
    assert (np.diff(offsets) > 0).all(), "a pack is empty"


def _no_pack_is_too_long(case: Case) -> None:
    import pytest

    if getattr(case.component, "cuts_samples", False):
        pytest.skip("cuts samples")
    lengths = _lengths()
    plan = _plan(case, lengths)
    sizes = np.add.reduceat(lengths[plan.samples], plan.offsets[:-1])
    assert sizes.max() <= LIMIT, f"a pack has {sizes.max()} tokens, over {LIMIT}"


def _the_seed_alone_decides(case: Case) -> None:
    lengths = _lengths()
    before = lengths.copy()
    one, two, other = (_plan(case, lengths, seed) for seed in (1, 1, 2))
    assert np.array_equal(lengths, before), "the lengths were changed"
    same = np.array_equal(one.samples, two.samples) and np.array_equal(one.offsets, two.offsets)
    assert same, "one seed gave two plans"
    moved = not np.array_equal(one.samples, other.samples)
    keeps = bool(case.options.get("keeps_order", False))
    assert moved != keeps, "two seeds gave one plan" if not keeps else "the seed changed the order"


def _cut_samples_overlap_nowhere(case: Case) -> None:
    import pytest

    if not getattr(case.component, "cuts_samples", False):
        pytest.skip("cuts no samples")
    lengths = _lengths() * 3
    plan = _plan(case, lengths)
    assert plan.starts is not None and plan.stops is not None, "it cuts, but gives no starts, stops"
    sizes = plan.stops - plan.starts
    assert (sizes > 0).all() and (plan.stops <= lengths[plan.samples]).all(), "a part of no tokens"
    # What stands behind the last pack is kept for the next epoch.
    packs = np.add.reduceat(sizes[: plan.offsets[-1]], plan.offsets[:-1])
    assert packs.max() <= LIMIT, f"a pack has {packs.max()} tokens, over {LIMIT}"
    for sample in range(len(lengths)):
        own = plan.samples == sample
        parts = sorted(zip(plan.starts[own].tolist(), plan.stops[own].tolist(), strict=True))
        ends = [0, *(stop for _, stop in parts)]
        starts = [*(start for start, _ in parts), int(lengths[sample])]
        assert ends == starts, f"sample {sample} of {lengths[sample]} tokens is cut into {parts}"


def _few_samples_are_planned_too(case: Case) -> None:
    for lengths in ([1], [LIMIT], [LIMIT, 1, LIMIT]):
        array = np.array(lengths, dtype=np.int64)
        plan = _plan(case, array)
        assert set(plan.samples.tolist()) == set(range(len(lengths))), f"lengths {lengths}"


CHECKS = (
    Check("every_sample_once", _every_sample_once),
    Check("offsets_cut_the_samples", _offsets_cut_the_samples),
    Check("no_pack_is_too_long", _no_pack_is_too_long),
    Check("the_seed_alone_decides", _the_seed_alone_decides),
    Check("cut_samples_overlap_nowhere", _cut_samples_overlap_nowhere),
    Check("few_samples_are_planned_too", _few_samples_are_planned_too),
)
