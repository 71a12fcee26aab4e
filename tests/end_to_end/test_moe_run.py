"""The claim: a mixture-of-experts run learns, reports and draws its load, resumes exactly, exports
what transformers opens; and the auxiliary losses' exact modes do not change with ranks, packs or
accumulation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import drive, read_metrics, run_alone
from safetensors.torch import load_file

MODEL: dict[str, Any] = {
    "class_name": "Qwen3MoE",
    "moe_intermediate_size": 16,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [0],
    "num_hidden_layers": 3,
    "router_aux_loss_coef": 0.05,
    "router_z_loss_coef": 0.01,
}
MODES = ("lagged", "two_pass", "per_sequence")


def changes(mode: str = "lagged", **more: Any) -> dict[str, Any]:
    model = {**MODEL, "balancing": mode, **more.pop("model", {})}
    # Four micro-batches hold all samples.
    dataloader = {"pack_max_length": 512, **more.pop("dataloader", {})}
    return {"model": model, "dataloader": dataloader, "global_batch_size": 4, **more}


def compare(base: Path, other: Path, relative: float, weights: float) -> None:
    first, second = read_metrics(base), read_metrics(other)
    assert len(first) == len(second) == 5
    names = ("loss", "grad_norm", "balancing_loss", "z_loss", "experts/balancing")
    for one, two in zip(first, second, strict=True):
        for name in names:
            assert one[name] == pytest.approx(two[name], rel=relative, abs=1e-30), (other, name)
        for name in ("tokens", "experts/idle", "experts/max_violation/layer_2"):
            assert one[name] == two[name], name
    ours = load_file(base / "export" / "model.safetensors")
    theirs = load_file(other / "export" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() <= weights, (other, name)


DOUBLE: dict[str, Any] = {"precision": {"compute_dtype": "float64"}}
# Four micro-batches of some samples, or one with all of them and three fillers.
LONG_PACKS: dict[str, Any] = {"dataloader": {"pack_max_length": 2048}}


@pytest.mark.parametrize(
    "modes", [("lagged", "two_pass"), pytest.param(("per_sequence",), marks=pytest.mark.slow)]
)
def test_packs_accumulation_and_ranks_change_only_rounding(
    modes: tuple[str, ...], make_config: Callable[..., Path], tmp_path: Path
) -> None:
    alone = []
    for mode in modes:
        alone.append(make_config(f"{mode}_base", **changes(mode, **DOUBLE)))
        alone.append(make_config(f"{mode}_long", **changes(mode, **DOUBLE, **LONG_PACKS)))
    drive(1, alone)
    drive(2, [make_config(f"{mode}_ranks", **changes(mode, **DOUBLE)) for mode in modes])
    for mode in modes:
        for other in ("long", "ranks"):
            compare_in_float64(
                tmp_path / f"{mode}_base" / "run", tmp_path / f"{mode}_{other}" / "run"
            )


@pytest.mark.slow
def test_recomputing_and_reducing_change_only_rounding(
    make_config: Callable[..., Path], tmp_path: Path
) -> None:
    cuts: dict[str, dict[str, Any]] = {
        "base": {},
        "checkpointed": {"activation_checkpointing": {"mode": "full"}},
        "each": {"parallel": {"class_name": "FSDP2", "gradient_reduction": "per_micro_batch"}},
    }
    drive(1, [make_config(name, **changes(**DOUBLE, **cut)) for name, cut in cuts.items()])
    for name in cuts:
        compare_in_float64(tmp_path / "base" / "run", tmp_path / name / "run")


def compare_in_float64(base: Path, other: Path) -> None:
    # Statistics of the load are float32, and so is the export.
    compare(base, other, relative=1e-7, weights=1e-7)
    for one, two in zip(read_metrics(base), read_metrics(other), strict=True):
        for name in ("loss", "grad_norm"):
            assert one[name] == pytest.approx(two[name], rel=1e-12), (other, name)


@pytest.mark.slow
def test_in_float32_too_ranks_and_accumulation_change_only_rounding(
    make_config: Callable[..., Path], tmp_path: Path
) -> None:
    drive(1, [make_config(f"{mode}_base", **changes(mode)) for mode in MODES])
    drive(2, [make_config(f"{mode}_ranks", **changes(mode)) for mode in MODES])
    for mode in MODES:
        base = tmp_path / f"{mode}_base" / "run"
        compare(base, tmp_path / f"{mode}_ranks" / "run", relative=2e-6, weights=5e-5)


def test_a_run_learns_draws_its_load_resumes_exactly_and_opens_in_transformers(
    make_config: Callable[..., Path], tmp_path: Path
) -> None:
    more: dict[str, Any] = {
        "savers": [
            {"class_name": "CheckpointSaver", "every_steps": 4},
            {"class_name": "HFSaver", "dtype": "float32"},
        ],
        "trackers": [{"class_name": "ExpertLoadTracker"}],
        "epoch_num": 8,
        "lr_schedule": {"class_name": "ConstantSchedule"},
    }
    whole, cut = make_config("whole", **changes(**more)), make_config("cut", **changes(**more))
    result = run_alone("train", str(whole))
    assert result.returncode == 0, result.stderr[-5000:]
    # The loop over experts is not silent; float32 on the CPU has a kernel.
    assert "experts in float32 on cpu: torch.nn.functional.grouped_mm" in result.stderr
    metrics = read_metrics(tmp_path / "whole" / "run")
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.5
    assert metrics[0]["balancing_loss"] == 0.0 < metrics[1]["balancing_loss"]
    assert "expert_load.html" in {p.name for p in (tmp_path / "whole" / "run").iterdir()}

    first = run_alone("train", str(cut), "--set", "epoch_num=4")
    assert first.returncode == 0, first.stderr[-5000:]
    second = run_alone("train", str(cut), "--resume")
    assert second.returncode == 0, second.stderr[-5000:]
    resumed = read_metrics(tmp_path / "cut" / "run")
    assert [line["step"] for line in resumed] == [1, 2, 3, 4, 5, 6, 7, 8]
    for name in ("loss", "grad_norm", "balancing_loss", "experts/entropy"):
        assert [line[name] for line in resumed] == [line[name] for line in metrics]

    from transformers import AutoModelForCausalLM

    opened: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole" / "run" / "export", output_loading_info=True, dtype=torch.float32
    )
    _, report = opened
    assert not report["missing_keys"] and not report["unexpected_keys"]
