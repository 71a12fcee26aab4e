"""The second start on a large prepared set: seconds from imports to the first batch, and memory.

`python tests/benchmarks/bench_start.py [--samples 10000000] [--tokens 32] [--folder /tmp]
[--tokenizer FOLDER]` makes a jsonl of so many lines and a store of made-up samples for it (written
straight into part files, as tokenizing takes hours), has `pegboard prepare` put them together and
plan an epoch, then starts fresh processes that do what training does up to its first batch. Memory is
private: what the process holds beyond mapped files, at its highest, less what the imports took.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "core"), str(ROOT / "plugins")]

PROBE = """
import json, os, sys, threading, time

def private_kib():
    fields = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))

import torch, numpy, pegboard.trainer
from pegboard.assemble import build_run_data
from pegboard.data_loading import Cursor
from pegboard.plugin_manager import load_plugins
from pegboard.preparation import cache_folder, prepare_sources
from pegboard.run_config import load_run_config
if sys.argv[2] == "hf":
    import transformers
    from transformers import AutoTokenizer
from loguru import logger
logger.remove()
base = private_kib()
peak, stop = [base], threading.Event()
def watch():
    while not stop.wait(0.002):
        peak[0] = max(peak[0], private_kib())
thread = threading.Thread(target=watch)
thread.start()
wall, cpu = time.perf_counter(), time.process_time()
marks = []
run = load_run_config(sys.argv[1], (), load_plugins(third_party=False).registry).run
tokenizer = run.tokenizer.build()
marks.append(time.perf_counter() - wall)
sources = prepare_sources(run.datasets, cache=cache_folder(run), tokenizer=tokenizer, model=run.model, num_workers=0)
marks.append(time.perf_counter() - wall)
data = build_run_data(run, None, sources, tokenizer, global_batch_size=run.global_batch_size, last_epoch=0)
steps = data.steps_per_epoch(0)
batches = data.batches_at(Cursor(), steps_left=steps)
seconds, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
private = max(peak[0], private_kib()) - base
stop.set(); thread.join(); data.close()
assert sum(len(source.store) for source in sources) == int(sys.argv[3])
print(json.dumps([*marks, seconds, cpu_s, private / 1024]))
"""


def write_config(folder: Path, tokenizer: str | None) -> Path:
    config = {
        "work_dir": str(folder / "work"),
        "tokenizer": {"class_name": "HFTokenizer", "path": tokenizer}
        if tokenizer
        else {"class_name": "ByteTokenizer"},
        "model": {"class_name": "Qwen3", "preset": "qwen3-0.6b"},
        "datasets": [
            {
                "dataset": {
                    "class_name": "JsonlDataset",
                    "name": "made",
                    "anno_path": str(folder / "data.jsonl"),
                },
                "tokenize_fn": {"class_name": "TextTokenizeFn", "max_length": 4096},
            }
        ],
        "dataloader": {"pack_max_length": 4096},
        "global_batch_size": 8,
        "epoch_num": 1,
    }
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def make_up_parts(mean_tokens: int) -> None:
    """Have parts written without tokenizing: lengths around a mean, ids of no meaning."""
    import numpy as np

    from pegboard.record_tokenizing import RecordJob
    from pegboard.sample_files import KEY_DTYPE, PartSummary, PartWriter

    def write_part(
        self: RecordJob,
        path: Path,
        start: int,
        stop: int,
        tell: Callable[[int, int], None],
        before_commit: Callable[[PartSummary], None],
    ) -> None:
        number = stop - start
        draw = np.random.default_rng(start)
        lengths = np.clip(draw.lognormal(np.log(mean_tokens) - 0.5, 1.0, number), 2, 4096)
        lengths = lengths.astype("<i4")
        keys = np.zeros(number, dtype=KEY_DTYPE)
        keys["line"] = np.arange(start + 1, stop + 1)
        total = int(lengths.sum())
        writer: Any = PartWriter(path)
        zeros = np.zeros(number, dtype="<i4")
        columns = [lengths, lengths - 1, zeros, zeros, keys]
        columns += [np.zeros(total, "<i4"), np.ones(total, np.uint8)]
        writer.write_columns(columns, b"")
        writer.summary.num_records = number
        writer.name_files([self.dataset.key(start).file])
        writer.commit()
        tell(start, total)

    RecordJob.write_part = write_part  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--tokenizer", default=None)
    arguments = parser.parse_args()
    from pegboard.cli import main as pegboard

    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        with (folder / "data.jsonl").open("wb") as file:
            lines = b'{"text": "abc"}\n' * 100_000
            for done in range(0, arguments.samples, 100_000):
                file.write(lines[: 16 * min(100_000, arguments.samples - done)])
        config = write_config(folder, arguments.tokenizer)
        make_up_parts(arguments.tokens)
        begin = time.perf_counter()
        assert pegboard(["prepare", str(config), "--workers", "0", "--no-third-party"]) == 0
        print(f"put together and planned in {time.perf_counter() - begin:.1f} s")
        kind = "hf" if arguments.tokenizer else "bytes"
        rows = []
        for _ in range(arguments.rounds):
            done_process = subprocess.run(
                [sys.executable, "-c", PROBE, str(config), kind, str(arguments.samples)],
                env={"PYTHONPATH": f"{ROOT / 'core'}:{ROOT / 'plugins'}", "HOME": str(folder)},
                capture_output=True,
                text=True,
                check=True,
            )
            rows.append(json.loads(done_process.stdout))
        medians = [statistics.median(column) for column in zip(*rows, strict=True)]
        print(f"{arguments.samples:,} samples, median of {arguments.rounds} starts:")
        for what, value in zip(
            ("config and tokenizer s", "stores open s", "first batch s", "cpu s", "private MiB"),
            medians,
            strict=True,
        ):
            print(f"  {what:24} {value:8.2f}")


if __name__ == "__main__":
    main()
