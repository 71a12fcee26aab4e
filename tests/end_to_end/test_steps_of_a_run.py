"""The claim: a step that is not finite changes nothing and the run goes on; evaluation changes no training; losses are
told for each dataset by itself; a stop that reaches one rank stops all; the run folder says what was run."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import read_metrics, torchrun, write_chats

from pegboard import parallel, trainer
from pegboard.cli import main

MakeConfig = Callable[..., Path]
CHECKPOINTS = [{"class_name": "CheckpointSaver"}]
EXPERTS: dict[str, Any] = {
    "class_name": "Qwen3MoE",
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.1,
}


def train(config: Path, *words: str) -> list[dict[str, Any]]:
    """Metrics of a run in this process."""
    assert main(["train", str(config), "--no-third-party", *words]) == 0
    return read_metrics(Path(json.loads(config.read_text())["work_dir"]) / "run")


def losses(metrics: Iterable[dict[str, Any]], name: str = "loss") -> list[Any]:
    return [line[name] for line in metrics if name in line]


def entry(path: Path, name: str) -> dict[str, Any]:
    return {
        "dataset": {"class_name": "JsonlDataset", "name": name, "anno_path": str(path)},
        "tokenize_fn": {"class_name": "ChatTokenizeFn", "max_length": 256},
    }


def test_a_step_that_is_not_finite_changes_nothing_and_the_run_goes_on(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The data of all steps is the same, so a loss that stays says that no weight moved.
    calls: list[int] = []

    def sometimes_nan(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return parallel.gradient_norm(*arguments) * (float("nan") if len(calls) in (2, 4) else 1.0)

    monkeypatch.setattr(trainer, "gradient_norm", sometimes_nan)
    metrics = train(make_config(savers=[], max_bad_steps=2))
    assert losses(metrics, "bad_steps") == [0, 1, 1, 2, 2]
    assert [line["grad_norm"] is None for line in metrics] == [False, True, False, True, False]
    first, second, third, fourth, fifth = losses(metrics)
    assert third == pytest.approx(second, rel=1e-5) and fifth == pytest.approx(fourth, rel=1e-5)
    assert second < first * (1 - 1e-3) and fourth < third * (1 - 1e-3)


def test_evaluation_changes_no_number_of_training(make_config: MakeConfig, tmp_path: Path) -> None:
    held_out = write_chats(tmp_path / "held_out.jsonl", 5)
    changes = {"model": EXPERTS, "savers": []}
    plain = train(make_config("plain", **changes))
    evaluation = {"datasets": [entry(held_out, "held_out")], "every_steps": 1}
    watched = train(make_config("watched", **changes, eval=evaluation))
    assert len(losses(watched, "eval_loss")) == 5
    for name in ("loss", "grad_norm", "balancing_loss", "experts/balancing", "experts/entropy"):
        assert losses(watched, name) == losses(plain, name), name


def test_each_dataset_has_the_loss_that_it_has_by_itself(
    make_config: MakeConfig, chats: Path, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in chats.read_text().splitlines()]
    for line in lines:
        line["messages"][1]["content"] = "zz top " * 4
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(map(json.dumps, lines)) + "\n")
    entries = [entry(chats, "first"), entry(other, "second")]
    changes = {"savers": [], "epoch_num": 1, "global_batch_size": 32}
    both = train(
        make_config(
            "both", datasets=entries, eval={"datasets": entries, "every_steps": 9}, **changes
        )
    )
    assert abs(both[0]["loss/first"] - both[0]["loss/second"]) > 0.01
    for one in entries:
        name = one["dataset"]["name"]
        alone = train(
            make_config(name, datasets=[one], eval={"datasets": [one], "every_steps": 9}, **changes)
        )
        assert both[0][f"loss/{name}"] == pytest.approx(alone[0]["loss"], rel=1e-5)
        # Trained on other data since: not equal, but of this dataset.
        assert alone[1]["eval_loss"] == alone[1][f"eval_loss/{name}"]
    shares = [both[1][f"eval_loss/{name}"] for name in ("first", "second")]
    assert min(shares) < both[1]["eval_loss"] < max(shares)


def test_a_line_looks_the_same_before_there_is_a_run_folder_and_after(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train(make_config(savers=[], epoch_num=1))
    lines = capsys.readouterr().err.splitlines()
    places = [n for n, line in enumerate(lines) if "chats: " in line or "step 1/1" in line]
    assert len(places) > 2  # of the preparation, then of the step
    for line in lines:
        assert re.match(r"\d\d:\d\d:\d\d [A-Z]+ +[^|]+$", line), line


def test_the_run_folder_says_what_was_run_and_its_config_runs_again(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    metrics = train(make_config(savers=[], epoch_num=1))
    folder = tmp_path / "a" / "run"
    resolved = json.loads((folder / "config.json").read_text())
    assert (
        resolved["max_grad_norm"] == 1.0 and resolved["loss"]["class_name"] == "ChunkedCrossEntropy"
    )
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["torch"] == torch.__version__ and "pydantic" in environment["packages"]
    plugins = (folder / "plugins.json").read_text()
    assert all(f'"{name}"' in plugins for name in ("qwen3", "Qwen3", "ByteTokenizer", "version"))
    assert "step 1/1" in (folder / "logs" / "rank_0.log").read_text()
    again = tmp_path / "again.json"
    again.write_text(json.dumps(resolved | {"work_dir": str(tmp_path / "again")}))
    assert losses(train(again)) == losses(metrics)


STOPPER = '''
"""A schedule that has a SIGTERM sent to rank 1 alone."""
import os, signal
import pegboard

class Stopping(pegboard.LRScheduleComponent):
    """Constant; stops rank 1 in step 2."""
    class Config(pegboard.ComponentConfig):
        """No fields."""
    config: Config
    def build(self, total_steps):
        def lr(step, base_lr):
            if step == 2 and os.environ["RANK"] == "1":
                signal.raise_signal(signal.SIGTERM)
            return base_lr
        return lr

@pegboard.hookimpl
def register_lr_schedules(register):
    register(Stopping)
'''


@pytest.mark.slow
def test_a_sigterm_to_one_rank_stops_all_after_the_same_step(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    plugin = tmp_path / "stopping_schedule.py"
    plugin.write_text(STOPPER)
    config = make_config(savers=CHECKPOINTS, epoch_num=1000, lr_schedule={"class_name": "Stopping"})
    begin = time.monotonic()
    result = torchrun(
        2, "core/run.py", "train", str(config), "--plugin", str(plugin), timeout_s=120
    )
    assert result.returncode == 0, result.stderr[-3000:]
    # Told with the counts of the step after the one in which it came.
    assert "stopped after step 3: SIGTERM" in result.stderr
    saved = tmp_path / "a" / "run" / "checkpoints"
    assert [path.name for path in saved.iterdir()] == ["step_00000003"]
    assert time.monotonic() - begin < 100
