"""Show an error once, where a person will see it, also under torchrun.

Local rank 0 prints. The other local ranks wait before they do: as soon as one exits, torchrun kills
the rest, and rank 0 could be killed before its message is out. The text also goes to torchrun's
error file, which torchrun repeats last on the screen.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress

__all__ = ["is_speaker", "show_error", "write_error_file"]

_WAIT_S = 10.0


def is_speaker() -> bool:
    """Whether this process prints for its machine: local rank 0, or no torchrun at all."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def show_error(message: str, *, wait_s: float = _WAIT_S) -> None:
    """Print `message` to stderr and hand it to torchrun.

    Args:
        wait_s: seconds that a local rank other than 0 waits before it prints. Where rank 0 fails
        too, torchrun
            ends this process meanwhile, so a shared error is printed once and one rank's own error
            is not lost.
    """
    write_error_file(message)
    if not is_speaker():
        time.sleep(wait_s)
        message = f"[local rank {os.environ['LOCAL_RANK']}] {message}"
    print(message, file=sys.stderr, flush=True)


def write_error_file(message: str, traceback: str | None = None) -> None:
    """Write `message` in the form that torchrun reports as root cause; nothing without it.

    Source: torch.distributed.elastic.multiprocessing.errors, the file that its error handler
    writes.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    extra = {"py_callstack": traceback or message, "timestamp": str(int(time.time()))}
    with suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump({"message": {"message": message, "extraInfo": extra}}, file)
