"""A small chat file, a small config, and ways to run a config as its user would."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORDS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]


def environment_of_a_run() -> dict[str, str]:
    environment = {
        k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
    }
    paths = [str(ROOT / "core"), str(ROOT / "plugins")]
    environment["PYTHONPATH"] = os.pathsep.join([*paths, environment.get("PYTHONPATH", "")])
    environment["OMP_NUM_THREADS"] = "1"
    return environment


def torchrun(
    num_ranks: int, *arguments: str, timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """core/run.py (or another script) under torchrun, in the repository's root."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_ranks), *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment_of_a_run(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def run_alone(*arguments: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """`python core/run.py ...` in the repository's root."""
    command = [sys.executable, str(ROOT / "core" / "run.py"), *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment_of_a_run(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def write_chats(path: Path, number: int) -> Path:
    """`number` short conversations of different lengths."""
    lines = []
    for i in range(number):
        answer = " ".join(WORDS[: 1 + i % len(WORDS)])
        messages = [
            {"role": "user", "content": f"count to {1 + i % len(WORDS)} ({i})"},
            {"role": "assistant", "content": answer},
        ]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tiny_config(work_dir: Path, anno_path: Path, **changes: Any) -> dict[str, Any]:
    """A run of a few seconds on one core."""
    config: dict[str, Any] = {
        "work_dir": str(work_dir),
        "run_name": "run",
        "seed": 7,
        "tokenizer": {"class_name": "ByteTokenizer"},
        "model": {
            "class_name": "Qwen3",
            "vocab_size": 288,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "tie_word_embeddings": True,
        },
        "datasets": [
            {
                "dataset": {
                    "class_name": "JsonlDataset",
                    "name": "chats",
                    "anno_path": str(anno_path),
                },
                "tokenize_fn": {"class_name": "ChatTokenizeFn", "max_length": 256},
            }
        ],
        "dataloader": {"pack_max_length": 256},
        "optimizer": {"class_name": "AdamW", "lr": 3e-3, "eps": 1e-5},
        "global_batch_size": 16,
        "epoch_num": 5,
        "savers": [{"class_name": "HFSaver", "dtype": "float32"}],
    }
    merged = copy.deepcopy(config)
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(merged.get(name), dict):
            merged[name].update(value)
        else:
            merged[name] = value
    return merged


def write_config(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")
    return path


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def drive(num_ranks: int, configs: Sequence[Path], timeout_s: float = 500) -> None:
    """Train several configs in one process group start-up each, in one launch."""
    script = Path(__file__).with_name("drive_runs.py")
    result = torchrun(num_ranks, str(script), *map(str, configs), timeout_s=timeout_s)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
