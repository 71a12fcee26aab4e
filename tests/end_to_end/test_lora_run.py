"""The claim: a LoRA run starts from a folder, moves only the adapter, does the same on two ranks as on one, resumes,
and leaves an adapter beside a merged export that is the base plus what was learnt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launching import drive, read_metrics, run_alone
from safetensors import safe_open
from safetensors.torch import load_file

MakeConfig = Callable[..., Path]


@pytest.mark.slow
def test_an_adapter_is_trained_saved_merged_and_resumed(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    assert run_alone(str(make_config("base"))).returncode == 0
    base = tmp_path / "base" / "run" / "export"
    changes = {
        "load_from": str(base),
        "transforms": [{"class_name": "LoRA", "rank": 4}],
        "savers": [
            {"class_name": "CheckpointSaver", "every_steps": 3},
            {"class_name": "AdapterSaver"},
            {"class_name": "HFSaver", "dtype": "float32"},
        ],
    }
    drive(1, [make_config("one", **changes)])
    drive(2, [make_config("two", **changes)])
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    first, second = read_metrics(one), read_metrics(two)
    assert first[-1]["loss"] < first[0]["loss"]
    for ours, theirs in zip(first, second, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-6)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, one / "export"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed and all("_proj.weight" in name for name in changed)

    adapter = load_file(one / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.v_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    change = after[f"{name}.weight"] - before[f"{name}.weight"]
    assert (change - 32 / 4 * b @ a).abs().max() < 1e-6

    narrow = {
        **changes,
        "precision": {"compute_dtype": "bfloat16"},
        "total_steps": 1,
        "epoch_num": None,
    }
    drive(2, [make_config("narrow", **narrow)])
    held = dict[str, torch.dtype]()
    for file in (tmp_path / "narrow" / "run" / "checkpoints").rglob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            held |= {key: opened.get_tensor(key).dtype for key in opened.keys()}  # noqa: SIM118
    weights = {key: dtype for key, dtype in held.items() if key.startswith("model.")}
    factors = {key for key in weights if ".lora." in key}
    assert factors and all(weights[key] == torch.float32 for key in factors)
    assert all(weights[key] == torch.bfloat16 for key in weights.keys() - factors)

    again = make_config("one", **changes, total_steps=8, epoch_num=None)
    result = run_alone(str(again), "--resume")
    assert result.returncode == 0, result.stderr[-3000:]
    assert [line["step"] for line in read_metrics(one)] == list(range(1, 9))

    continued = make_config(
        "continued",
        load_from=str(base),
        transforms=[{"class_name": "LoRA", "rank": 4, "load_adapter": str(two / "adapter")}],
        total_steps=1,
        epoch_num=None,
    )
    assert run_alone(str(continued)).returncode == 0
    start = read_metrics(tmp_path / "continued" / "run")[0]["loss"]
    assert start < second[-1]["loss"] + 0.05
