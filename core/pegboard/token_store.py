"""Token stores: built once by as many processes as there are, then mapped by all.

Records are cut into parts by their number alone. Workers of this process, other ranks and other jobs
that build the same store claim parts in its draft folder, and commit each by rename; what a killed
build has finished stays there for the next. When all parts are there, one process puts them together.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from pegboard.bad_records import BadRecordPolicy, refuse_bad_records
from pegboard.contracts import Dataset, TokenizeFn
from pegboard.errors import DataError
from pegboard.file_claims import Claims, do_once, open_claims
from pegboard.record_tokenizing import RecordJob, RecordSchema
from pegboard.sample_files import FORMAT_VERSION, DamagedPart, read_summary
from pegboard.store_parts import BuildProgress, PartsOfStore, make_parts
from pegboard.store_workers import run_workers
from pegboard.stored_samples import TokenStore, open_store, write_store

__all__ = [
    "DRAFT_SUFFIX",
    "BuildProgress",
    "TokenStore",
    "build_store",
    "draft_folder",
    "open_if_equal",
    "open_store",
    "store_fingerprint",
]

DRAFT_SUFFIX = ".draft"
_TELL_S = 0.2


def store_fingerprint(
    dataset: Dataset, tokenize_fn: TokenizeFn, schema: RecordSchema | None = None
) -> str | None:
    """Equal when a store of these would hold the same samples; None if the dataset can't tell."""
    seen = dataset.fingerprint()
    if seen is None:
        return None
    parts = [FORMAT_VERSION, seen, tokenize_fn.fingerprint(), schema.schema if schema else None]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def draft_folder(folder: Path, fingerprint: str) -> Path:
    """Where the parts of a store are kept while it is built, beside its folder."""
    digest = hashlib.sha256(fingerprint.encode()).hexdigest()[:12]
    return folder.parent / f".{folder.name}.{digest}{DRAFT_SUFFIX}"


def build_store(
    folder: str | Path,
    dataset: Dataset,
    tokenize_fn: TokenizeFn,
    *,
    name: str,
    schema: RecordSchema | None = None,
    fingerprint: str | None = None,
    on_bad_record: BadRecordPolicy = "error",
    num_workers: int = 0,
    progress: Callable[[BuildProgress], None] | None = None,
) -> TokenStore:
    """Tokenize every record of `dataset` into `folder` and open the result.

    A folder that already holds a store with this fingerprint is opened instead; any other is
    replaced. Every process that asks for the same store at the same time does a share of the work.

    Args:
        folder: of the store; its parent is made where missing.
        dataset: records; goes to the workers by pickle, like `tokenize_fn`.
        tokenize_fn: record -> examples.
        name: the dataset's name in the config.
        schema: what every record must look like.
        fingerprint: changes with anything that changes the samples; None: `store_fingerprint`.
        on_bad_record: `error` raises the first bad record (the first in the data, whatever the
            workers' order); the others leave them out, counted and listed. The store is the same.
        num_workers: spawned processes; 0 tokenizes in this one. The result does not depend on it.
        progress: called a few times a second, and at the end.

    Raises:
        DataError: too many bad records, starting `file:line:`; no sample left; a worker that died.
    """
    folder = Path(folder)
    if fingerprint is None:
        fingerprint = store_fingerprint(dataset, tokenize_fn, schema) or uuid.uuid4().hex
    store = open_if_equal(folder, fingerprint, name)
    if store is None:
        draft = draft_folder(folder, fingerprint)
        draft.mkdir(parents=True, exist_ok=True)
        try:
            job = RecordJob(dataset, tokenize_fn, schema)
            parts = PartsOfStore(draft, job, name, on_bad_record)
            _build(parts, folder, fingerprint, num_workers, progress)
        except FileNotFoundError as error:
            if error.filename is None or not str(error.filename).startswith(str(draft)):
                raise
            # The draft goes away with its publication, at whatever moment another process does it.
            if open_if_equal(folder, fingerprint) is None:
                raise DataError(
                    f"{draft}: somebody removed the folder while it was filled; start again"
                ) from error
        store = open_store(folder, name)
        with suppress(OSError):
            draft.rmdir()  # made again, empty, just after the publication
    if store.meta["num_bad"]:
        refuse_bad_records(
            on_bad_record,
            name=name,
            first=store.meta["bad_records"][0],
            num_bad=store.meta["num_bad"],
            num_seen=store.meta["num_records"],
            total=store.meta["num_records"],
        )
    return store


