"""A preparation that is killed anywhere, and however many share it, ends in the same store and batches."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT, environment_of_a_run, read_metrics, tiny_config, torchrun, write_config

NUM_RECORDS = 1500


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of which some are dropped, cut or bad."""
    lines = []
    for i in range(NUM_RECORDS):
        messages = [
            {"role": "user", "content": f"question {i} " + "x" * (i % 400)},
            {"role": "assistant", "content": f"answer {i}"},
        ]
        lines.append("nonsense" if i % 97 == 5 else json.dumps({"messages": messages}))
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    path.write_text("\n".join(lines) + "\n")
    time.sleep(2.1)  # so that its times can be trusted, and every start takes the same way
    return path


def config_of(folder: Path, chats: Path, **changes: Any) -> Path:
    config = tiny_config(folder / "work", chats, epoch_num=None, total_steps=2, **changes)
    config["datasets"][0]["dataset"]["on_bad_record"] = "skip"
    config["savers"] = []
    return write_config(folder / "config.json", config)


def store_files(folder: Path) -> dict[str, bytes]:
    """Every byte of the store and of the plan, by name."""
    cache = folder / "work" / ".token_store"
    (meta,) = cache.glob("*/meta.json")
    found = {path.name: path.read_bytes() for path in meta.parent.iterdir()}
    for path in cache.glob("plans/*/epoch_00000/*"):
        found[f"plan/{path.name}"] = path.read_bytes()
    return found


