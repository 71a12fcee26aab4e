"""Claim: ranks and micro-batches with no picture, only pictures, or different numbers of tiles run the same
collectives and give one rank's losses and gradient norms to 1e-5; frozen parts never move, the others move in
steps with pictures only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launching import environment_of_a_run, read_metrics, torchrun, write_config

# Tiles of the four packs of a step. With four ranks each has one, so most ranks are without a picture in
# some step; the third and the last step of a round have none anywhere.
ROUND = ((2, 0, 0, 1), (0, 0, 0, 13), (0, 0, 0, 0), (1, 3, 2, 1), (0, 0, 0, 0))

MODEL: dict[str, Any] = {
    "class_name": "InternS1",
    "image_token_id": 300,
    "vision_config": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": 28,
        "patch_size": 7,
    },
    "text_config": {
        "class_name": "Qwen3",
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
}
EXPERTS = {
    "class_name": "Qwen3MoE",
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    **{name: value for name, value in MODEL["text_config"].items() if name != "class_name"},
}
CASES: dict[str, dict[str, Any]] = {
    "frozen": {"freeze_vision": True, "freeze_projector": True},
    "tower_frozen": {"freeze_vision": True},
    "all": {"param_groups": [{"match": "vision_tower.*", "lr": 1e-3}]},
    "all_each": {"reduction": "per_micro_batch"},
    "text_frozen": {"freeze_language": True},
    "experts": {"freeze_vision": True, "text_config": EXPERTS},
}


def with_pictures(case: str) -> list[bool]:
    """Whether each step of the run has a picture anywhere: 20 steps where all is frozen but the text, else 10."""
    return [bool(sum(step)) for step in ROUND] * (4 if case == "frozen" else 2)


def config_of(folder: Path, case: str, num_ranks: int = 1) -> Path:
    options = dict(CASES[case])
    reduction = options.pop("reduction", "per_step")
    param_groups = options.pop("param_groups", [])
    return write_config(
        folder / f"{case}.json",
        {
            "work_dir": str(folder / case),
            "run_name": "run",
            "seed": 3,
            "tokenizer": {"class_name": "ByteTokenizer"},
            "model": {**MODEL, **options},
            "datasets": [
                {
                    "dataset": {
                        "class_name": "TileSamples",
                        "name": "tiles",
                        "tiles": [count for step in ROUND for count in step],
                    },
                    "tokenize_fn": {"class_name": "TileTokenize"},
                }
            ],
            "dataloader": {
                "pack_max_length": 512,
                "packer": {"class_name": "OneByOne"},
                "collator": {"class_name": "TileCollator"},
            },
            "optimizer": {
                "class_name": "AdamW",
                "lr": 3e-3,
                "eps": 1e-5,
                "weight_decay": 0.1,
                "decay_vectors": True,
                "param_groups": param_groups,
            },
            "lr_schedule": {"class_name": "CosineSchedule", "min_lr": 1e-3},
            "global_batch_size": 4,
            "epoch_num": len(with_pictures(case)) // len(ROUND),
            "parallel": {
                "class_name": "FSDP2",
                "gradient_reduction": reduction,
                "expert_parallel_size": 2 if case == "experts" and num_ranks > 1 else 1,
            },
            "savers": [{"class_name": "WatchParts"}],
        },
    )


def train_all(folder: Path, num_ranks: int, cases: list[str]) -> Path:
    folder.mkdir()
    drive(num_ranks, [str(config_of(folder, case, num_ranks)) for case in cases])
    return folder


def drive(num_ranks: int, configs: list[str]) -> None:
    """Train the configs, one after another, in one launch."""
    script = Path(__file__).with_name("drive_pictures.py")
    if num_ranks == 1:
        # Not by torchrun: a process that shares its cores with nobody would take them all.
        result = subprocess.run(
            [sys.executable, str(script), *configs],
            env=environment_of_a_run(),
            capture_output=True,
            text=True,
            timeout=500,
        )
    else:
        result = torchrun(num_ranks, str(script), *configs, timeout_s=500)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]


def check_same(one: Path, other: Path, cases: list[str]) -> None:
    for case in cases:
        first, second = read_metrics(one / case / "run"), read_metrics(other / case / "run")
        assert len(first) == len(second) == len(with_pictures(case))
        assert [line["tiles"] for line in second[: len(ROUND)]] == list(map(sum, ROUND))
        for a, b in zip(first, second, strict=True):
            for name in ("loss", "grad_norm"):
                assert a[name] == pytest.approx(b[name], rel=1e-5), (case, name, a["step"])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_all(tmp_path_factory.mktemp("alone") / "runs", 1, list(CASES))


def test_two_ranks_with_and_without_pictures_are_as_one(alone: Path, tmp_path: Path) -> None:
    check_same(alone, train_all(tmp_path / "two", 2, list(CASES)), list(CASES))


@pytest.mark.slow
def test_four_ranks_with_and_without_pictures_are_as_one(alone: Path, tmp_path: Path) -> None:
    check_same(alone, train_all(tmp_path / "four", 4, list(CASES)), list(CASES))


@pytest.mark.parametrize(
    ("case", "frozen"),
    [
        ("frozen", {"vision_tower", "multi_modal_projector"}),
        ("tower_frozen", {"vision_tower"}),
        ("all", set()),
        ("text_frozen", {"language_model"}),
    ],
)
def test_frozen_parts_stay_and_the_others_move_with_pictures_only(
    alone: Path, case: str, frozen: set[str]
) -> None:
    lines = (alone / case / "run" / "parts_0.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    pictured = with_pictures(case)
    assert len(steps) == len(pictured)
    for before, after, has_pictures in zip(steps, steps[1:], pictured[1:], strict=False):
        moved = {part for part in after if part != "step" and before[part] != after[part]}
        expected = {"language_model"}
        if has_pictures:
            expected |= {"vision_tower", "multi_modal_projector"}
        assert moved == expected - frozen, after["step"]


def test_a_run_resumed_before_its_tower_saw_a_picture_goes_on_as_one_run(tmp_path: Path) -> None:
    config = json.loads(config_of(tmp_path, "all", 1).read_text(encoding="utf-8"))
    # Steps 1 and 2 have no picture, so the checkpoint holds no optimizer state of tower and projector.
    config["datasets"][0]["dataset"]["tiles"] = [*[0] * 8, 1, 2, 0, 1, 0, 0, 3, 0]
    config["savers"] = [{"class_name": "CheckpointSaver"}, {"class_name": "WatchParts"}]
    config["lr_schedule"] = {"class_name": "ConstantSchedule"}
    config["model"]["vision_config"] = {**MODEL["vision_config"], "drop_path_rate": 0.3}
    del config["epoch_num"]

    def write(name: str, run_name: str, total_steps: int) -> str:
        changes = {"run_name": run_name, "total_steps": total_steps}
        return str(write_config(tmp_path / f"{name}.json", {**config, **changes}))

    whole = write("whole", "whole", 4)
    drive(1, [whole, write("half", "cut", 2), "+" + write("rest", "cut", 4)])
    one, two = (read_metrics(tmp_path / "all" / name) for name in ("whole", "cut"))
    assert [line["loss"] for line in one] == [line["loss"] for line in two]
    parts = [
        (tmp_path / "all" / name / "parts_0.jsonl").read_text(encoding="utf-8").splitlines()
        for name in ("whole", "cut")
    ]
    assert parts[0] == parts[1] and len(parts[0]) == 4
