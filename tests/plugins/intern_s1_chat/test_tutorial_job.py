"""The claim: the tutorial's job, field for field, is a config that validates, and its pages exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pegboard.plugin_manager import load_plugins
from pegboard.run_config import load_run_config

ROOT = Path(__file__).resolve().parents[3]
JOB = ROOT / "configs" / "intern_s1_mini_sft.json"


@pytest.fixture
def job() -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(JOB.read_text(encoding="utf-8"))
    return fields


def test_it_is_the_tutorials_job(job: dict[str, Any]) -> None:
    model, loader = job["model"], job["dataloader"]
    assert (model["class_name"], model["text_config"]["preset"]) == ("InternS1", "qwen3-8b")
    assert model["freeze_vision"] and model["freeze_projector"]
    assert not model.get("freeze_language", False)
    kinds = [(e["dataset"]["class_name"], e["tokenize_fn"]["class_name"]) for e in job["datasets"]]
    assert kinds == [("VLMJsonlDataset", "InternS1TokenizeFn")] * 2
    ratios = {e["dataset"]["name"]: e["dataset"]["sample_ratio"] for e in job["datasets"]}
    assert ratios == {"pure_text": 2.0, "media": 10.0}
    assert [e["tokenize_fn"]["max_length"] for e in job["datasets"]] == [8192, 8192]
    assert loader["pack_max_length"] == 16384
    assert loader["packer"]["class_name"] == "ExpandSoftPacker"
    assert loader["collator"]["class_name"] == "SFTVLMCollator"
    assert job["loss"]["class_name"] == "ChunkedCrossEntropy"
    assert (job["optimizer"]["class_name"], job["optimizer"]["lr"]) == ("AdamW", 1e-6)
    assert job["lr_schedule"] == {
        "class_name": "CosineSchedule",
        "warmup_ratio": 0.0,
        "min_lr": 0.0,
    }
    assert (job["global_batch_size"], job["epoch_num"], job["max_grad_norm"]) == (8, 1, 1.0)


def test_it_validates_where_its_data_is(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data" / "media").mkdir(parents=True)
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    for name in ("text.jsonl", "media/a.jsonl"):
        (tmp_path / "data" / name).write_text(json.dumps(record) + "\n")
    (tmp_path / "job.json").write_text(json.dumps(job))
    monkeypatch.chdir(tmp_path)
    run = load_run_config(tmp_path / "job.json", (), load_plugins(third_party=False).registry).run
    tokens = run.model.image_tokens()
    assert tokens is not None and tuple(tokens) == (448, 256, 152957)
    assert type(run.datasets[0].tokenize_fn.config.chat).__name__ == "ChatTokenizeFn"


def test_the_pages_name_the_same_commands_in_both_languages() -> None:
    pages = [ROOT / "docs" / "intern_s1.md", ROOT / "docs" / "zh" / "intern_s1.md"]
    commands = [
        [
            line
            for line in page.read_text(encoding="utf-8").splitlines()
            if line.startswith(("python ", "torchrun ", "pegboard "))
        ]
        for page in pages
    ]
    assert commands[0] == commands[1] and len(commands[0]) >= 4
