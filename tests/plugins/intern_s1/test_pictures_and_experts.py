"""Claim: a vision-language model over a mixture of experts gives the same losses and gradient norms in float64 where
ranks share the experts, with ranks that have no picture, and with the text frozen."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from launching import read_metrics, torchrun, write_config

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
pictures: Any = import_module("test_pictures_on_ranks")

CASES = ("all", "text_frozen")
EXPERTS = {
    "class_name": "Qwen3MoE",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}


def train(folder: Path, num_ranks: int, expert_parallel_size: int) -> Path:
    folder.mkdir()
    paths = []
    for case in CASES:
        path = pictures.config_of(folder, case)
        config = json.loads(path.read_text(encoding="utf-8"))
        config["model"]["text_config"].update(EXPERTS)
        config["precision"] = {"compute_dtype": "float64"}
        config["parallel"]["expert_parallel_size"] = expert_parallel_size
        config["epoch_num"] = 1
        config["savers"] = []
        paths.append(str(write_config(path, config)))
    script = HERE / "drive_pictures.py"
    result = torchrun(num_ranks, str(script), *paths, timeout_s=500)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return folder


@pytest.mark.slow
def test_sharing_experts_changes_only_rounding_with_pictures_too(tmp_path: Path) -> None:
    alone, shared = train(tmp_path / "alone", 1, 1), train(tmp_path / "shared", 4, 2)
    for case in CASES:
        one, two = (read_metrics(folder / case / "run") for folder in (alone, shared))
        assert len(one) == len(two) == len(pictures.ROUND)
        for a, b in zip(one, two, strict=True):
            for name in ("loss", "grad_norm"):
                assert a[name] == pytest.approx(b[name], rel=1e-11), (case, name, a["step"])
