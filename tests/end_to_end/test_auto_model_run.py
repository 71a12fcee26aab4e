"""The claim: a Llama that only transformers knows trains like any model: sharded by its layers, with activations
recomputed or not, the same on two ranks as on one, from its own export on, and with LoRA."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import drive, read_metrics
from safetensors.torch import load_file

MODEL = {
    "class_name": "AutoModelForCausalLM",
    "hf_config": {
        "model_type": "llama",
        "vocab_size": 288,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
    },
}


@pytest.mark.slow
def test_a_llama_of_transformers_trains_on_ranks_and_from_its_export(
    make_config: Callable[..., Path], tmp_path: Path
) -> None:
    def config(name: str, **changes: object) -> Path:
        path = make_config(name, **changes)
        content = json.loads(path.read_text(encoding="utf-8"))
        content["model"] = MODEL
        if "load_from" in changes:
            content["model"] = {"class_name": "AutoModelForCausalLM"}
        path.write_text(json.dumps(content), encoding="utf-8")
        return path

    full = {"activation_checkpointing": {"mode": "full"}}
    drive(1, [config("one"), config("recomputed", **full)])
    export = tmp_path / "one" / "run" / "export"
    adapted = config("adapted", load_from=str(export), transforms=[{"class_name": "LoRA"}])
    drive(2, [config("two", **full), adapted])
    first = read_metrics(tmp_path / "one" / "run")
    assert first[-1]["loss"] < first[0]["loss"]
    for name in ("recomputed", "two"):
        for ours, theirs in zip(first, read_metrics(tmp_path / name / "run"), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-6), name
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-6), name
    after = read_metrics(tmp_path / "adapted" / "run")
    assert after[0]["loss"] < first[-1]["loss"] + 0.05
    before = load_file(export / "model.safetensors")
    changed = load_file(tmp_path / "adapted" / "run" / "export" / "model.safetensors")
    assert before.keys() == changed.keys()
    moved = {name for name in before if not before[name].equal(changed[name])}
    assert moved and all("_proj" in name for name in moved)
