"""The claim: one JSON config trains and leaves a folder that transformers opens and that computes our logits;
a run that is stopped goes on where it was; a mistake ends with one clear line and exit code 2."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import ROOT, environment_of_a_run, read_metrics, run_alone, torchrun


def test_two_ranks_train_and_the_export_opens_in_transformers(
    make_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = make_config(epoch_num=30)
    result = torchrun(2, "core/run.py", str(config))
    assert result.returncode == 0, result.stderr[-5000:]
    metrics = read_metrics(tmp_path / "a" / "run")
    assert len(metrics) == 30
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 1.0

    from transformers import AutoModelForCausalLM, AutoTokenizer

    export = tmp_path / "a" / "run" / "export"
    opened: Any = AutoModelForCausalLM.from_pretrained(
        export, output_loading_info=True, dtype=torch.float32
    )
    model, report = opened
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(export)
    ids = tokenizer("hello", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        theirs = model(ids).logits[0]
    torch.testing.assert_close(our_logits(export, ids[0]), theirs, atol=1e-4, rtol=1e-4)
    for name in (
        "config.json",
        "plugins.json",
        "environment.json",
        "logs/rank_0.log",
        "logs/rank_1.log",
    ):
        assert (tmp_path / "a" / "run" / name).is_file()


def our_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the folder's model through our own modules and our own loading."""
    from pegboard import Batch, Targets
    from pegboard.plugin_manager import load_plugins
    from pegboard.weight_loading import load_published_weights

    component: Any = load_plugins().registry.find("model", "Qwen3")
    fields = component.config_from_hf(json.loads((folder / "config.json").read_text()))
    config = component.Config.model_validate_json(json.dumps(fields))
    with torch.device("meta"):
        built = component(config).build()
    built.module.to_empty(device="cpu")
    load_published_weights(built.module, built.weight_map, folder)
    none = torch.zeros(0, dtype=torch.int64)
    batch = Batch(
        input_ids_T=ids,
        position_ids_T=torch.arange(len(ids)),
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        max_seqlen=len(ids),
        targets=Targets(none, none, torch.zeros(0), none, 1.0),
        num_tokens=len(ids),
    )
    with torch.no_grad():
        logits: torch.Tensor = built.module.logits(batch)
    return logits


def test_an_export_is_a_start_for_the_next_run(
    make_config: Callable[..., Path], tmp_path: Path
) -> None:
    assert run_alone(str(make_config("first"))).returncode == 0
    export = tmp_path / "first" / "run" / "export"
    last = read_metrics(tmp_path / "first" / "run")[-1]["loss"]
    config = make_config("second", load_from=str(export))
    # The sizes come from the folder's own config.json.
    data = json.loads(config.read_text())
    del data["model"], data["tokenizer"]
    config.write_text(json.dumps(data))
    result = run_alone(str(config))
    assert result.returncode == 0, result.stderr[-3000:]
    assert read_metrics(tmp_path / "second" / "run")[0]["loss"] < last + 0.05


def test_a_resumed_run_repeats_the_uninterrupted_one(
    make_config: Callable[..., Path], tmp_path: Path
) -> None:
    savers = [{"class_name": "CheckpointSaver", "every_steps": 3}]
    whole = make_config("whole", total_steps=6, epoch_num=None, savers=savers)
    assert run_alone(str(whole)).returncode == 0
    # The same run of six steps, its folder cut back to the checkpoint of step 3.
    import shutil

    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "run" / "checkpoints" / "step_00000006")
    cut = make_config("cut", total_steps=6, epoch_num=None, savers=savers)
    result = run_alone("train", str(cut), "--resume")
    assert result.returncode == 0, result.stderr[-3000:]
    before = {m["step"]: m for m in read_metrics(tmp_path / "whole" / "run")}
    again = read_metrics(tmp_path / "cut" / "run")[6:]
    assert [m["step"] for m in again] == [4, 5, 6]
    for metrics in again:
        assert metrics["loss"] == before[int(metrics["step"])]["loss"]
        assert metrics["grad_norm"] == before[int(metrics["step"])]["grad_norm"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_sigterm_saves_and_ends_cleanly(
    num_workers: int, make_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = make_config(
        total_steps=100_000,
        epoch_num=None,
        savers=[{"class_name": "CheckpointSaver"}],
        dataloader={"num_workers": num_workers},
    )
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "core" / "run.py"), str(config)],
        cwd=ROOT,
        env=environment_of_a_run(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics = tmp_path / "a" / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)  # the rank and its workers, as torchrun does it
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr[-2000:]
    assert list((tmp_path / "a" / "run" / "checkpoints").iterdir())


