"""What a collator promises: one flat row in which labels are shifted inside each sample.

Options: `examples`, built examples it takes (random text by default).
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Sequence

import numpy as np
import torch

from pegboard.contracts import Batch, Example
from pegboard.testing.case import Case, Check
from pegboard.testing.rows import make_examples

__all__ = ["CHECKS", "OPTIONS"]

OPTIONS = frozenset({"examples"})

PAD = 7


def _examples(case: Case) -> Sequence[Example]:
    given: Sequence[Example] | None = case.options.get("examples")
    return given or make_examples((5, 1, 8, 3), vocab_size=100)


def _batch(case: Case) -> tuple[Sequence[Example], Batch]:
    examples = _examples(case)
    return examples, case.make().build(pad_token_id=PAD)(examples)


def _the_row_holds_every_sample(case: Case) -> None:
    examples, batch = _batch(case)
    bounds = batch.cu_seqlens.tolist()
    assert batch.cu_seqlens.dtype == torch.int32, f"cu_seqlens is {batch.cu_seqlens.dtype}"
    assert bounds[0] == 0 and bounds[-1] == len(batch.input_ids_T), f"cu_seqlens is {bounds}"
    assert bounds == sorted(bounds), f"cu_seqlens is {bounds}, not ascending"
    assert batch.input_ids_T.dtype == torch.int64, f"input_ids_T is {batch.input_ids_T.dtype}"
    for number, example in enumerate(examples):
        row = batch.input_ids_T[bounds[number] : bounds[number + 1]].numpy()
        assert np.array_equal(row, example.input_ids), f"sample {number} is not in its place"
    real = sum(len(example.input_ids) for example in examples)
    assert batch.num_tokens == real, f"num_tokens is {batch.num_tokens}, of {real} real tokens"
    assert batch.keys == tuple(example.key for example in examples), "keys are not the samples'"


def _positions_restart_with_each_sample(case: Case) -> None:
    _, batch = _batch(case)
    bounds = batch.cu_seqlens.tolist()
    for start, stop in zip(bounds, bounds[1:], strict=False):
        found = batch.position_ids_T[start:stop].tolist()
        assert found == list(range(stop - start)), f"positions of a sample are {found}"
    longest = max(stop - start for start, stop in zip(bounds, bounds[1:], strict=False))
    assert type(batch.max_seqlen) is int, f"max_seqlen is {type(batch.max_seqlen).__name__}"
    assert batch.max_seqlen >= longest, f"max_seqlen is {batch.max_seqlen}, a sample has {longest}"


def _labels_are_shifted_inside_each_sample(case: Case) -> None:
    examples, batch = _batch(case)
    targets, bounds = batch.targets, batch.cu_seqlens.tolist()
    wanted = set()
    for number, example in enumerate(examples):
        for index in np.flatnonzero(example.loss_mask):
            if index > 0:
                place = bounds[number] + int(index) - 1
                wanted.add((place, int(example.input_ids[index]), example.source_id))
    found = list(
        zip(
            targets.positions_K.tolist(),
            targets.labels_K.tolist(),
            targets.source_ids_K.tolist(),
            strict=True,
        )
    )
    assert len(found) == len(set(found)), "a position is supervised twice"
    extra, missing = sorted(set(found) - wanted), sorted(wanted - set(found))
    assert not extra, f"(position, label, source) that no mask asks for: {extra[:3]}"
    assert not missing, f"(position, label, source) left out: {missing[:3]}"
    assert (targets.weights_K > 0).all(), "a supervised position has no weight"


def _a_cut_sample_keeps_its_last_target(case: Case) -> None:
    examples, _ = _batch(case)
    cut = [dataclasses.replace(example, next_id=PAD) for example in examples]
    targets = case.make().build(pad_token_id=PAD)(cut).targets
    labels = dict(zip(targets.positions_K.tolist(), targets.labels_K.tolist(), strict=True))
    ends = np.cumsum([len(example.input_ids) for example in cut])
    wrong = [int(end) - 1 for end in ends if labels.get(int(end) - 1) != PAD]
    assert not wrong, f"positions {wrong} don't predict `next_id`: what a packer cut loses a target"


def _examples_are_left_alone(case: Case) -> None:
    examples = _examples(case)
    before = pickle.dumps(list(examples))
    first, second = (case.make().build(pad_token_id=PAD)(examples) for _ in range(2))
    assert pickle.dumps(list(examples)) == before, "the examples were changed"
    assert torch.equal(first.input_ids_T, second.input_ids_T), "one pack gave two rows"
    for one, two in zip(first.targets[:4], second.targets[:4], strict=True):
        assert torch.equal(one, two), "one pack gave two sets of targets"


def _an_empty_pack_is_a_filler(case: Case) -> None:
    batch = case.make().build(pad_token_id=PAD)([])
    assert batch.num_tokens == 0, f"a pack of nothing has {batch.num_tokens} real tokens"
    assert len(batch.targets.positions_K) == 0, "a pack of nothing has targets"
    assert batch.cu_seqlens[-1] == len(batch.input_ids_T), "its cu_seqlens do not cover its row"


def _pickles(case: Case) -> None:
    examples, batch = _batch(case)
    again = pickle.loads(pickle.dumps(case.make().build(pad_token_id=PAD)))(examples)
    assert torch.equal(again.input_ids_T, batch.input_ids_T), "the pickled one makes another row"


CHECKS = (
    Check("the_row_holds_every_sample", _the_row_holds_every_sample),
    Check("positions_restart_with_each_sample", _positions_restart_with_each_sample),
    Check("labels_are_shifted_inside_each_sample", _labels_are_shifted_inside_each_sample),
    Check("a_cut_sample_keeps_its_last_target", _a_cut_sample_keeps_its_last_target),
    Check("examples_are_left_alone", _examples_are_left_alone),
    Check("an_empty_pack_is_a_filler", _an_empty_pack_is_a_filler),
    Check("pickles", _pickles),
)
