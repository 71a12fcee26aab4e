"""The claim: on a CUDA device the same config runs as its user would start it: through NCCL, FSDP2 and torch's own
kernels; it learns, resumes, and its losses in float32 are those of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import read_metrics, run_alone, torchrun

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MOE: dict[str, Any] = {
    "class_name": "Qwen3MoE",
    "hidden_size": 64,
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}


@pytest.mark.parametrize("model", [{}, MOE], ids=["dense", "experts"])
def test_losses_in_float32_are_those_of_the_cpu(
    model: dict[str, Any],
    make_config: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes: dict[str, Any] = {"model": model, "precision": {"compute_dtype": "float32"}}
    runs = {}
    for name, visible in (("gpu", None), ("cpu", "")):
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        result = run_alone(str(make_config(name, **changes)))
        assert result.returncode == 0, result.stderr[-5000:]
        runs[name] = read_metrics(tmp_path / name / "run")
    for one, two in zip(runs["gpu"], runs["cpu"], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-2)


@pytest.mark.parametrize("model", [{}, MOE], ids=["dense", "experts"])
def test_a_run_in_bfloat16_learns_resumes_and_its_export_opens(
    model: dict[str, Any], make_config: Callable[..., Path], tmp_path: Path
) -> None:
    savers = [{"class_name": "CheckpointSaver", "every_steps": 10}, {"class_name": "HFSaver"}]
    config = str(make_config(model=model, savers=savers, epoch_num=20))
    result = torchrun(1, "core/run.py", config)
    assert result.returncode == 0, result.stderr[-5000:]
    if model:
        assert "experts in bfloat16 on cuda: torch.nn.functional.grouped_mm" in result.stderr
    result = torchrun(1, "core/run.py", config, "--set", "epoch_num=30", "--resume")
    assert result.returncode == 0, result.stderr[-5000:]
    metrics = read_metrics(tmp_path / "a" / "run")
    assert [m["step"] for m in metrics] == list(range(1, 31))
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 1.0
    assert all(m["bad_steps"] == 0 for m in metrics)

    from transformers import AutoModelForCausalLM

    opened: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "a" / "run" / "export", output_loading_info=True, dtype=torch.float32
    )
    _, report = opened
    assert not report["missing_keys"] and not report["unexpected_keys"]
