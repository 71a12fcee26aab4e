"""The threads of gloo at the end of a process.

They outlive their group, as torch's caches keep its mesh. One that has finished a collective but not let go
of its tensors needs the GIL for that, and where the interpreter ends meanwhile, the process aborts
("terminate called without an active exception"). Nothing tells when they are done; but while the main thread
sleeps the GIL is free, so a thread that is late is ready to run, and Linux says which are.

NOTE: this module goes with Python < 3.14 (gh-87135), or with a torch that has
https://github.com/pytorch/pytorch/issues/190489 fixed.
"""

from __future__ import annotations

import time
from pathlib import Path

__all__ = ["let_gloo_finish"]

_TURNS = 20
_TURN_S = 0.005
_AT_MOST_S = 10.0


def let_gloo_finish() -> None:
    """Give gloo's threads the GIL until none of them has waited for a processor in 20 turns of 5 ms."""
    threads = _threads_of_gloo()
    until = time.monotonic() + _AT_MOST_S
    quiet = 0
    while quiet < _TURNS and time.monotonic() < until:
        time.sleep(_TURN_S)
        quiet = 0 if any(map(_is_ready_to_run, threads)) else quiet + 1


def _threads_of_gloo() -> list[Path]:
    """Their folders in /proc; none on a system that has no such folders."""
    try:
        tasks = list(Path("/proc/self/task").iterdir())
    except OSError:
        return []
    return [task for task in tasks if "gloo" in _read(task / "comm")]


def _is_ready_to_run(task: Path) -> bool:
    # The state follows the name in parentheses, which may hold any character.
    return _read(task / "stat").rpartition(")")[2].split()[:1] == ["R"]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:  # the thread has ended
        return ""
