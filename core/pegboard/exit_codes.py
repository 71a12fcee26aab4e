"""How a process came to its end, in words."""

from __future__ import annotations

import signal

__all__ = ["how_it_ended"]


def how_it_ended(exit_code: int) -> str:
    """`exit code 1`; `killed by SIGSEGV`.

    Args:
        exit_code: as `multiprocessing.Process.exitcode` has it: less than 0 for a signal.
    """
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:  # a real-time signal
        name = f"signal {-exit_code}"
    memory = ", perhaps for want of memory" if -exit_code == signal.SIGKILL else ""
    return f"killed by {name}{memory}"
