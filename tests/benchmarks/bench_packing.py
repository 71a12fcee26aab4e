"""Pack planning: CPU seconds, peak memory and fill on lognormal(6.2, 1.1) lengths up to 16,384.

The packers alone, and the whole of an epoch's plan with the default packer: samples chosen, lengths
looked up, packed, counted per source (`epoch`, of three datasets; `epoch, files` also writes it to
disk and maps it).

Run `python tests/benchmarks/bench_packing.py [num_samples ...]`; not collected by pytest. Each case
runs in a process of its own; time is the median of 5 CPU times, and memory is the growth of the
resident peak (mapped files of the plan included).
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

CAPACITY = 16_384
CASES = ("best fit, all", "best fit, windows", "next fit", "cut", "epoch", "epoch, files")


def measure(case: str, num_samples: int) -> str:
    """One line of the table."""
    from pegboard.contracts import Packer
    from pegboard_plugins.packers.best_fit import BestFit
    from pegboard_plugins.packers.in_order import Cut, NextFit

    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6.2, 1.1, num_samples).astype(np.int32), 1, CAPACITY)
    if case.startswith("epoch"):
        return measure_epoch(case, lengths)
    packers: dict[str, Packer] = {
        "best fit, all": BestFit(None),
        "best fit, windows": BestFit(65_536),
        "next fit": NextFit(shuffle=True),
        "cut": Cut(),
    }
    packer = packers[case]
    packer.plan(lengths[:1000], CAPACITY, 0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_mib("VmHWM")
    seconds = []
    for seed in range(5):
        plan = None  # two at once would be twice the memory
        start = time.process_time()
        plan = packer.plan(lengths, CAPACITY, seed)
        seconds.append(time.process_time() - start)
    assert plan is not None
    num_packs = len(plan.offsets) - 1
    fill = int(lengths.sum()) / (num_packs * CAPACITY)
    peak = resident_mib("VmHWM") - before
    cost = f"{statistics.median(seconds):>8.3f} {peak:>9.0f}"
    return f"{case:<18} {num_samples:>11,} {cost} {num_packs:>9,} {fill:>8.5f}"


class Lengths:
    """What a planner asks of a token store."""

    num_tiles = None

    def __init__(self, lengths: np.ndarray) -> None:
        self.lengths, self.num_targets = lengths, lengths // 2

    def __len__(self) -> int:
        return len(self.lengths)

    def content_identity(self) -> str:
        return str(len(self.lengths))


def measure_epoch(case: str, lengths: np.ndarray) -> str:
    from pegboard.epoch_plan import DataSource
    from pegboard.epoch_planner import EpochPlanner
    from pegboard_plugins.packers.best_fit import BestFit

    stores: list[Any] = [Lengths(part.copy()) for part in np.array_split(lengths, 3)]
    num_samples, num_tokens = len(lengths), int(lengths.sum(dtype=np.int64))
    del lengths
    sources = [DataSource(store, i, f"s{i}") for i, store in enumerate(stores)]

    def planner(folder: Path | None, seed: int) -> EpochPlanner:
        return EpochPlanner(
            sources, packer=BestFit(65_536), pack_max_length=CAPACITY, seed=seed, folder=folder
        )

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) if case.endswith("files") else None
        EpochPlanner(
            [DataSource(Lengths(stores[0].lengths[:1000]), 0, "s")],  # type: ignore[arg-type]
            packer=BestFit(65_536),
            pack_max_length=CAPACITY,
        ).plan(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident_mib("VmHWM")
        seconds = []
        for seed in range(5):
            plan = None
            start = time.process_time()
            plan = planner(place, seed).plan(0)
            seconds.append(time.process_time() - start)
        assert plan is not None and plan.num_tokens == num_tokens
        peak = resident_mib("VmHWM") - before
    cost = f"{statistics.median(seconds):>8.3f} {peak:>9.0f}"
    return f"{case:<18} {num_samples:>11,} {cost} {plan.num_packs:>9,} {plan.fill:>8.5f}"


def resident_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    if len(sys.argv) == 4 and sys.argv[1] == "--case":
        print(measure(sys.argv[2], int(sys.argv[3])))
        return
    print(f"{'packer':<18} {'samples':>11} {'cpu s':>8} {'peak MiB':>9} {'packs':>9} {'fill':>8}")
    for num_samples in [int(text) for text in sys.argv[1:]] or [1_000_000, 10_000_000]:
        for case in CASES:
            command = [sys.executable, __file__, "--case", case, str(num_samples)]
            print(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout, end=""
            )


if __name__ == "__main__":
    main()
