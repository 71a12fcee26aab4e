"""What a step waits for its batches, as a share of the step: text, batches by a thread and by workers.

Run `python tests/benchmarks/bench_data_wait.py [--steps N]`; not collected by pytest. Each case is a
run of `core/run.py` on one process: Qwen3 of 4 layers, hidden 256, packs of 2,048 tokens, 4 packs per
step, synthetic chats of lognormal lengths. The first two steps (start-up) are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FIRST_STEPS = 2


def write_chats(path: Path, number: int) -> Path:
    chance = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(number):
            words = [
                str(chance.randrange(1000))
                for _ in range(min(400, int(chance.lognormvariate(4, 1)) + 1))
            ]
            messages = [
                {"role": "user", "content": " ".join(words[: len(words) // 2 + 1])},
                {"role": "assistant", "content": " ".join(words)},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def config_of(folder: Path, chats: Path, workers: int, steps: int) -> dict[str, Any]:
    return {
        "work_dir": str(folder),
        "run_name": "run",
        "cache_dir": str(chats.parent / "cache"),
        "tokenizer": {"class_name": "ByteTokenizer"},
        "model": {
            "class_name": "Qwen3",
            "vocab_size": 288,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "tie_word_embeddings": True,
        },
        "datasets": [
            {
                "dataset": {"class_name": "JsonlDataset", "name": "chats", "anno_path": str(chats)},
                "tokenize_fn": {"class_name": "ChatTokenizeFn", "max_length": 2048},
            }
        ],
        "dataloader": {"pack_max_length": 2048, "num_workers": workers},
        "global_batch_size": 4,
        "total_steps": steps,
        "savers": [],
    }


def measure(chats: Path, workers: int, steps: int) -> str:
    """One line of the table."""
    folder = Path(tempfile.mkdtemp(dir=chats.parent))
    config = folder / "config.json"
    config.write_text(json.dumps(config_of(folder, chats, workers, steps)))
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "core"), str(ROOT / "plugins")])
    subprocess.run(
        [sys.executable, str(ROOT / "core" / "run.py"), str(config)],
        env=environment,
        check=True,
        capture_output=True,
    )
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines][FIRST_STEPS:]
    waits = [m["data_wait_s"] for m in metrics]
    step_s = [m["step_s"] for m in metrics]
    share = sum(waits) / sum(step_s)
    return (
        f"{workers:>7} {len(metrics):>6} {1000 * statistics.median(step_s):>10.0f} "
        f"{1000 * statistics.median(waits):>13.3f} {1000 * max(waits):>11.2f} {share:>8.3%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        chats = write_chats(Path(folder) / "chats.jsonl", 2000)
        print(
            f"{'workers':>7} {'steps':>6} {'step ms':>10} {'wait median':>13} {'wait max':>11} {'share':>8}"
        )
        for workers in (0, 2):
            print(measure(chats, workers, steps), flush=True)


if __name__ == "__main__":
    main()
