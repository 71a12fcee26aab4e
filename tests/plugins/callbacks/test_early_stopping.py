"""The claim: EarlyStopping asks for a stop after so many evaluations in a row without a new best, and only watches
what the run evaluates."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pegboard import ConfigError, StepEnd, TrainStart
from pegboard.json_source import ConfigSource, load_layers
from pegboard.plugin_manager import load_plugins
from pegboard.run_config import validate_run_config
from pegboard_plugins.callbacks.early_stopping import StopWhenNoBetter

REGISTRY = load_plugins(third_party=False).registry


def step_end(step: int, **metrics: float) -> StepEnd:
    return StepEnd(step=step, total_steps=99, metrics=metrics, applied=True)


def asked(values: list[float], **settings: Any) -> list[int]:
    """Numbers of the evaluations, from 1, at which a stop is asked for."""
    callback = StopWhenNoBetter(Path("none"), "eval_loss", **{"patience": 2, **settings})
    found = []
    for number, value in enumerate(values, start=1):
        assert callback.on_step_end(step_end(2 * number - 1, loss=1.0)) is None
        if callback.on_step_end(step_end(2 * number, eval_loss=value)):
            found.append(number)
    return found


def test_a_stop_is_asked_for_after_patience_evaluations_in_a_row_without_a_new_best() -> None:
    assert asked([3.0, 2.0, 2.5, 1.9, 2.1, 1.95]) == [6]
    assert asked([3.0, 2.0, 1.0, 0.5]) == []


def test_higher_may_be_better() -> None:
    assert asked([1.0, 2.0, 1.5, 2.0], lower_is_better=False) == [4]


def test_a_gain_of_no_more_than_min_change_is_none() -> None:
    assert asked([3.0, 2.75, 2.5], min_change=0.5) == [3]
    assert asked([3.0, 2.75, 2.25], min_change=0.5) == []


def test_a_value_that_is_not_finite_is_never_the_best() -> None:
    assert asked([math.nan, -math.inf]) == [2]
    assert asked([math.inf, 3.0, math.nan, 2.0]) == []


def test_a_resumed_run_takes_up_the_evaluations_before_its_checkpoint(tmp_path: Path) -> None:
    history = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 2, "loss": 1.0},
        {"step": 2, "eval_loss": 1.0},
        {"step": 4, "eval_loss": 0.5},  # repeated below
        {"step": 4, "eval_loss": None},
        {"step": 5, "eval_loss": 2.0},  # of the interruption
        {"step": 6, "eval_loss": 0.1},  # behind the checkpoint
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"step": 6, "eval'
    history.write_text(text, encoding="utf-8")
    callback = StopWhenNoBetter(history, "eval_loss", patience=2)
    callback.on_train_start(
        TrainStart(
            run_dir=tmp_path,
            config={"eval": {"every_steps": 2}},
            step=5,
            total_steps=99,
            resumed_from=tmp_path / "checkpoints" / "step_00000005",
            rank=0,
            world_size=1,
        )
    )
    assert callback.on_step_end(step_end(6, eval_loss=1.0)) == (
        "eval_loss has not been better than 1 of step 2 in 2 evaluations"
    )


def source(tmp_path: Path, callback: dict[str, Any], **changes: Any) -> ConfigSource:
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    entry = {
        "dataset": {
            "class_name": "JsonlDataset",
            "name": "held_out",
            "anno_path": str(tmp_path / "data.jsonl"),
        },
        "tokenize_fn": {"class_name": "TextTokenizeFn", "max_length": 64},
    }
    config = {
        "tokenizer": {"class_name": "ByteTokenizer"},
        "model": {"class_name": "Qwen3", "preset": "qwen3-8b"},
        "datasets": [entry],
        "eval": {"datasets": [entry], "every_steps": 1},
        "total_steps": 1,
        "callbacks": [{"class_name": "EarlyStopping", **callback}],
        **changes,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")
    return load_layers(path, ())


def test_what_is_watched_must_be_evaluated(tmp_path: Path) -> None:
    validate_run_config(source(tmp_path, {"metric": "eval_loss/held_out"}), REGISTRY)
    with pytest.raises(ConfigError, match=r"config.json:\d+:\d+: callbacks\[0\].metric: no evalu"):
        validate_run_config(source(tmp_path, {"metric": "loss"}), REGISTRY)
    with pytest.raises(ConfigError, match=r"callbacks\[0\].class_name: .* write an \"eval\" sec"):
        validate_run_config(source(tmp_path, {}, eval=None), REGISTRY)