def open_if_equal(folder: Path, fingerprint: str, name: str | None = None) -> TokenStore | None:
    """The store in `folder` if it is whole and of this fingerprint."""
    if not folder.exists():
        return None
    try:
        store = open_store(folder, name)
    except DataError:
        return None
    return store if store.meta["fingerprint"] == fingerprint else None


def _build(
    parts: PartsOfStore,
    folder: Path,
    fingerprint: str,
    num_workers: int,
    progress: Callable[[BuildProgress], None] | None,
) -> None:
    """Return when the store is published."""

    def is_published() -> bool:
        return open_if_equal(folder, fingerprint) is not None

    with open_claims(parts.draft) as claims:
        claims.take(f"present-{uuid.uuid4().hex[:8]}")  # for `pegboard cache`: somebody is at work
        while not is_published():
            parts.look(now=True)
            missing = parts.number - len(parts.done)
            if missing and not parts.is_over():
                if num_workers:
                    run_workers(parts, min(num_workers, missing), progress)
                else:
                    _make_parts_here(parts, claims, progress)
            parts.look(now=True)
            parts.raise_if_too_bad()
            try:
                do_once(
                    claims,
                    "assemble",
                    is_published,
                    lambda: _assemble(parts, folder, fingerprint),
                )
            except DamagedPart as damaged:
                damaged.path.unlink(missing_ok=True)  # made again in the next round
            except FileNotFoundError:
                if not parts.draft.is_dir() and not is_published():
                    raise
    if progress is not None:
        progress(BuildProgress(parts.total, parts.total, 0))


def _make_parts_here(
    parts: PartsOfStore, claims: Claims, progress: Callable[[BuildProgress], None] | None
) -> None:
    told_at = time.monotonic()
    tokens_before = tokens_of_part = 0

    def tell(index: int, part_tokens: int) -> None:
        nonlocal tokens_of_part
        tokens_of_part = part_tokens
        say(parts.num_done() + index % parts.size, "")

    def part_done() -> None:
        nonlocal tokens_before, tokens_of_part
        tokens_before, tokens_of_part = tokens_before + tokens_of_part, 0

    def say(num_records: int, who: str) -> None:
        nonlocal told_at
        if progress is None or time.monotonic() - told_at < _TELL_S:
            return
        told_at = time.monotonic()
        tokens = tokens_before + tokens_of_part
        progress(BuildProgress(num_records, parts.total, tokens, who))

    try:
        make_parts(parts, claims, tell, part_done, lambda who: say(parts.num_done(), who))
    except FileNotFoundError:
        if parts.draft.is_dir():
            raise


def _assemble(parts: PartsOfStore, folder: Path, fingerprint: str) -> None:
    """Put the parts together in a folder of the draft's, give it its name, drop the draft."""
    paths = [parts.path(part) for part in range(parts.number)]
    _refuse_empty(parts.name, paths)
    for leftover in parts.draft.glob("assembled.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh = parts.draft / f"assembled.{uuid.uuid4().hex[:8]}"
    fresh.mkdir()
    write_store(fresh, paths, fingerprint)
    _publish(fresh, folder, fingerprint)
    gone = parts.draft.with_name(f"{parts.draft.name}.{uuid.uuid4().hex[:8]}.gone")
    with suppress(OSError):
        os.rename(parts.draft, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _refuse_empty(name: str, paths: Sequence[Path]) -> None:
    """DataError if there is nothing to train on, with what became of the records."""
    num_records = 0
    reasons: Counter[str] = Counter()
    first = ""
    for path in paths:
        summary = read_summary(path)
        if summary.num_samples:
            return
        num_records += summary.num_records
        reasons.update(summary.dropped)
        if summary.bad:
            reasons["bad record"] += len(summary.bad)
            first = first or f"; the first bad one: {summary.bad[0]}"
    counts = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
    raise DataError(
        f"dataset {name!r}: none of its {num_records} records gave a sample to train "
        f"on ({counts or 'it has no records'}){first}"
    )


def _publish(fresh: Path, folder: Path, fingerprint: str) -> None:
    """Give the finished folder its name; if another process was first with an equal one, use that."""
    for _ in range(10):
        try:
            os.rename(fresh, folder)
        except OSError:
            if not folder.exists():
                raise
            if open_if_equal(folder, fingerprint) is not None:
                return
            # A stale or damaged store: move it away first, so that no reader sees half of it.
            aside = fresh.with_name(f"stale.{uuid.uuid4().hex[:8]}")
            with suppress(FileNotFoundError):
                os.rename(folder, aside)
                shutil.rmtree(aside, ignore_errors=True)
        else:
            _sync(folder.parent)
            return
    raise DataError(
        f"{folder}: other processes keep replacing this token store; give each run its own folder"
    )


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
