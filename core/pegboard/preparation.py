"""Tokenize every dataset of a run once, before any process group with a timeout exists.

Each dataset has a store in the cache folder, named by all that can change it. Where it is missing, all
ranks that are there make it together, each a share of its parts; whoever has nothing to do waits for
those who are alive. A dataset that can't tell its fingerprint gets a store of this launch's own, so
that a stale one is never used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loguru import logger

from pegboard.built_parts import check_built
from pegboard.contracts import Dataset, TokenizeFn, Tokenizer
from pegboard.data_loading import DataSource
from pegboard.data_report import describe_store
from pegboard.file_identity import content_hashes
from pegboard.launch_errors import is_speaker
from pegboard.record_tokenizing import (
    FirstRecords,
    RecordSchema,
    data_files,
    load_record_schema,
)
from pegboard.sample_files import FORMAT_VERSION
from pegboard.stored_samples import USED_FILE, TokenStore
from pegboard.token_store import BuildProgress, build_store

if TYPE_CHECKING:
    from pegboard.component import ModelComponent
    from pegboard.run_config import DatasetEntry, RunConfig

__all__ = ["HASHES_FOLDER", "PLANS_FOLDER", "cache_folder", "prepare_sources"]

_LOG_EVERY_S = 30.0
HASHES_FOLDER, PLANS_FOLDER = "file_hashes", "plans"
"""In the cache folder, beside the stores."""


def cache_folder(run: RunConfig) -> Path:
    """Where the token stores of a run are."""
    return Path(run.cache_dir) if run.cache_dir else Path(run.work_dir) / ".token_store"


def prepare_sources(
    entries: Sequence[DatasetEntry],
    *,
    cache: Path,
    tokenizer: Tokenizer,
    model: ModelComponent,
    num_workers: int,
    limit: int | None = None,
    log_counts: bool = True,
    fresh: bool = False,
) -> list[DataSource]:
    """Tokenized datasets in the order of the config.

    Args:
        cache: folder of the stores, as `cache_folder` gives it.
        num_workers: processes that tokenize; 0: this one does.
        limit: take only so many records of each dataset.
        log_counts: log what became of the records of each.
        fresh: make the stores anew, also those that are there; for media that have changed, which a
            store's name does not cover.

    Raises:
        DataError: a bad record (unless its dataset allows it), or a dataset without any sample.
    """
    sources = []
    for source_id, entry in enumerate(entries):
        store = _prepare(entry, cache, tokenizer, model, num_workers, limit, fresh)
        if log_counts and is_speaker():
            for line in describe_store(store):
                logger.info(line)
        may_skip = entry.on_bad_record != "error"
        sources.append(
            DataSource(
                store,
                source_id,
                entry.name,
                sample_ratio=entry.sample_ratio,
                may_skip=may_skip,
                draw=entry.sample_draw,
                token_weight=entry.token_weight,
            )
        )
    return sources


def _prepare(
    entry: DatasetEntry,
    cache: Path,
    tokenizer: Tokenizer,
    model: ModelComponent,
    num_workers: int,
    limit: int | None,
    fresh: bool,
) -> TokenStore:
    dataset = check_built(entry.dataset, entry.dataset.build(entry.name))
    if limit is not None:
        dataset = FirstRecords(dataset, limit)
    tokenize = check_built(entry.tokenize_fn, entry.tokenize_fn.build(tokenizer, model))
    schema = _record_schema(entry, dataset)
    fingerprint = _fingerprint(entry, dataset, tokenize, tokenizer, schema, cache)
    folder = cache / fingerprint[:24]
    if fresh:
        _discard(folder)
    with _Teller(entry.name) as tell:
        store = build_store(
            folder,
            dataset,
            tokenize,
            name=entry.name,
            schema=schema,
            fingerprint=fingerprint,
            on_bad_record=entry.on_bad_record,
            num_workers=num_workers,
            progress=tell,
        )
    try:
        os.utime(folder / USED_FILE)
    except OSError:
        pass  # a cache that only others may write
    return store


def _discard(folder: Path) -> None:
    """Its name first, so that nobody opens half of it; who has it open reads on."""
    gone = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.gone")
    with suppress(FileNotFoundError):
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _record_schema(entry: DatasetEntry, dataset: Dataset) -> RecordSchema | None:
    if entry.record_schema is not None:
        return load_record_schema(entry.record_schema)
    declared = getattr(dataset, "record_schema", None)
    if declared is None:
        return None
    return RecordSchema(declared, f"dataset {entry.name!r}: record_schema")


def _fingerprint(
    entry: DatasetEntry,
    dataset: Dataset,
    tokenize: TokenizeFn,
    tokenizer: Tokenizer,
    schema: RecordSchema | None,
    cache: Path,
) -> str:
    """Of all that can change the store. What to do with bad records is no part of it."""
    seen = dataset.fingerprint()
    part = entry.tokenize_fn
    parts = {
        "format_version": FORMAT_VERSION,
        "dataset": _launch_identity() if seen is None else seen,
        "content": content_hashes(
            data_files(dataset), cache / HASHES_FOLDER, _HashTeller(entry.name)
        ),
        "tokenize_fn": [type(part).__name__, part.config.model_dump(mode="json")],
        "rendering": tokenize.fingerprint(),
        "tokenizer": tokenizer.fingerprint(),
        "chat_template": tokenizer.chat_template,
        "record_schema": None if schema is None else schema.schema,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _launch_identity() -> str:
    """The same for all local ranks of one launch, and for no other launch: the parent and its start time."""
    parent = os.getppid() if "LOCAL_RANK" in os.environ else os.getpid()
    try:
        started = Path(f"/proc/{parent}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        started = ""  # no /proc: the process id alone has to do
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return f"launch {socket.gethostname()} {parent} {started} {restart}"


class _HashTeller:
    """Logs now and then how far the first reading of the data's files is."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._logged = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if is_speaker() and time.monotonic() - self._logged > _LOG_EVERY_S:
            self._logged = time.monotonic()
            gib = 1 / 2**30
            logger.info(
                f"{self._name}: read {done * gib:.1f} of {total * gib:.1f} GiB of its files"
            )


