"""The folder of a run, and everything written there for a person: logs, metrics, config, environment.

`work_dir/<run_name>/` holds config.json (resolved), plugins.json, environment.json, metrics.jsonl and
logs/rank_<n>.log; savers add their own folders.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
import torch.distributed as dist
from loguru import logger

from pegboard.device import device_name
from pegboard.errors import ConfigError
from pegboard.tracking import TableTracker
from pegboard.train_state import checkpoint_steps

if TYPE_CHECKING:
    from pegboard.contracts import Table
    from pegboard.tracking import Tracker

__all__ = [
    "MetricsLog",
    "check_work_dir",
    "choose_run_dir",
    "describe_environment",
    "log_to_screen",
    "start_logging",
    "write_json",
]

_LONGEST_LINE = 1 << 20
"""Bytes of metrics.jsonl that are looked at for the end of its last whole line."""


def check_work_dir(work_dir: str) -> None:
    """Make the folder and a file in it, before anything slow.

    Raises:
        ConfigError: it can't be written.
    """
    try:
        Path(work_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=work_dir):
            pass
    except OSError as error:
        raise ConfigError(
            f"work_dir: {work_dir!r} can't be written ({error.strerror}); name a folder that can"
        ) from error


def choose_run_dir(work_dir: str, run_name: str | None, *, resume: bool) -> Path:
    """Folder of this run, the same on every rank; collective.

    Without a name it is the time of day, or, when resuming, the newest run that has a checkpoint.

    A run that starts anew where an earlier one left checkpoints sets that one's folder aside:
    resuming later could take up the wrong checkpoint.
    """
    name = run_name
    if dist.get_rank() == 0:
        if name is None and resume:
            runs = [p.parent for p in Path(work_dir).glob("*/checkpoints")]
            runs = [run for run in runs if checkpoint_steps(run)]
            if runs:
                name = max(runs, key=lambda run: run.stat().st_mtime).name
        if name is None:
            name = _new_folder(Path(work_dir))
        elif not resume:
            _set_aside(Path(work_dir) / name)
    names: list[Any] = [name]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(names, src=0)
    run_dir = Path(work_dir) / str(names[0])
    run_dir.mkdir(parents=True, exist_ok=True)
    return run_dir


def _new_folder(work_dir: Path) -> str:
    """Make a folder that is this run's alone and return its name, the time of day.

    Runs that waited for one another's tokenizing begin in the same second.
    """
    name = time_of_day = time.strftime("%Y%m%d-%H%M%S")
    number = 1
    while True:
        try:
            (work_dir / name).mkdir(parents=True)
            return name
        except FileExistsError:
            number += 1
            name = f"{time_of_day}-{number}"


def _set_aside(run_dir: Path) -> None:
    """Rename the folder of an earlier run that has checkpoints; nothing is deleted."""
    if any((run_dir / "checkpoints").glob("step_*")):
        aside = run_dir.with_name(f"{run_dir.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
        run_dir.rename(aside)
        logger.warning(
            f"{run_dir} has checkpoints of an earlier run, and --resume is not set: moved to {aside}"
        )


def log_to_screen() -> None:
    """One line per event on the screen and nowhere else: while there is no run folder yet."""
    logger.remove()
    logger.add(_screen, format="{time:HH:mm:ss} {level: <7} {message}", level="INFO", colorize=None)


def start_logging(run_dir: Path, rank: int) -> None:
    """One line per event: rank 0 on the screen, every rank in a file of its own."""
    log_to_screen()
    if rank != 0:
        logger.remove()
    logger.add(
        run_dir / "logs" / f"rank_{rank}.log",
        format="{time:YYYY-MM-DD HH:mm:ss.SSS} {level: <7} {message}",
        level="DEBUG",
    )


def _screen(message: Any) -> None:
    from tqdm import tqdm

    tqdm.write(str(message), file=sys.stderr, end="")  # keeps a progress bar in one piece


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON by temporary file and rename."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def describe_environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """What somebody needs to repeat a run: versions, device, ranks."""
    packages = {d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"]}
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "device": device_name(device),
        "world_size": world_size,
        "cpu_count": os.cpu_count(),
        "torch": torch.__version__,
        "packages": dict(sorted(packages.items())),
    }


class MetricsLog:
    """metrics.jsonl and the trackers; does something on rank 0 only."""

    def __init__(self, run_dir: Path, trackers: Sequence[Tracker], *, active: bool) -> None:
        self._trackers = trackers
        self._file: TextIO | None = None
        if active:
            path = run_dir / "metrics.jsonl"
            _drop_torn_line(path)
            self._file = path.open("a", encoding="utf-8")

    def log(
        self, step: int, metrics: Mapping[str, float], tables: Mapping[str, Table] | None = None
    ) -> None:
        """Append one line; keys are published (`loss`, `lr`, `grad_norm`, `loss/<source>`, ...).

        Tables go to the trackers that take them.
        """
        if self._file is None:
            return
        # JSON has no NaN: a number that is not finite is null.
        line = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **line}) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.log(step, metrics)
            if tables and isinstance(tracker, TableTracker):
                tracker.log_tables(step, tables)

    def close(self) -> None:
        """Close the file and every tracker."""
        if self._file is not None:
            self._file.close()
            for tracker in self._trackers:
                tracker.close()


def _drop_torn_line(path: Path) -> None:
    """Take off the line that a full disk or a power cut left unfinished: the next would be joined to it."""
    if not path.is_file():
        return
    with path.open("rb+") as file:
        start = max(0, file.seek(0, os.SEEK_END) - _LONGEST_LINE)
        file.seek(start)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(start + whole)