def test_eval_reports_each_source(
    make_config: Callable[..., Path], tmp_path: Path, chats: Path
) -> None:
    entry = {
        "dataset": {"class_name": "JsonlDataset", "name": "held_out", "anno_path": str(chats)},
        "tokenize_fn": {"class_name": "ChatTokenizeFn", "max_length": 256},
    }
    result = run_alone(str(make_config(eval={"datasets": [entry], "every_steps": 2}, savers=[])))
    assert result.returncode == 0, result.stderr[-3000:]
    evals = [m for m in read_metrics(tmp_path / "a" / "run") if "eval_loss" in m]
    assert [m["step"] for m in evals] == [2, 4, 5]
    assert evals[0]["eval_loss"] == pytest.approx(evals[0]["eval_loss/held_out"], rel=1e-12)


BAD_LINES = {
    "invalid json": '{"messages": [',
    "blank": "",
    "null content": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null}]}',
    "unknown role": '{"messages": [{"role": "wizard", "content": "a"}, {"role": "assistant", "content": "b"}]}',
}


@pytest.mark.parametrize("bad", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_named_with_file_and_line(
    make_config: Callable[..., Path], chats: Path, bad: str
) -> None:
    lines = chats.read_text().splitlines()
    lines.insert(4, bad)
    chats.write_text("\n".join(lines) + "\n")
    result = run_alone(str(make_config()))
    assert result.returncode == 2
    assert f"{chats}:5: " in result.stderr
    assert "Traceback" not in result.stderr


def test_two_ranks_end_together_on_a_bad_line(
    make_config: Callable[..., Path], chats: Path
) -> None:
    chats.write_text(chats.read_text() + "{\n")
    result = torchrun(2, "core/run.py", str(make_config()), timeout_s=120)
    assert result.returncode == 1
    assert f"{chats}:15: " in result.stderr


def test_a_batch_that_the_ranks_cannot_share_names_sizes_that_they_can(
    make_config: Callable[..., Path],
) -> None:
    result = torchrun(2, "core/run.py", str(make_config(global_batch_size=3)), timeout_s=120)
    assert result.returncode == 1
    assert "2" in result.stderr and "4" in result.stderr and "global_batch_size" in result.stderr


PLUGIN = '''
"""A dataset that needs no file."""
from pydantic import Field
import pegboard

class Numbers:
    def __init__(self, name, count):
        self.name, self.count = name, count
    def __len__(self):
        return self.count
    def __getitem__(self, i):
        return {"messages": [{"role": "user", "content": f"after {i}"},
                             {"role": "assistant", "content": str(i + 1)}]}
    def key(self, i):
        return pegboard.SampleKey(self.name, "numbers", i + 1)
    def fingerprint(self):
        return f"numbers {self.count}"

class NumbersDataset(pegboard.DatasetComponent):
    """Counts."""
    class Config(pegboard.ComponentConfig):
        """Fields of NumbersDataset."""
        count: int = Field(gt=0, description="Number of records.")
    config: Config
    def build(self, name):
        return Numbers(name, self.config.count)

@pegboard.hookimpl
def register_datasets(register):
    register(NumbersDataset)
'''


def numbers_config(make_config: Callable[..., Path]) -> Path:
    entry: dict[str, Any] = {
        "dataset": {"class_name": "NumbersDataset", "count": 20},
        "tokenize_fn": {"class_name": "ChatTokenizeFn", "max_length": 256},
    }
    return make_config(datasets=[entry], total_steps=2, epoch_num=None, savers=[])


def test_a_one_file_plugin_trains(make_config: Callable[..., Path], tmp_path: Path) -> None:
    plugin = tmp_path / "numbers_plugin.py"
    plugin.write_text(PLUGIN)
    config = numbers_config(make_config)
    result = run_alone("train", str(config), "--plugin", str(plugin))
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(read_metrics(tmp_path / "a" / "run")) == 2
    without = run_alone("check", str(config))
    assert without.returncode == 2
    assert "NumbersDataset" in without.stderr


def test_an_installed_plugin_trains(
    make_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    info = site / "numbers_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "numbers_plugin.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: numbers-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[pegboard]\nnumbers = numbers_plugin\n")
    monkeypatch.setenv("PYTHONPATH", str(site))
    result = run_alone("train", str(numbers_config(make_config)))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "numbers" in (tmp_path / "a" / "run" / "plugins.json").read_text()
