"""Whatever is wrong with a run, its user reads one clear line and the exit code is 2."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import read_metrics, write_chats
from torch import Tensor

from pegboard import trainer
from pegboard.cli import main
from pegboard.contracts import Batch
from pegboard.parallel import gradient_norm
from pegboard_plugins.savers import hf_export

MakeConfig = Callable[..., Path]
CHECKPOINTS = [{"class_name": "CheckpointSaver"}]


def _refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a run ends with, beside its log."""
    capsys.readouterr()
    assert main(["train", *words, "--no-third-party"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    said = [line for line in lines if " INFO " not in line and " WARNING " not in line]
    assert len(said) == 1, said
    return said[0]


def _datasets(path: Path, **changes: Any) -> list[dict[str, Any]]:
    return [
        {
            "dataset": {"class_name": "JsonlDataset", "name": "chats", "anno_path": str(path)},
            "tokenize_fn": {"class_name": "ChatTokenizeFn", "max_length": 256, **changes},
        }
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b'{"a": 1,,}', ":1:9: expected a key"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"[1]", "expected an object"),
        (b"", "expected"),
    ],
)
def test_a_config_that_is_no_json_object_is_refused(
    text: bytes, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text)
    assert says in _refused(capsys, str(path))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optimiser": {}}, "Did you mean 'optimizer'?"),
        ({"optimizer": {"class_name": "Qwen3"}}, "no optimizer named 'Qwen3'"),
        ({"dataloader": {"pack_max_length": 64}}, "is more than dataloader.pack_max_length 64"),
        ({"model": {"vocab_size": 100}}, "smaller than the tokenizer's"),
        ({"load_from": "./not/here"}, "load_from: no folder"),
        ({"seed": 2**70}, "seed: expected less than"),
        ({"parallel": {"replicate_size": 2}}, "does not divide the 1 ranks"),
    ],
)
def test_a_config_that_cannot_run_is_refused(
    changes: dict[str, Any],
    says: str,
    make_config: MakeConfig,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert says in _refused(capsys, str(make_config(**changes)))


def test_a_work_dir_that_cannot_be_written_is_refused(
    make_config: MakeConfig, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("/proc/no_such_folder", str(chats)):
        line = _refused(capsys, str(make_config()), "--set", f"work_dir={folder}")
        assert line.startswith(f"work_dir: '{folder}' can't be written")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optimizer.lrr=1", "Did you mean 'lr'?"),
        ("optimizer.lr", "expected path=value"),
        ("optimizer.lr=abc", "expected a number"),
        ("savers[4].every_steps=1", "there is no [4]"),
    ],
)
def test_a_bad_override_is_refused(
    override: str, says: str, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in _refused(capsys, str(make_config()), "--set", override)


@pytest.mark.parametrize(
    "tail", [b"[1]\n", b"\n{}\n", b'{"messages": [}\n', b'{"messages": "\xff"}']
)
def test_a_bad_record_is_named_by_file_and_line(
    tail: bytes, tmp_path: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_chats(tmp_path / "bad.jsonl", 3)
    path.write_bytes(path.read_bytes() + tail)
    line = _refused(capsys, str(make_config(datasets=_datasets(path))))
    assert line.startswith(f"{path}:4: ")


def test_a_dataset_without_records_is_refused(
    tmp_path: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    for name, says in [
        ("empty.jsonl", "the file is empty"),
        ("folder", "no *.jsonl file"),
        ("absent.jsonl", "no file or folder"),
    ]:
        assert says in _refused(capsys, str(make_config(datasets=_datasets(tmp_path / name))))


def test_line_ends_and_a_byte_order_mark_change_no_loss(
    tmp_path: Path, make_config: MakeConfig, chats: Path
) -> None:
    odd = tmp_path / "odd" / "chats.jsonl"
    odd.parent.mkdir()
    odd.write_bytes(b"\xef\xbb\xbf" + chats.read_bytes().replace(b"\n", b"\r\n").rstrip())
    losses = []
    for name, path in [("plain", chats), ("odd", odd)]:
        config = make_config(name, datasets=_datasets(path), epoch_num=1)
        assert main(["train", str(config), "--no-third-party"]) == 0
        losses.append([m["loss"] for m in read_metrics(tmp_path / name / "run")])
    assert losses[0] == losses[1]


def test_weights_that_are_not_whole_are_refused(
    tmp_path: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(make_config("made", epoch_num=1)), "--no-third-party"]) == 0
    export = tmp_path / "made" / "run" / "export"
    weights, config = export / "model.safetensors", str(make_config("b", load_from=str(export)))
    assert "hidden_size" in _refused(capsys, config, "--set", "model.hidden_size=64")
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "not a whole safetensors file" in _refused(capsys, config)
    weights.unlink()
    index = {
        "metadata": {},
        "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"},
    }
    (export / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert "model-00001-of-00002.safetensors" in _refused(capsys, config)


def test_a_run_that_is_never_finite_stops(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(epoch_num=None, total_steps=9, max_bad_steps=3)
    line = _refused(capsys, str(config), "--set", "optimizer.lr=1e30")
    assert "3 steps in a row were not finite" in line
    # A skipped step is logged with its own learning rate.
    metrics = read_metrics(tmp_path / "a" / "run")
    assert len({m["lr"] for m in metrics}) == len(metrics)


def test_a_step_that_is_not_finite_moves_no_load_of_experts(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, applied = [], []
    step = trainer.Trainer.train_step

    def watched(self: trainer.Trainer, batches: Sequence[Batch]) -> trainer.StepResult:
        result = step(self, batches)
        applied.append(result.applied)
        loads.append(self.model.module.get_buffer("balance.load_LE").tolist())
        return result

    def broken_once(*arguments: Any) -> Tensor:
        return gradient_norm(*arguments) * (float("nan") if len(loads) == 1 else 1.0)

    monkeypatch.setattr(trainer.Trainer, "train_step", watched)
    monkeypatch.setattr(trainer, "gradient_norm", broken_once)
    sparse = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    model = {"class_name": "Qwen3MoE", "intermediate_size": 32, **sparse}
    config = make_config(epoch_num=None, total_steps=3, global_batch_size=2, model=model)
    assert main(["train", str(config), "--no-third-party"]) == 0
    assert applied == [True, False, True]
    assert loads[0] == loads[1] != loads[2]
    assert [sum(layer) for layer in loads[2]] == pytest.approx([1.0, 1.0])


def test_the_next_seed_is_not_the_stream_of_the_next_rank(make_config: MakeConfig) -> None:
    seeds = []
    for seed in (7, 8):
        config = make_config(epoch_num=None, total_steps=1, seed=seed, savers=[])
        assert main(["train", str(config), "--no-third-party"]) == 0
        seeds.append(torch.initial_seed())
    assert abs(seeds[0] - seeds[1]) > 2**32


def test_a_run_goes_on_over_several_epochs(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(epoch_num=None, total_steps=3)
    assert main(["train", str(config), "--no-third-party"]) == 0
    assert [m["epoch"] for m in read_metrics(tmp_path / "a" / "run")] == [0, 1, 2]


def test_a_checkpoint_is_resumed_by_its_own_config_only(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(make_config(savers=CHECKPOINTS, epoch_num=1))
    words = ["train", config, "--no-third-party"]
    assert main([*words, "--resume"]) == 0
    assert "no checkpoint under" in capsys.readouterr().err
    assert "was made with other data" in _refused(capsys, config, "--resume", "--set", "seed=8")
    smaller = "model.intermediate_size=32"
    assert "gate_up_proj" in _refused(capsys, config, "--resume", "--set", smaller)
    assert main([*words, "--resume"]) == 0
    assert "nothing left to train" in capsys.readouterr().err


def test_what_failed_after_the_last_checkpoint_is_written_when_the_run_is_resumed(
    make_config: MakeConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = str(make_config(savers=[*CHECKPOINTS, {"class_name": "HFSaver"}], epoch_num=1))

    def full_disk(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(hf_export, "write_parts", full_disk)
        assert "No space left" in _refused(capsys, config)
    run = tmp_path / "a" / "run"
    assert not (run / "export").exists()
    (state,) = run.glob("checkpoints/*/state.json")
    before = state.stat()
    assert main(["train", config, "--no-third-party", "--resume"]) == 0
    assert (run / "export" / "model.safetensors").is_file()
    # The checkpoint it stands on is not written again.
    assert [p.name for p in (run / "checkpoints").iterdir()] == [state.parent.name]
    assert (state.stat().st_ino, state.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_new_run_does_not_mix_with_an_earlier_one_of_its_name(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for epochs in (2, 1):
        config = str(make_config(savers=CHECKPOINTS, epoch_num=epochs))
        assert main(["train", config, "--no-third-party"]) == 0
    assert "has checkpoints of an earlier run" in capsys.readouterr().err
    folders = sorted((tmp_path / "a").glob("run*"))
    steps = [[p.name for p in (f / "checkpoints").iterdir()] for f in folders]
    assert steps == [["step_00000001"], ["step_00000002"]]
    assert [m["step"] for m in read_metrics(folders[0])] == [1]


@pytest.mark.parametrize(
    "text", ["def x(:\n", "import no_such_module_here\n", "raise SystemExit(3)\n"]
)
def test_a_plugin_file_that_was_asked_for_and_is_broken_stops_the_run(
    text: str, tmp_path: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "broken_parts_of_a_user.py"
    file.write_text(text, encoding="utf-8")
    line = _refused(capsys, str(make_config()), "--plugin", str(file))
    assert line.startswith(f"--plugin {file}: ") and "broken_parts_of_a_user.py:1" in line


def test_damaged_files_of_an_earlier_run_are_named(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(make_config(savers=CHECKPOINTS, epoch_num=1))
    assert main(["train", config, "--no-third-party"]) == 0
    saved = [path for path in (tmp_path / "a" / "run").rglob("step_*/*") if path.is_file()]
    assert len(saved) == 2
    for path in saved:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        assert _refused(capsys, config, "--resume").startswith(str(path.parent)), path
        path.write_bytes(whole)


def test_a_damaged_token_store_is_made_again(make_config: MakeConfig, tmp_path: Path) -> None:
    config = str(make_config(epoch_num=1))
    assert main(["train", config, "--no-third-party"]) == 0
    (store,) = {meta.parent for meta in (tmp_path / "a" / ".token_store").rglob("meta.json")}
    stored = {path: path.read_bytes() for path in store.iterdir() if path.name != "last_used"}
    assert len(stored) == 7
    losses = read_metrics(tmp_path / "a" / "run")[0]["loss"]
    for path, whole in stored.items():
        path.write_bytes(whole[: len(whole) // 2])
    assert main(["train", config, "--no-third-party"]) == 0
    assert {path: path.read_bytes() for path in stored} == stored
    assert read_metrics(tmp_path / "a" / "run")[1]["loss"] == losses


def test_a_full_disk_is_told_in_one_line(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(make_config(epoch_num=1))
    run_dir = tmp_path / "a" / "run"
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").symlink_to("/dev/full")
    assert "No space left on device" in _refused(capsys, config)


def test_sigterm_saves_and_ends_without_an_error(
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    step = trainer.Trainer.train_step

    def stop_after_two(self: trainer.Trainer, batches: Any) -> trainer.StepResult:
        if self.step == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(self, batches)

    monkeypatch.setattr(trainer.Trainer, "train_step", stop_after_two)
    before = signal.getsignal(signal.SIGTERM)
    config = make_config(savers=CHECKPOINTS)
    assert main(["train", str(config), "--no-third-party"]) == 0
    assert signal.getsignal(signal.SIGTERM) == before
    assert "stopped after step 2: SIGTERM" in capsys.readouterr().err
    saved = tmp_path / "a" / "run" / "checkpoints"
    assert [path.name for path in saved.iterdir()] == ["step_00000002"]
