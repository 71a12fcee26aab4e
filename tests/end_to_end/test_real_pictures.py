"""The claim: GSM8K and real photographs in one run, with the genuine tokenizer at Intern-S1's ids, on two ranks:
the loss of both sources falls, and decoding pictures keeps nobody waiting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from intern_s1_tokenizer import save_intern_s1_tokenizer
from launching import ROOT, read_metrics, torchrun, write_config

ASSETS = ROOT.parent / "shared" / "assets"
NUM_STEPS = 16


@pytest.mark.slow
@pytest.mark.skipif(
    not ASSETS.is_dir(), reason="needs tokenizer, GSM8K and pictures beside the checkout"
)
def test_text_and_photographs_train_together_and_data_is_never_waited_for(tmp_path: Path) -> None:
    save_intern_s1_tokenizer(ASSETS / "qwen3_tokenizer", tmp_path / "tokenizer")
    tokenize_fn = {"class_name": "InternS1TokenizeFn", "max_length": 4096}
    text, pictures = (
        {"class_name": "VLMJsonlDataset", "name": name, "anno_path": str(ASSETS / path), **more}
        for name, path, more in (
            ("pure_text", "text/gsm8k_train_messages.jsonl", {"max_records": 300}),
            ("media", "skimage_messages.jsonl", {"media_root": str(ASSETS)}),
        )
    )
    config = {
        "work_dir": str(tmp_path / "work"),
        "run_name": "run",
        "seed": 3,
        "tokenizer": {"class_name": "HFTokenizer", "path": str(tmp_path / "tokenizer")},
        "model": {
            "class_name": "InternS1",
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
            },
            "text_config": {
                "class_name": "Qwen3",
                "vocab_size": 153216,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
            },
        },
        "datasets": [
            {"dataset": {**text, "sample_ratio": 2.0}, "tokenize_fn": tokenize_fn},
            {"dataset": {**pictures, "sample_ratio": 10.0}, "tokenize_fn": tokenize_fn},
        ],
        "dataloader": {"pack_max_length": 4096, "num_workers": 2},
        "optimizer": {"class_name": "AdamW", "lr": 5e-3},
        "global_batch_size": 2,
        "total_steps": NUM_STEPS,
        "savers": [],
    }
    path = write_config(tmp_path / "pictures.json", config)
    result = torchrun(2, "core/run.py", str(path), timeout_s=1500)
    assert result.returncode == 0, result.stderr[-5000:]
    metrics = read_metrics(tmp_path / "work" / "run")
    assert len(metrics) == NUM_STEPS
    for name in ("loss", "loss/pure_text", "loss/media"):
        values = [step[name] for step in metrics if name in step]
        assert len(values) > NUM_STEPS // 2, name
        assert sum(values[-3:]) / 3 < values[0] - 1.5, (name, values)
    # The first steps start the workers.
    waited = sum(step["data_wait_s"] for step in metrics[2:])
    taken = sum(step["step_s"] for step in metrics[2:])
    print(json.dumps({"data wait": waited / taken, "step_s": taken / len(metrics[2:])}))
    assert waited < 0.02 * taken
    assert all(step["skipped_samples"] == 0 for step in metrics)
