"""The text collator flattens a pack; labels never cross a sample, and padding is never counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pegboard import Batch, DataError, Example, SampleKey
from pegboard_plugins.collators.component import SFTLLMCollator


def example(ids: list[int], mask: list[int], source_id: int = 0, line: int = 1) -> Example:
    return Example(
        input_ids=np.array(ids, dtype=np.int32),
        loss_mask=np.array(mask, dtype=np.bool_),
        key=SampleKey("d", "f.jsonl", line),
        source_id=source_id,
    )


def collate(examples: list[Example], **fields: Any) -> Batch:
    return SFTLLMCollator(SFTLLMCollator.Config(**fields)).build(pad_token_id=99)(examples)


PACK = [
    example([10, 11, 12], [1, 1, 1], source_id=2, line=1),
    example([20, 21, 22, 23], [1, 0, 0, 1], source_id=5, line=2),
    example([30], [1], source_id=7, line=3),
]


def test_a_pack_is_one_row_with_restarting_positions() -> None:
    batch = collate(PACK)
    assert batch.input_ids_T.tolist() == [10, 11, 12, 20, 21, 22, 23, 30]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    assert batch.cu_seqlens.tolist() == [0, 3, 7, 8]
    assert (batch.max_seqlen, batch.num_tokens) == (4, 8)
    assert batch.input_ids_T.dtype == batch.position_ids_T.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32
    assert [key.line for key in batch.keys] == [1, 2, 3]


def test_labels_are_the_next_token_of_the_same_sample() -> None:
    targets = collate(PACK).targets
    assert targets.positions_K.tolist() == [0, 1, 5]
    assert targets.labels_K.tolist() == [11, 12, 23]
    assert targets.source_ids_K.tolist() == [2, 2, 5]
    assert targets.scale == 1.0
    assert targets.positions_K.dtype == targets.labels_K.dtype == torch.int64
    assert targets.source_ids_K.dtype == torch.int64


def test_no_label_crosses_a_boundary_in_random_packs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = rng.integers(1, 6, rng.integers(1, 8))
        pack = [
            example(rng.integers(0, 9, n).tolist(), rng.integers(0, 2, n).tolist()) for n in sizes
        ]
        batch = collate(pack, pad_to_multiple_of=4)
        ends = set((batch.cu_seqlens[1:] - 1).tolist())
        assert ends.isdisjoint(batch.targets.positions_K.tolist())
        supervised = sum(int(one.loss_mask[1:].sum()) for one in pack)
        assert len(batch.targets.labels_K) == supervised
        assert torch.equal(batch.targets.labels_K, batch.input_ids_T[batch.targets.positions_K + 1])


@pytest.mark.parametrize(
    ("reduction", "weights"),
    [("token", [1, 1, 1]), ("sample", [0.5, 0.5, 1]), ("square", [2**-0.5, 2**-0.5, 1])],
)
def test_weights_follow_the_reduction(reduction: str, weights: list[float]) -> None:
    found = collate(PACK, loss_reduction=reduction).targets.weights_K
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(weights, dtype=torch.float32))


def test_padding_is_a_segment_of_its_own_that_changes_nothing_else() -> None:
    plain, padded = collate(PACK), collate(PACK, pad_to_multiple_of=5)
    assert padded.input_ids_T.tolist() == [*plain.input_ids_T.tolist(), 99, 99]
    assert padded.cu_seqlens.tolist() == [0, 3, 7, 8, 10]
    assert padded.position_ids_T.tolist()[-2:] == [0, 1]
    assert padded.num_tokens == plain.num_tokens == 8
    assert len(padded.keys) == 3
    for a, b in zip(plain.targets[:4], padded.targets[:4], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(collate(PACK, pad_to_multiple_of=4).input_ids_T, plain.input_ids_T)


@pytest.mark.parametrize(("multiple", "size"), [(None, 1), (8, 8)])
def test_no_examples_make_a_filler_without_targets(multiple: int | None, size: int) -> None:
    batch = collate([], pad_to_multiple_of=multiple)
    assert batch.input_ids_T.tolist() == [99] * size
    assert batch.cu_seqlens.tolist() == [0, size]
    assert (batch.max_seqlen, batch.num_tokens, batch.keys) == (size, 0, ())
    assert [len(value) for value in batch.targets[:4]] == [0, 0, 0, 0]
    assert batch.targets.labels_K.dtype == batch.targets.positions_K.dtype == torch.int64
    assert batch.targets.weights_K.dtype == torch.float32


def test_an_example_that_is_no_text_row_is_an_error() -> None:
    image = example([1, 2], [0, 1])
    image.media = {"images": ["a.png"]}
    with pytest.raises(DataError, match=r"f\.jsonl:1: holds media \(images\)"):
        collate([image])
    with pytest.raises(DataError, match=r"f\.jsonl:1: 2 ids and 1 mask values"):
        collate([example([1, 2], [1])])
    with pytest.raises(DataError, match="0 ids"):
        collate([example([], [])])


def test_a_cut_sample_keeps_the_target_behind_the_cut() -> None:
    first, second = example([10, 11], [0, 1]), example([12, 13], [1, 1], line=1)
    first.next_id = 12
    targets = collate([first, second, example([20, 21], [1, 1], line=2)]).targets
    assert targets.positions_K.tolist() == [0, 1, 2, 4]
    assert targets.labels_K.tolist() == [11, 12, 13, 21]
    alone = collate([second, first]).targets
    assert alone.positions_K.tolist() == [0, 2, 3], "also at the end of a row"
    assert alone.labels_K.tolist() == [13, 11, 12]
    assert collate([first], loss_reduction="sample").targets.weights_K.tolist() == [0.5, 0.5]
