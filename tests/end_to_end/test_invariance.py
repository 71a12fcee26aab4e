"""The claim: how a step's samples are spread over ranks, micro-batches, packs and chunks, and what is recomputed
or when gradients are reduced, changes nothing but rounding: loss and gradient norm of five steps agree to 2e-6,
weights to 5e-5 in fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import drive, read_metrics
from safetensors.torch import load_file

ALONE: dict[str, dict[str, Any]] = {
    "base": {},
    "small_packs": {"dataloader": {"pack_max_length": 256, "packer": {"class_name": "SoftPacker"}}},
    "accumulated_1": {"dataloader": {"pack_max_length": 2048}, "global_batch_size": 1},
    "accumulated_2": {"dataloader": {"pack_max_length": 1024}, "global_batch_size": 2},
    "accumulated_4": {"dataloader": {"pack_max_length": 512}, "global_batch_size": 4},
    "checkpointed": {"activation_checkpointing": {"mode": "full"}},
    "half_checkpointed": {"activation_checkpointing": {"mode": "ratio", "ratio": 0.5}},
    "chunk_1": {"loss": {"class_name": "ChunkedCrossEntropy", "chunk_size": 1}},
    "chunk_7": {"loss": {"class_name": "ChunkedCrossEntropy", "chunk_size": 7}},
    "reference_loss": {"loss": {"class_name": "CrossEntropy"}},
    "each_micro_batch": {
        "parallel": {"class_name": "FSDP2", "gradient_reduction": "per_micro_batch"}
    },
}
TOGETHER: dict[str, dict[str, Any]] = {
    "ranks": {},
    "ranks_each": {"parallel": {"class_name": "FSDP2", "gradient_reduction": "per_micro_batch"}},
    "ranks_replicated": {"parallel": {"class_name": "FSDP2", "replicate_size": 2}},
    "ranks_checkpointed": {"activation_checkpointing": {"mode": "full"}},
}


def compare(base: Path, other: Path, relative: float = 2e-6, weights: float = 5e-5) -> None:
    first, second = read_metrics(base), read_metrics(other)
    assert len(first) == len(second) == 5
    for one, two in zip(first, second, strict=True):
        for name in ("loss", "grad_norm", "loss/chats"):
            assert one[name] == pytest.approx(two[name], rel=relative), (other, name)
        for name in ("tokens", "targets", "samples"):
            assert one[name] == two[name]
    ours = load_file(base / "export" / "model.safetensors")
    theirs = load_file(other / "export" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() <= weights, (other, name)


def test_packing_chunking_recomputing_and_reducing_change_only_rounding(
    make_config: Callable[..., Path], tmp_path: Path
) -> None:
    configs = [make_config(name, **changes) for name, changes in ALONE.items()]
    drive(1, configs)
    for name in ALONE:
        compare(tmp_path / "base" / "run", tmp_path / name / "run")


def test_the_number_of_ranks_changes_only_rounding(
    make_config: Callable[..., Path], tmp_path: Path
) -> None:
    drive(1, [make_config("base")])
    drive(2, [make_config(name, **changes) for name, changes in TOGETHER.items()])
    for name in TOGETHER:
        compare(tmp_path / "base" / "run", tmp_path / name / "run")


@pytest.mark.slow
def test_four_ranks_and_float64_agree_to_twelve_digits(
    make_config: Callable[..., Path], tmp_path: Path
) -> None:
    double = {"precision": {"compute_dtype": "float64"}}
    drive(
        1,
        [
            make_config("base", **double),
            make_config("untied", model={"tie_word_embeddings": False}),
        ],
    )
    drive(
        4,
        [
            make_config("four", **double),
            make_config("four_untied", model={"tie_word_embeddings": False}),
        ],
    )
    # The export is float32, so the weights say no more than that.
    compare(tmp_path / "base" / "run", tmp_path / "four" / "run", relative=1e-12, weights=1e-7)
    compare(tmp_path / "untied" / "run", tmp_path / "four_untied" / "run")
