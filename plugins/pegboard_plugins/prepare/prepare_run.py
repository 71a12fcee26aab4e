"""What `pegboard prepare` does: the data side of a run's start, without ranks and without a model."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from loguru import logger

from pegboard.assemble import build_run_data
from pegboard.command import print_text
from pegboard.data_report import describe_plan, describe_store
from pegboard.preparation import cache_folder, prepare_sources

if TYPE_CHECKING:
    from pegboard.run_config import RunConfig

__all__ = ["prepare_run"]


def prepare_run(
    run: RunConfig,
    *,
    limit: int | None = None,
    num_workers: int | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Make the token stores of a run and the plan of its first epoch; print what they come to.

    Args:
        limit: take only so many records of each dataset.
        num_workers: processes that tokenize; None: one per core; 0: this one does.

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
        )
        data = build_run_data(
            run,
            None,
            sources,
            tokenizer,
            global_batch_size=run.global_batch_size,
            last_epoch=last_epoch,
        )
        plan = data.plan_epoch(0)
        lines = [line for source in sources for line in describe_store(source.store)]
        lines += describe_plan(sources, plan, global_batch_size=run.global_batch_size)
        print_text("\n".join(lines))


def _screen(message: object) -> None:
    from tqdm import tqdm

    tqdm.write(str(message), file=sys.stderr, end="")  # keeps a progress bar in one piece
