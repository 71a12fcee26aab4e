"""Pack planning: CPU seconds, peak memory and fill on lognormal(6.2, 1.1) lengths up to 16,384.

Run `python tests/benchmarks/bench_packing.py [num_samples ...]`; not collected by pytest. Each case
runs in a process of its own; time is the median of 5 CPU times, and memory is the growth of the
resident peak.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

CAPACITY = 16_384


def measure(case: str, num_samples: int) -> str:
    """One line of the table."""
    from pegboard.contracts import Packer
    from pegboard_plugins.packers.best_fit import BestFit
    from pegboard_plugins.packers.in_order import Cut, NextFit

    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6.2, 1.1, num_samples).astype(np.int64), 1, CAPACITY)
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
        for case in ("best fit, all", "best fit, windows", "next fit", "cut"):
            command = [sys.executable, __file__, "--case", case, str(num_samples)]
            print(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout, end=""
            )


if __name__ == "__main__":
    main()