class _Teller:
    """Shows how far a store is: a bar on a terminal, else a line of the log now and then."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._bar: Any = None
        self._began = self._logged = time.monotonic()
        self._first = 0

    def __enter__(self) -> Callable[[BuildProgress], None]:
        return self._tell

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def _tell(self, progress: BuildProgress) -> None:
        if not is_speaker():
            return
        if self._bar is None:
            from tqdm import tqdm

            self._first = progress.num_records
            self._bar = tqdm(
                total=progress.total_records,
                initial=progress.num_records,
                desc=f"{self._name}: tokenizing",
                unit="rec",
                unit_scale=True,
                disable=None,  # only on a terminal
            )
        seconds = max(time.monotonic() - self._began, 1e-9)
        if not self._bar.disable:
            # Workers tell of their own part each: what another one has done stays done.
            self._bar.n = max(self._bar.n, progress.num_records)
            self._bar.set_postfix_str(_postfix(progress, seconds), refresh=False)
            self._bar.refresh()
        elif time.monotonic() - self._logged > _LOG_EVERY_S:
            self._logged = time.monotonic()
            done, total = progress.num_records, progress.total_records
            rate = (done - self._first) / seconds
            left = f", {(total - done) / rate / 60:.0f} min left" if rate else ""
            logger.info(
                f"{self._name}: {done:,} of {total:,} records, {rate:,.0f} records/s, "
                f"{_postfix(progress, seconds)}{left}"
            )


def _postfix(progress: BuildProgress, seconds: float) -> str:
    if progress.waiting_for:
        return f"waiting for {progress.waiting_for}"
    return f"{progress.num_tokens / seconds / 1e6:.2f}M tokens/s"
