"""The claim: the tiny configs of both families are the same job, and InternVL's trains on records in LLaVA's form into
a folder that transformers opens with nothing missing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT, environment_of_a_run, read_metrics
from PIL import Image

from pegboard.plugin_manager import load_plugins
from pegboard.run_config import load_run_config

PICTURES = "work_dirs/quickstart_vlm_data"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configs, and data where they say it is: pictures listed beside ShareGPT turns."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    data = tmp_path / PICTURES
    data.mkdir(parents=True)
    lines = []
    for number in range(60):
        Image.new("RGB", (48 * (1 + number % 3), 48), (4 * number, 90, 0)).save(
            data / f"{number}.png"
        )
        turns = [
            {"from": "human", "value": f"<image>\nWhich one is it, {number % 7}?"},
            {"from": "gpt", "value": f"number {number}"},
        ]
        lines.append(json.dumps({"image": f"{number}.png", "conversations": turns}))
    (data / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_both_families_have_the_same_tiny_job(folder: Path) -> None:
    registry = load_plugins(third_party=False).registry
    one, other = (
        load_run_config(folder / "configs" / "tiny" / f"{name}.json", (), registry).run
        for name in ("intern_s1", "intern_vl")
    )
    names = [type(run.model).__name__ for run in (one, other)]
    assert names == ["InternS1", "InternVL"]
    assert one.model.image_tokens() == other.model.image_tokens()
    jobs = [run.model_dump(exclude={"model", "work_dir"}, mode="json") for run in (one, other)]
    assert jobs[0] == jobs[1]


@pytest.mark.slow
def test_internvls_trains_and_its_export_opens_in_transformers(folder: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    words = ["total_steps=3", "run_name=run", "datasets[1].dataset.sample_ratio=2.0"]
    words += ["datasets[1].tokenize_fn.data_augment=true", "model.freeze_projector=false"]
    changes = [word for item in words for word in ("--set", item)]
    result = subprocess.run(
        [sys.executable, str(ROOT / "core" / "run.py"), "configs/tiny/intern_vl.json", *changes],
        cwd=folder,
        env=environment_of_a_run(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    run = folder / "work_dirs" / "tiny_intern_vl" / "run"
    metrics = read_metrics(run)
    assert len(metrics) == 3 and sum(line["tiles"] for line in metrics) > 0
    assert {"loss/pure_text", "loss/media"} <= {name for line in metrics for name in line}
    _, loading = transformers.InternVLForConditionalGeneration.from_pretrained(
        run / "export", output_loading_info=True
    )
    assert not any(loading.values()), loading
