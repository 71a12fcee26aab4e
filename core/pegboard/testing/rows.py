"""Packed rows and built models for the checks.

T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from pegboard.component import ModelComponent
from pegboard.contracts import Batch, BuiltModel, Example, SampleKey, Targets
from pegboard.initialization import init_module_weights

__all__ = ["build_on_cpu", "make_examples", "make_row"]


def make_examples(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[Example]:
    """Random examples; all but the first token of each have loss."""
    draw = np.random.default_rng(seed)
    examples = []
    for number, length in enumerate(lengths):
        ids = draw.integers(0, vocab_size, length, dtype=np.int32)
        mask = np.ones(length, dtype=np.bool_)
        mask[0] = False
        key = SampleKey("check", "memory", number + 1)
        examples.append(Example(input_ids=ids, loss_mask=mask, key=key, source_id=number % 2))
    return examples


def make_row(examples: Sequence[Example], scale: float) -> Batch:
    """One packed row, made here and not by a collator."""
    ids = np.concatenate([example.input_ids for example in examples])
    lengths = [len(example.input_ids) for example in examples]
    starts = np.cumsum([0, *lengths])
    positions, labels, sources = [], [], []
    for example, start in zip(examples, starts, strict=False):
        for index in range(1, len(example.input_ids)):
            if example.loss_mask[index]:
                positions.append(start + index - 1)
                labels.append(example.input_ids[index])
                sources.append(example.source_id)
    return Batch(
        input_ids_T=torch.from_numpy(ids.astype(np.int64)),
        position_ids_T=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        max_seqlen=max(lengths),
        targets=Targets(
            torch.tensor(positions, dtype=torch.int64),
            torch.tensor(labels, dtype=torch.int64),
            torch.ones(len(positions)),
            torch.tensor(sources, dtype=torch.int64),
            scale,
        ),
        num_tokens=len(ids),
        keys=tuple(example.key for example in examples if example.key is not None),
        scales={"targets": scale},
    )


def build_on_cpu(
    model: ModelComponent, *, seed: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[BuiltModel, nn.Module]:
    """Built on meta, allocated with garbage in every tensor, initialised: as the trainer does it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            built = model.build()
    finally:
        torch.set_default_dtype(before)
    return built, fill(built, seed)


def fill(built: BuiltModel, seed: int) -> nn.Module:
    """Allocate what is on meta; every float that nobody fills is NaN."""
    module = built.module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
    init_module_weights(module, seed=seed)
    return module
