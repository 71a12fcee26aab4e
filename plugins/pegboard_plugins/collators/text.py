"""Text examples of one pack -> a flat Batch.

Samples lie one after the other; position ids restart and `cu_seqlens` marks where. A token's label
is the next token of the same sample, where the loss mask asks for it. Padding is a segment of its
own at the end, without targets. Where a packer cut a sample, the last token of the first part still
predicts the first of the second: no target is lost, and none is learned across samples.

Shape legend: T tokens of the row, K supervised positions, S samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pegboard import Batch, DataError, Example, Targets

__all__ = ["TextCollator"]


class TextCollator:
    """The built collator.

    Args:
        pad_token_id: fills the padding segment; any id of the vocabulary will do.
        pad_to_multiple_of: the row's length becomes a multiple of this.
        loss_reduction: `token`, `sample` or `square`.
    """

    def __init__(
        self, *, pad_token_id: int, pad_to_multiple_of: int = 1, loss_reduction: str = "token"
    ) -> None:
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of
        self.loss_reduction = loss_reduction

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """One micro-batch; no examples make a filler: padding alone, no targets, no tokens counted.

        Raises:
            DataError: an example holds media, is empty, or its mask has another length than its
                ids.
        """
        for example in examples:
            _check(example)
        lengths_S = np.array([len(example.input_ids) for example in examples], dtype=np.int64)
        num_tokens = int(lengths_S.sum())
        pad = -num_tokens % self.pad_to_multiple_of if examples else self.pad_to_multiple_of
        segments = np.append(lengths_S, pad) if pad else lengths_S
        ends = np.cumsum(segments)
        starts = ends - segments
        padding = np.full(pad, self.pad_token_id, dtype=np.int64)
        ids_T = np.concatenate([*(example.input_ids for example in examples), padding]).astype(
            np.int64
        )
        positions_T = np.arange(len(ids_T), dtype=np.int64) - np.repeat(starts, segments)
        return Batch(
            input_ids_T=torch.from_numpy(ids_T),
            position_ids_T=torch.from_numpy(positions_T),
            cu_seqlens=torch.from_numpy(np.append(0, ends).astype(np.int32)),
            max_seqlen=int(segments.max()),
            targets=self._targets(examples, ids_T, lengths_S),
            num_tokens=num_tokens,
            keys=tuple(example.key for example in examples if example.key is not None),
        )

    def _targets(
        self, examples: Sequence[Example], ids_T: np.ndarray, lengths_S: np.ndarray
    ) -> Targets:
        num_tokens = int(lengths_S.sum())
        ends_S = np.cumsum(lengths_S)
        # What a position predicts stands one place further on; of a sample's last, only behind a cut.
        predicts = np.zeros(num_tokens, dtype=np.bool_)
        labels = np.empty(num_tokens, dtype=np.int64)
        if examples:
            predicts[:-1] = np.concatenate([example.loss_mask for example in examples])[1:]
            labels[:-1] = ids_T[1:num_tokens]
            next_ids = [-1 if example.next_id is None else example.next_id for example in examples]
            labels[ends_S - 1] = next_ids
            predicts[ends_S - 1] = labels[ends_S - 1] >= 0
        positions_K = np.flatnonzero(predicts)
        sample_K = np.repeat(np.arange(len(examples)), lengths_S)[positions_K]
        sources = np.array([example.source_id for example in examples], dtype=np.int64)
        num_K = np.bincount(sample_K, minlength=1)[sample_K].astype(np.float64)
        power = {"token": 0.0, "square": -0.5, "sample": -1.0}[self.loss_reduction]
        return Targets(
            positions_K=torch.from_numpy(positions_K),
            labels_K=torch.from_numpy(labels[positions_K]),
            weights_K=torch.from_numpy((num_K**power).astype(np.float32)),
            source_ids_K=torch.from_numpy(sources[sample_K]),
            scale=1.0,
        )


def _check(example: Example) -> None:
    place = f"{example.key}" if example.key is not None else "example"
    if example.media:
        found = ", ".join(sorted(example.media))
        raise DataError(
            f"{place}: holds media ({found}), which SFTLLMCollator can't batch; "
            "use a vision collator"
        )
    if len(example.input_ids) == 0 or len(example.input_ids) != len(example.loss_mask):
        raise DataError(
            f"{place}: {len(example.input_ids)} ids and {len(example.loss_mask)} mask values, "
            "expected as many of both, and at least one"
        )
