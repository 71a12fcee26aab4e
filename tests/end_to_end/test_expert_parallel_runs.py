"""The claim: whole runs of a mixture-of-experts model give the same losses and weights however many ranks share its
experts; on real questions with the genuine tokenizer too, and the export opens in transformers with every key."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import ROOT, drive, read_metrics, tiny_config, torchrun, write_config
from test_invariance import compare

ASSETS = ROOT.parent / "shared" / "assets"
MODEL = {
    "class_name": "Qwen3MoE",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}
SHARED: dict[str, dict[str, Any]] = {
    "four": {"expert_parallel_size": 1},
    "ep_2": {"expert_parallel_size": 2},
    "ep_4": {"expert_parallel_size": 4},
    "ep_2_x2": {"expert_parallel_size": 2, "replicate_size": 2},
    "ep_4_each": {"expert_parallel_size": 4, "gradient_reduction": "per_micro_batch"},
    "ep_2_recomputed": {"expert_parallel_size": 2},
    "ep_2_longer_packs": {"expert_parallel_size": 2},
    "ep_4_fillers": {"expert_parallel_size": 4},
}
# All chats in each step, cut otherwise: 4 micro-batches a rank, else 2, else 1, and fillers.
CUTS: dict[str, dict[str, Any]] = {
    "ep_2_longer_packs": {"dataloader": {"pack_max_length": 512}, "global_batch_size": 8},
    "ep_4_fillers": {"dataloader": {"pack_max_length": 2048}, "global_batch_size": 4},
}


def changes_of(name: str) -> dict[str, Any]:
    changes: dict[str, Any] = {
        "model": MODEL,
        "parallel": {"class_name": "FSDP2", **SHARED.get(name, {})},
        **CUTS.get(name, {}),
    }
    if "recomputed" in name:
        changes["activation_checkpointing"] = {"mode": "full"}
    return changes


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_how_many_ranks_share_the_experts_changes_only_rounding(
    make_config: Callable[..., Path], tmp_path: Path, dtype: str
) -> None:
    precision = {"precision": {"compute_dtype": dtype}}
    drive(1, [make_config("base", **changes_of("base"), **precision)])
    drive(4, [make_config(name, **changes_of(name), **precision) for name in SHARED])
    # The export is float32, so the weights say no more than that.
    relative, weights = (2e-6, 5e-5) if dtype == "float32" else (1e-12, 1e-7)
    for name in SHARED:
        compare(tmp_path / "base" / "run", tmp_path / name / "run", relative, weights)


@pytest.mark.slow
def test_frozen_experts_are_shared_under_an_adapter_too(
    make_config: Callable[..., Path], tmp_path: Path
) -> None:
    layers = ["q_proj", "k_proj", "v_proj", "o_proj"]
    changes = {
        "model": {**MODEL, "freeze_router": True},
        "transforms": [{"class_name": "LoRA", "rank": 4, "target_modules": layers}],
        "activation_checkpointing": {"mode": "full"},
        "optimizer": {"class_name": "AdamW", "lr": 1e-2},
    }
    drive(1, [make_config("base", **changes)])
    shared = {"class_name": "FSDP2", "expert_parallel_size": 2}
    drive(4, [make_config("ep_2", **changes, parallel=shared)])
    compare(tmp_path / "base" / "run", tmp_path / "ep_2" / "run")


@pytest.mark.slow
def test_a_run_of_ep_4_goes_on_at_ep_2_and_alone(
    make_config: Callable[..., Path], tmp_path: Path
) -> None:
    savers = [
        {"class_name": "CheckpointSaver", "every_steps": 3},
        {"class_name": "HFSaver", "dtype": "float32"},
    ]
    config = make_config("whole", **changes_of("ep_4"), savers=savers)
    result = torchrun(4, "core/run.py", str(config))
    assert result.returncode == 0, result.stderr[-5000:]
    whole = tmp_path / "whole" / "run"
    for name, ranks, size in (("ep_2", 4, 2), ("alone", 1, 1)):
        shutil.copytree(whole, tmp_path / name / "run")
        shutil.rmtree(tmp_path / name / "run" / "checkpoints" / "step_00000005")
        (tmp_path / name / "run" / "metrics.jsonl").unlink()
        words = ["--set", f"work_dir={tmp_path / name}"]
        words += ["--set", f"parallel.expert_parallel_size={size}", "--resume"]
        result = torchrun(ranks, "core/run.py", str(config), *words)
        assert result.returncode == 0, result.stderr[-5000:]
        resumed = read_metrics(tmp_path / name / "run")
        for one, two in zip(read_metrics(whole)[3:], resumed, strict=True):
            for number in ("step", "loss", "grad_norm", "balancing_loss"):
                assert one[number] == pytest.approx(two[number], rel=2e-6), (name, number)


@pytest.mark.slow
@pytest.mark.skipif(
    not ASSETS.is_dir(), reason="needs the genuine tokenizer and GSM8K beside the checkout"
)
def test_gsm8k_at_full_vocabulary_learns_the_same_with_shared_experts(tmp_path: Path) -> None:
    paths = []
    for size in (1, 2):
        config = tiny_config(
            tmp_path / f"ep_{size}",
            ASSETS / "text" / "gsm8k_train_messages.jsonl",
            tokenizer={"class_name": "HFTokenizer", "path": str(ASSETS / "qwen3_tokenizer")},
            model={
                **MODEL,
                "vocab_size": 151_936,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "num_experts": 16,
                "num_experts_per_tok": 4,
                "moe_intermediate_size": 32,
            },
            dataloader={"pack_max_length": 512},
            optimizer={"class_name": "AdamW", "lr": 5e-3},
            lr_schedule={"class_name": "CosineSchedule", "warmup_ratio": 0.05},
            parallel={"class_name": "FSDP2", "expert_parallel_size": size},
            global_batch_size=2,
            epoch_num=None,
            total_steps=50,
        )
        config["datasets"][0]["tokenize_fn"]["max_length"] = 512
        paths.append(write_config(tmp_path / f"ep_{size}.json", config))
    drive(2, paths, timeout_s=900)
    one, two = (read_metrics(tmp_path / f"ep_{size}" / "run") for size in (1, 2))
    assert len(one) == len(two) == 50
    for step in range(20):
        assert two[step]["loss"] == pytest.approx(one[step]["loss"], rel=1e-5), step
    ends = [sum(m["loss"] for m in metrics[-5:]) / 5 for metrics in (one, two)]
    assert ends[1] == pytest.approx(ends[0], rel=1e-2)
    assert ends[0] < one[0]["loss"] - 3.0

    from transformers import AutoModelForCausalLM, AutoTokenizer

    export = tmp_path / "ep_2" / "run" / "export"
    opened: Any = AutoModelForCausalLM.from_pretrained(
        export, output_loading_info=True, dtype=torch.float32
    )
    model, report = opened
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = AutoTokenizer.from_pretrained(export)("How many apples?", return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        assert torch.isfinite(model(ids).logits).all()