def start(*words: str) -> subprocess.Popen[bytes]:
    """`pegboard ...` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "core" / "run.py"), *words],
        cwd=ROOT,
        env=environment_of_a_run(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def run(*words: str) -> None:
    process = start(*words)
    assert process.wait(300) == 0


def killed_after(process: subprocess.Popen[bytes], seconds: float, *, group: bool) -> bool:
    """Whether it was still there to be killed."""
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        pass
    if group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait(60)
    return True


@pytest.fixture(scope="module")
def whole(chats: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], float]:
    """What an undisturbed preparation gives, and the seconds it takes."""
    folder = tmp_path_factory.mktemp("whole")
    begin = time.monotonic()
    run("prepare", str(config_of(folder, chats)), "--workers", "2", "--no-third-party")
    return store_files(folder), time.monotonic() - begin


@pytest.mark.slow
@pytest.mark.parametrize("place", range(20))
def test_a_preparation_killed_anywhere_and_run_again_gives_the_same_bytes(
    place: int, whole: tuple[dict[str, bytes], float], chats: Path, tmp_path: Path
) -> None:
    expected, seconds = whole
    config = config_of(tmp_path, chats)
    draw = random.Random(place)
    # Most of a short run is the start of Python: aim at the part behind it.
    delays = [draw.uniform(0.3, 1.0) * seconds for _ in range(1 + place % 3)]
    for delay in delays:
        words = ["prepare", str(config), "--workers", str(place % 3), "--no-third-party"]
        killed_after(start(*words), delay, group=place % 2 == 0)
    run("prepare", str(config), "--workers", str((place + 1) % 3), "--no-third-party")
    assert store_files(tmp_path) == expected
    leftovers = [path.name for path in (tmp_path / "work" / ".token_store").glob(".*")]
    assert leftovers == []


@pytest.mark.slow
def test_a_preparation_killed_after_every_part_does_each_part_once(
    whole: tuple[dict[str, bytes], float], chats: Path, tmp_path: Path
) -> None:
    config = config_of(tmp_path, chats)
    cache = tmp_path / "work" / ".token_store"
    made: dict[str, int] = {}
    for _ in range(8):
        process = start("prepare", str(config), "--workers", "1", "--no-third-party")
        enough = len(made) + 3
        while process.poll() is None and len(made) < enough:
            for part in cache.glob(".*.draft/*.part"):
                try:
                    made.setdefault(part.name, part.stat().st_ino)
                except FileNotFoundError:
                    continue
            time.sleep(0.005)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
        for part in cache.glob(".*.draft/*.part"):
            assert made.setdefault(part.name, part.stat().st_ino) == part.stat().st_ino
    run("prepare", str(config), "--workers", "1", "--no-third-party")
    assert store_files(tmp_path) == whole[0]


def torchrun_processes(session: int) -> list[int]:
    """Every process of a launch, by its session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def launch(num_ranks: int, config: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_ranks), str(ROOT / "core" / "run.py"), str(config)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment_of_a_run(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("place", range(20))
def test_a_training_start_killed_anywhere_and_run_again_trains_on_the_same_batches(
    place: int, whole: tuple[dict[str, bytes], float], chats: Path, tmp_path: Path
) -> None:
    expected, seconds = whole
    config = config_of(tmp_path, chats)
    num_ranks = 1 + place % 2
    process = launch(num_ranks, config)
    try:
        process.wait(random.Random(place).uniform(0.6, 2.0) * seconds)
    except subprocess.TimeoutExpired:
        for pid in torchrun_processes(process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait(60)
    shutil.rmtree(tmp_path / "work" / "run", ignore_errors=True)
    done = torchrun(num_ranks, str(ROOT / "core" / "run.py"), str(config))
    assert done.returncode == 0, done.stderr[-3000:]
    assert store_files(tmp_path) == expected
    losses = [line["loss"] for line in read_metrics(tmp_path / "work" / "run")]
    assert losses == pytest.approx(_losses(num_ranks, chats, tmp_path), rel=1e-6)


def _losses(num_ranks: int, chats: Path, tmp_path: Path) -> Sequence[float]:
    """Of a run that nothing disturbed; one per number of ranks is kept beside the data."""
    kept = chats.with_name(f"losses_{num_ranks}.json")
    if not kept.exists():
        folder = tmp_path / "undisturbed"
        folder.mkdir()
        done = torchrun(num_ranks, str(ROOT / "core" / "run.py"), str(config_of(folder, chats)))
        assert done.returncode == 0, done.stderr[-3000:]
        kept.write_text(json.dumps([m["loss"] for m in read_metrics(folder / "work" / "run")]))
    losses: list[float] = json.loads(kept.read_text())
    return losses


SLOW_FN = '''
import os, time
import numpy as np
import pegboard
from pydantic import Field
from pegboard import Example

class SlowTokenizeFn(pegboard.TokenizeFnComponent):
    """Takes its time, and dies on local rank 0 if asked."""

    class Config(pegboard.ComponentConfig):
        max_length: int = Field(default=64, description="x")
        die: str = Field(default="", description="x")
        log: str = Field(default="", description="x")

    config: Config

    def build(self, tokenizer, model):
        return Slow(self.config)

class Slow:
    def __init__(self, config):
        self.config, self.max_length, self.seen = config, config.max_length, 0

    def __call__(self, record):
        time.sleep(0.01)
        self.seen += 1
        rank = os.environ.get("LOCAL_RANK", "0")
        with open(f"{self.config.log}.{rank}", "a") as file:
            file.write("x")
        if rank == self.config.die and self.seen == 40:
            os.kill(os.getpid(), 9)
        ids = np.arange(1, 9, dtype=np.int32)
        return [Example(input_ids=ids, loss_mask=ids > 2)]

    def take_counts(self):
        return {}

    def fingerprint(self):
        return "1"

@pegboard.hookimpl
def register_tokenize_fns(register):
    register(SlowTokenizeFn)
'''


def slow_config(folder: Path, num_records: int, **fields: str) -> list[str]:
    """Words of a command line."""
    data = folder / "data.jsonl"
    data.write_text("{}\n" * num_records)
    plugin = folder / "peg_slow_fn.py"
    plugin.write_text(SLOW_FN)
    config = tiny_config(folder / "work", data, epoch_num=None, total_steps=1, savers=[])
    config["datasets"][0]["tokenize_fn"] = {
        "class_name": "SlowTokenizeFn", "log": str(folder / "log"), **fields,
    }  # fmt: skip
    return [str(write_config(folder / "config.json", config)), "--plugin", str(plugin)]


@pytest.mark.slow
def test_ranks_share_the_tokenizing_at_the_start_of_training(tmp_path: Path) -> None:
    words = slow_config(tmp_path, 640)
    done = torchrun(2, str(ROOT / "core" / "run.py"), *words)
    assert done.returncode == 0, done.stderr[-3000:]
    shares = [len((tmp_path / f"log.{rank}").read_text()) for rank in (0, 1)]
    assert sum(shares) == 640, "each record once"
    assert min(shares) >= 160, shares


@pytest.mark.slow
def test_a_local_rank_0_that_dies_while_it_tokenizes_ends_the_launch_without_a_hang(
    tmp_path: Path,
) -> None:
    words = slow_config(tmp_path, 640, die="0")
    begin = time.monotonic()
    done = torchrun(2, str(ROOT / "core" / "run.py"), *words, timeout_s=120)
    assert done.returncode != 0
    assert time.monotonic() - begin < 60


@pytest.mark.slow
def test_the_work_of_a_process_that_died_is_taken_over_by_one_that_waits_for_it(
    tmp_path: Path,
) -> None:
    # So many that either gets parts enough, whoever starts first.
    words = slow_config(tmp_path, 640, die="0")
    environments = [{**environment_of_a_run(), "LOCAL_RANK": rank} for rank in ("0", "1")]
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "core" / "run.py"), "prepare", *words, "--workers", "0"],
            cwd=ROOT, env=environment,
        )
        for environment in environments
    ]  # fmt: skip
    codes = [process.wait(120) for process in processes]
    assert codes == [-signal.SIGKILL, 0]
    assert len(list((tmp_path / "work" / ".token_store").glob("*/meta.json"))) == 1
