"""What `pegboard prepare` does: the data side of a run's start, without ranks and without a model."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

from loguru import logger

from pegboard.assemble import build_run_data
from pegboard.command import print_text
from pegboard.data_report import describe_plan, describe_store
from pegboard.preparation import cache_folder, prepare_sources

if TYPE_CHECKING:
    from pegboard.data_loading import RunData
    from pegboard.run_config import RunConfig

__all__ = ["prepare_run"]

_TELL_S = 10.0


def prepare_run(
    run: RunConfig,
    *,
    limit: int | None = None,
    num_workers: int | None = None,
    trust_remote_code: bool = False,
    fresh: bool = False,
) -> None:
    """Make the token stores of a run and the plans of its epochs; print what they come to.

    Args:
        limit: take only so many records of each dataset.
        num_workers: processes that tokenize; None: one per core; 0: this one does.
        fresh: make the stores anew.

    Raises:
        DataError: a bad record that its dataset does not allow, or nothing to train on.
    """
    logger.remove()
    logger.add(_screen, format="{time:HH:mm:ss} {level: <7} {message}", level="INFO", colorize=None)
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0))
    tokenizer = run.tokenizer.build(trust_remote_code=trust_remote_code)
    lists = [(run.datasets, run.epoch_num - 1 if run.epoch_num else None)]
    if run.eval:
        lists.append((run.eval.datasets, 0))
    for entries, last_epoch in lists:
        sources = prepare_sources(
            entries,
            cache=cache_folder(run),
            tokenizer=tokenizer,
            model=run.model,
            num_workers=num_workers,
            limit=limit,
            log_counts=False,
            fresh=fresh,
        )
        data = build_run_data(
            run,
            None,
            sources,
            tokenizer,
            global_batch_size=run.global_batch_size,
            last_epoch=last_epoch,
        )
        lines = [line for source in sources for line in describe_store(source.store)]
        lines += describe_plan(sources, data.plan_epoch(0), global_batch_size=run.global_batch_size)
        if entries is run.datasets:
            lines.append(_plan_run(data, run))
        print_text("\n".join(lines))


def _plan_run(data: RunData, run: RunConfig) -> str:
    """Plan all epochs that the run trains, where plans are kept; what they come to, as a line."""
    keeps, told = data.planner.keeps_files, time.monotonic()
    num_steps = epoch = 0
    while num_steps < run.total_steps if run.total_steps else epoch < (run.epoch_num or 1):
        if epoch and run.total_steps and not keeps:
            break  # each rank plans a small set for itself when it gets there
        data.planner.prepare(epoch)
        num_steps += data.steps_per_epoch(epoch)
        epoch += 1
        if time.monotonic() - told > _TELL_S:
            told = time.monotonic()
            logger.info(f"planned {epoch} epochs of the run")
    if run.total_steps:
        return f"the run: {run.total_steps:,} steps, {run.total_steps / (num_steps / epoch):,.2f} epochs"
    return f"the run: {num_steps:,} steps, {epoch:,} {'epoch' if epoch == 1 else 'epochs'}"


def _screen(message: object) -> None:
    from tqdm import tqdm

    tqdm.write(str(message), file=sys.stderr, end="")  # keeps a progress bar in one piece
