"""The claim: callbacks are told what happens, in order; a stop that one asks for ends the run on every rank as SIGTERM
does, and one that fails ends it the same way, named with its plugin. No rank hangs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import read_metrics, torchrun

from pegboard import trainer
from pegboard.cli import main

MakeConfig = Callable[..., Path]
EVENTS = "on_train_start on_step_end on_checkpoint_saved on_train_end on_train_error".split()

PLUGIN = '''
"""A callback that writes down what it is told, and one that misbehaves where it is asked to."""
import json
from pydantic import Field
import pegboard

class Writer(pegboard.Callback):
    def __init__(self, run_dir):
        self.run_dir, self.rank = run_dir, "unknown"

    def write(self, name, **facts):
        with open(self.run_dir / f"events_{self.rank}.jsonl", "a") as file:
            file.write(json.dumps({"event": name, **facts}) + "\\n")

    def on_train_start(self, event):
        self.rank = event.rank
        self.write("on_train_start", step=event.step, total=event.total_steps,
                   resumed=event.resumed_from is not None, seed=event.config["seed"])
        event.config["seed"] = "spoilt"

    def on_step_end(self, event):
        self.write("on_step_end", step=event.step, applied=event.applied, metrics=dict(event.metrics))

    def on_checkpoint_saved(self, event):
        self.write("on_checkpoint_saved", step=event.step, saver=event.saver, there=event.path.exists())

    def on_train_end(self, event):
        self.write("on_train_end", step=event.step, total=event.total_steps, stopped=event.stopped)

    def on_train_error(self, event):
        self.write("on_train_error", step=event.step, error=str(event.error))

class EventWriter(pegboard.CallbackComponent):
    """Writes down every event."""
    every_rank = True
    def build(self, run_dir):
        return Writer(run_dir)

class Faulty(pegboard.Callback):
    def __init__(self, config):
        self.config, self.rank = config, 0

def at(name):
    def method(self, event):
        if name == "on_train_start":
            self.rank = event.rank
        wanted = self.config.at == name and self.rank == self.config.rank
        if not wanted or getattr(event, "step", 2) not in (0, 2, self.config.step):
            return None
        if self.config.returns:
            return json.loads(self.config.returns)
        raise OSError("the disk of the callback is gone")
    return method

for name in ("on_train_start", "on_step_end", "on_checkpoint_saved", "on_train_end", "on_train_error"):
    setattr(Faulty, name, at(name))

class Misspelt(pegboard.Callback):
    def on_step_ended(self, event):
        pass

class Fault(pegboard.CallbackComponent):
    """Fails, or returns something."""
    every_rank = True
    class Config(pegboard.ComponentConfig):
        at: str = Field(description="Event.")
        rank: int = Field(default=0, description="Rank.")
        step: int = Field(default=2, description="Step, beside the second.")
        returns: str = Field(default="", description="JSON to return; empty: fail.")
    config: Config
    def build(self, run_dir):
        if self.config.at == "nothing":
            return object()
        if self.config.at == "misspelt":
            return Misspelt()
        if self.config.at == "build":
            raise OSError("the disk of the callback is gone")
        return Faulty(self.config)

@pegboard.hookimpl
def register_callbacks(register):
    register(EventWriter)
    register(Fault)
'''
WRITER = {"class_name": "EventWriter"}
CHECKPOINTS = [{"class_name": "CheckpointSaver"}]


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "told", raising=False)
    path = tmp_path / "told.py"
    path.write_text(PLUGIN, encoding="utf-8")
    return str(path)


def events(run_dir: Path, rank: int = 0) -> list[dict[str, Any]]:
    lines = (run_dir / f"events_{rank}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def train(config: Path, plugin: str, *words: str) -> int:
    return main(["train", str(config), "--no-third-party", "--plugin", plugin, *words])


def test_a_callback_is_told_of_a_whole_run_and_of_its_resumption(
    make_config: MakeConfig, tmp_path: Path, plugin: str
) -> None:
    run_dir = tmp_path / "a" / "run"
    shape = {"callbacks": [WRITER, WRITER], "savers": CHECKPOINTS, "epoch_num": None}
    assert train(make_config(total_steps=3, log_every_steps=2, **shape), plugin) == 0
    told = events(run_dir)
    assert [one["event"] for one in told[::2]] == [one["event"] for one in told[1::2]]
    told = told[::2]  # two of them were told each event, one after the other
    assert [(one["event"], one["step"]) for one in told] == [
        ("on_train_start", 0),
        ("on_step_end", 1),
        ("on_step_end", 2),
        ("on_step_end", 3),
        ("on_checkpoint_saved", 3),
        ("on_train_end", 3),
    ]
    assert told[0]["seed"] == 7 and events(run_dir)[1]["seed"] == 7  # each has a copy of its own
    assert told[4]["saver"] == "CheckpointSaver" and told[4]["there"]
    assert told[5]["stopped"] is None and told[5]["total"] == 3
    logged = read_metrics(run_dir)
    assert [line.pop("step") for line in logged] == [2, 3]
    assert [told[2]["metrics"], told[3]["metrics"]] == logged

    assert train(make_config(total_steps=4, **shape), plugin, "--resume") == 0
    again = events(run_dir)[12::2]
    assert [(one["event"], one["step"]) for one in again] == [
        ("on_train_start", 3),
        ("on_step_end", 4),
        ("on_checkpoint_saved", 4),
        ("on_train_end", 4),
    ]
    assert again[0]["resumed"]


def test_a_stop_that_is_asked_for_ends_like_sigterm(
    make_config: MakeConfig, tmp_path: Path, plugin: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = {"class_name": "Fault", "at": "on_step_end", "returns": '"enough"'}
    config = make_config(callbacks=[fault, WRITER], savers=CHECKPOINTS)
    assert train(config, plugin) == 0
    told = events(tmp_path / "a" / "run")
    reason = "enough (callback 'Fault' of plugin 'told')"
    assert told[-1] == {"event": "on_train_end", "step": 3, "total": 5, "stopped": reason}
    assert told[-2]["event"] == "on_checkpoint_saved" and told[-2]["step"] == 3
    assert f"stopped after step 3: {reason}; continue with --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("at", "told_last", "steps_saved"),
    [
        ("build", "on_train_error", []),
        ("on_train_start", "on_train_error", []),
        ("on_step_end", "on_train_error", [3]),
        ("on_checkpoint_saved", "on_train_error", [2, 3]),
        ("on_train_end", "on_train_end", [2, 4, 5]),
    ],
)
def test_a_callback_that_fails_ends_the_run_and_is_named(
    make_config: MakeConfig,
    tmp_path: Path,
    plugin: str,
    capsys: pytest.CaptureFixture[str],
    at: str,
    told_last: str,
    steps_saved: list[int],
) -> None:
    every = 2 if at in ("on_checkpoint_saved", "on_train_end") else 100
    savers = [{**CHECKPOINTS[0], "every_steps": every, "keep_last": 9}]
    config = make_config(
        callbacks=[{"class_name": "Fault", "at": at, "step": 5}, WRITER], savers=savers
    )
    assert train(config, plugin) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        rf"callback 'Fault' of plugin 'told' failed in {at}( of step 2)?: OSError: "
        r"the disk of the callback is gone \(.*told\.py:\d+\)",
        message,
    )
    run_dir = tmp_path / "a" / "run"
    assert events(run_dir)[-1]["event"] == told_last
    checkpoints = run_dir / "checkpoints"
    saved = sorted(path.name for path in checkpoints.iterdir()) if checkpoints.exists() else []
    assert saved == [f"step_{step:08d}" for step in steps_saved]


def test_the_error_of_a_run_is_told_and_is_the_one_that_is_reported(
    make_config: MakeConfig, tmp_path: Path, plugin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = trainer.Trainer.train_step

    def fail(self: trainer.Trainer, batches: Any) -> trainer.StepResult:
        if self.step == 1:
            raise RuntimeError("out of memory")
        return step(self, batches)

    monkeypatch.setattr(trainer.Trainer, "train_step", fail)
    fault = {"class_name": "Fault", "at": "on_train_error", "step": 1}
    with pytest.raises(RuntimeError, match="out of memory"):
        train(make_config(callbacks=[fault, WRITER]), plugin)
    told = events(tmp_path / "a" / "run")
    assert [one["event"] for one in told] == ["on_train_start", "on_step_end", "on_train_error"]
    assert told[-1] == {"event": "on_train_error", "step": 1, "error": "out of memory"}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"at": "nothing"}, "build: build() returned object; expected an object derived from pegb"),
        ({"at": "misspelt"}, "no event calls 'on_step_ended': did you mean 'on_step_end'?"),
        (
            {"at": "on_step_end", "returns": "true"},
            "on_step_end of step 2: on_step_end returned True; expected None, or a text",
        ),
    ],
)
def test_what_is_no_callback_is_told_in_one_line(
    make_config: MakeConfig,
    plugin: str,
    capsys: pytest.CaptureFixture[str],
    fault: dict[str, Any],
    message: str,
) -> None:
    config = make_config(callbacks=[{"class_name": "Fault", **fault}], savers=[])
    assert train(config, plugin) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("callback 'Fault' of plugin 'told' failed in ") and message in last


def held_out(chats: Path) -> dict[str, Any]:
    return {
        "dataset": {"class_name": "JsonlDataset", "name": "held_out", "anno_path": str(chats)},
        "tokenize_fn": {"class_name": "ChatTokenizeFn", "max_length": 256},
    }


def test_early_stopping_stops_where_the_uninterrupted_run_would(
    make_config: MakeConfig, tmp_path: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Only a first evaluation is better by so much; the third one without a new best is that of step 8.
    stopping = {"class_name": "EarlyStopping", "min_change": 100.0, "patience": 3}
    shape: dict[str, Any] = {
        "callbacks": [stopping],
        "eval": {"datasets": [held_out(chats)], "every_steps": 2},
        "epoch_num": None,
        "savers": CHECKPOINTS,
    }

    def stopped(*words: str) -> str:
        assert main(["train", *words, "--no-third-party"]) == 0
        return capsys.readouterr().err

    # Interrupted after an odd step, which is evaluated too, and after an even one.
    assert "stopped after" not in stopped(str(make_config(total_steps=3, **shape)))
    assert "stopped after" not in stopped(str(make_config(total_steps=6, **shape)), "--resume")
    said = stopped(str(make_config(total_steps=20, **shape)), "--resume")
    best = read_metrics(tmp_path / "a" / "run")[2]["eval_loss"]
    assert (
        f"stopped after step 9: eval_loss has not been better than {best:.6g} of step 2 in 3 evaluations"
        " (callback 'EarlyStopping' of plugin 'callbacks'); continue with --resume" in said
    )


@pytest.mark.slow
def test_two_ranks_stop_together_when_one_asks_or_fails(
    make_config: MakeConfig, tmp_path: Path, plugin: str, chats: Path
) -> None:
    def run(name: str, *callbacks: dict[str, Any], **changes: Any) -> tuple[int, str]:
        config = make_config(name, callbacks=[*callbacks, WRITER], savers=CHECKPOINTS, **changes)
        words = ("core/run.py", str(config), "--plugin", plugin)
        result = torchrun(2, *words, timeout_s=120)
        return result.returncode, result.stderr

    def last(name: str, rank: int) -> dict[str, Any]:
        return events(tmp_path / name / "run", rank)[-1]

    fault = {"class_name": "Fault", "at": "on_step_end", "rank": 1}
    code, said = run("asks", {**fault, "returns": '"enough"'})
    assert code == 0, said[-3000:]
    for rank in (0, 1):
        assert last("asks", rank)["event"] == "on_train_end" and last("asks", rank)["step"] == 3
        assert last("asks", rank)["stopped"] == "enough (callback 'Fault' of plugin 'told')"

    code, said = run("fails", fault)
    assert code == 1 and "callback 'Fault' of plugin 'told' failed in on_step_end of step 2" in said
    for rank in (0, 1):
        assert last("fails", rank)["event"] == "on_train_error" and last("fails", rank)["step"] == 3
    assert list((tmp_path / "fails" / "run" / "checkpoints").iterdir())

    # It runs on rank 0 only, and both ranks end by it.
    code, said = run(
        "early",
        {"class_name": "EarlyStopping", "min_change": 100.0, "patience": 1},
        eval={"datasets": [held_out(chats)], "every_steps": 1},
    )
    assert code == 0, said[-3000:]
    assert [last("early", rank)["step"] for rank in (0, 1)] == [3, 3]
    assert "EarlyStopping" in last("early", 1)["stopped"]
