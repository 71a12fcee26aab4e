"""Tokenize every dataset of a run once, before any process group with a timeout exists.

Local rank 0 writes each dataset's store into `work_dir/.token_store/<fingerprint>` and the other ranks of the
machine wait for the finished folder. A dataset that can't tell its fingerprint gets a folder of this
launch's own, so that a stale store is never reused.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loguru import logger

from pegboard.data_loading import DataSource
from pegboard.token_store import TokenStore, build_store, open_store

if TYPE_CHECKING:
    from pegboard.component import ModelComponent
    from pegboard.contracts import Tokenizer
    from pegboard.run_config import DatasetEntry

__all__ = ["prepare_sources"]

_POLL_S = 0.2


def prepare_sources(
    entries: Sequence[DatasetEntry],
    *,
    work_dir: Path,
    tokenizer: Tokenizer,
    model: ModelComponent,
    num_workers: int,
) -> list[DataSource]:
    """Tokenized datasets in the order of the config.

    Raises:
        DataError: a bad record (unless its dataset skips them), or a dataset without any usable sample.
    """
    sources = []
    for source_id, entry in enumerate(entries):
        dataset = entry.dataset.build(entry.name)
        tokenize = entry.tokenize_fn.build(tokenizer, model)
        seen = dataset.fingerprint()
        parts = [entry.name, entry.on_bad_record, tokenize.fingerprint(), tokenizer.fingerprint()]
        parts.append(seen if seen is not None else _launch_identity())
        digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
        folder = work_dir / ".token_store" / digest
        if os.environ.get("LOCAL_RANK", "0") != "0":
            store = _wait_for(folder)
        elif folder.is_dir() and seen is not None:
            store = open_store(folder)
        else:
            logger.info(f"{entry.name}: tokenizing {len(dataset):,} records")
            store = build_store(
                folder,
                dataset,
                tokenize,
                on_bad_record=entry.on_bad_record,
                num_workers=num_workers,
                name=entry.name,
            )
        may_skip = entry.on_bad_record != "error"
        sources.append(DataSource(store, source_id, entry.name, entry.sample_ratio, may_skip))
    return sources


def _launch_identity() -> str:
    """The same for all local ranks of one launch, and for no other launch: the parent and its start time."""
    parent = os.getppid() if "LOCAL_RANK" in os.environ else os.getpid()
    try:
        started = Path(f"/proc/{parent}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        started = ""  # no /proc: the process id alone has to do
    return f"launch {parent} {started} {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _wait_for(folder: Path) -> TokenStore:
    # If local rank 0 fails, torchrun ends this process; there is nothing to time out on.
    while not folder.is_dir():
        time.sleep(_POLL_S)
    return open_store(folder)
