"""Train one config again and again, killing it at random points, until it is done (a script, not a test).

    python killed_runs.py CONFIG METRICS NUM_KILLS SEED

Each attempt is a fork of this process, which has everything imported: an attempt costs no start-up.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from pegboard.plugin_manager import load_plugins
from pegboard.run_config import load_run_config
from pegboard.trainer import train


def attempt(config: Path, *, resume: bool) -> int:
    """Process id of a fork that trains."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        plugins = load_plugins()
        train(load_run_config(config, (), plugins.registry), plugins, resume=resume)
        status = 0
    finally:
        os._exit(status)


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_somewhere(child: int, metrics: Path, chance: random.Random) -> bool:
    """Kill the attempt after a few more steps, and not between two; False if it ended by itself."""
    until = count_lines(metrics) + chance.randint(0, 15)
    while count_lines(metrics) < until:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
    return True


def main() -> None:
    config, metrics = Path(sys.argv[1]), Path(sys.argv[2])
    num_kills, chance = int(sys.argv[3]), random.Random(int(sys.argv[4]))
    kills = 0
    for number in range(num_kills + 1):
        child = attempt(config, resume=number > 0)
        if number < num_kills:
            kills += kill_somewhere(child, metrics, chance)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            print(f"ended with status {status} after {kills} kills")
            return


if __name__ == "__main__":
    main()
