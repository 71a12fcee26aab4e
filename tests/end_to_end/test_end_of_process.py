"""Claim: a process whose last collectives' threads are late still ends with its own exit code."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from launching import torchrun

# The group outlives `leave_ranks`, as it does behind the caches of DTensor. Its threads share one
# processor with the main thread and get almost none of it, as on a machine with much to do.
SCRIPT = r"""
import os
import sys
import torch
import torch.distributed as dist
from pegboard.parallel import join_ranks, leave_ranks

ranks = join_ranks(torch.device("cpu"))
processor = min(os.sched_getaffinity(0))
found = 0
for thread in os.listdir("/proc/self/task"):
    os.sched_setaffinity(int(thread), {processor})
    with open(f"/proc/self/task/{thread}/comm") as file:
        if "gloo" in file.read():
            os.setpriority(os.PRIO_PROCESS, int(thread), 19)
            found += 1
for _ in range(20):
    sums = torch.ones(4)
    dist.all_reduce(sums)
leave_ranks()
os.write(1, f"threads of gloo: {found}\n".encode())  # whole: ranks share the pipe
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or not Path("/proc/self/task").is_dir(),
    reason="needs Linux: it slows single threads down",
)
def test_threads_that_are_late_with_the_last_sums_do_not_abort_the_process(tmp_path: Path) -> None:
    script = tmp_path / "late.py"
    script.write_text(SCRIPT, encoding="utf-8")
    result = torchrun(4, str(script))
    assert "terminate called" not in result.stderr
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("threads of gloo: ") == 4
    assert "threads of gloo: 0" not in result.stdout
