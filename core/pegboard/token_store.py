"""Tokenized samples on disk: written once, memory-mapped by every rank.

Records are tokenized once (by worker processes if asked), and ids, masks, offsets and keys become
flat files in a folder. The folder is written under another name and renamed when complete, so one
that exists is whole, and of several processes that build the same store one wins and the others use
it.

Media (references, as the tokenize function wrote them) are one JSON text per sample that has any, in
`media.bin`; a store of text alone has no such file.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from pegboard.contracts import Dataset, Example, SampleKey, TokenizeFn
from pegboard.errors import DataError, DroppedSample

__all__ = ["TokenStore", "build_store", "open_store", "store_fingerprint"]

FORMAT_VERSION = 1
MAX_LISTED_BAD_RECORDS = 1000
_CHUNK_RECORDS = 512
_COUNTED_AT_ONCE = 65_536
_SAMPLED_PLACES = 1024
_SAMPLED_IDS = 256
_BadRecordPolicy = Literal["error", "skip"]


class TokenStore:
    """An immutable sequence of tokenized samples; open it with `open_store`. Pickles as its folder.

    Attributes:
        folder: where it lives.
        meta: what `meta.json` says: `name`, `fingerprint`, `num_records`, `num_samples`,
            `num_tokens`, `num_supervised`, `dropped` (count by reason), `num_bad` and `bad_records`
            (messages, at most 1000), `events` (the tokenize function's counts).
        lengths: (num_samples,) int64 tokens of each sample.
        num_tiles: (num_samples,) int32 vision tiles of each sample; None if no sample has media.
    """

    def __init__(self, folder: Path, meta: Mapping[str, Any]) -> None:
        self.folder = folder
        self.meta = meta
        self._offsets = np.load(folder / "offsets.npy")
        self._keys = np.load(folder / "keys.npy", mmap_mode="r")
        self._ids = np.asarray(np.memmap(folder / "ids.bin", dtype=np.int32, mode="r"))
        self._mask = np.asarray(np.memmap(folder / "mask.bin", dtype=np.uint8, mode="r")).view(
            np.bool_
        )
        self.lengths = np.diff(self._offsets)
        self.num_tiles: np.ndarray | None = None
        if meta.get("media_bytes"):
            self._media = np.memmap(folder / "media.bin", dtype=np.uint8, mode="r")
            self._media_offsets = np.load(folder / "media_offsets.npy", mmap_mode="r")
            self.num_tiles = np.load(folder / "num_tiles.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        """Sample `index`; its arrays are read-only views of the files."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        span = slice(int(self._offsets[index]), int(self._offsets[index + 1]))
        example = Example(
            input_ids=self._ids[span], loss_mask=self._mask[span], key=self.key(index)
        )
        if self.num_tiles is not None:
            start, end = self._media_offsets[index : index + 2].tolist()
            if end > start:
                example.media = json.loads(self._media[start:end].tobytes())
                example.num_tiles = int(self.num_tiles[index])
        return example

    @cached_property
    def num_targets(self) -> np.ndarray:
        """(num_samples,) int32 supervised tokens of each sample; not its first, which nothing predicts."""
        if (self.folder / "num_targets.npy").exists():
            return np.asarray(np.load(self.folder / "num_targets.npy", mmap_mode="r"))
        # A store that was written before this file was.
        counts = np.empty(len(self), dtype=np.int32)
        for first in range(0, len(self), _COUNTED_AT_ONCE):
            last = min(first + _COUNTED_AT_ONCE, len(self))
            start, stop = int(self._offsets[first]), int(self._offsets[last])
            counts[first:last] = _count_targets(
                self._mask[start:stop], self._offsets[first:last] - start
            )
        return counts

    def content_identity(self) -> str:
        """Changes with the samples: their number, lengths and targets, and, in a sample of places, ids.

        Unlike the fingerprint it is the same for a copy of the data made elsewhere.
        """
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.lengths, self.num_targets):
            digest.update(np.ascontiguousarray(array, dtype=np.int32).data)
        size = min(_SAMPLED_IDS, len(self._ids))
        for start in np.linspace(0, len(self._ids) - size, _SAMPLED_PLACES).astype(int).tolist():
            digest.update(self._ids[start : start + size].data)
        return digest.hexdigest()

    def key(self, index: int) -> SampleKey:
        """Where sample `index` comes from."""
        file, line, part = self._keys[index].tolist()
        return SampleKey(self.meta["name"], self.meta["files"][file], line, part)

    def __reduce__(self) -> tuple[Callable[[Path], TokenStore], tuple[Path]]:
        return open_store, (self.folder,)


def store_fingerprint(
    dataset: Dataset, tokenize_fn: TokenizeFn, on_bad_record: str = "error"
) -> str | None:
    """Equal when a store of these would hold the same samples; None if the dataset can't tell."""
    data = dataset.fingerprint()
    if data is None:
        return None
    parts = [FORMAT_VERSION, data, tokenize_fn.fingerprint(), on_bad_record]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def open_store(folder: str | Path) -> TokenStore:
    """The store in `folder`; DataError if there is none, or a damaged or foreign one."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{folder}: no token store there (meta.json is missing); delete the folder"
        ) from None
    except ValueError as error:
        raise DataError(f"{folder}: meta.json is damaged ({error}); delete the folder") from None
    version = meta.get("format_version") if isinstance(meta, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{folder}: token store of format {version}, expected {FORMAT_VERSION}; "
            "delete the folder"
        )
    num_tokens = meta["num_tokens"]
    files = [("ids.bin", num_tokens * 4), ("mask.bin", num_tokens)]
    if media_bytes := meta.get("media_bytes", 0):
        files.append(("media.bin", media_bytes))
    for name, expected in files:
        path = folder / name
        found = path.stat().st_size if path.exists() else None
        if found != expected:
            raise DataError(
                f"{path}: {found} bytes, expected {expected}; delete the folder {folder}"
            )
    try:
        return TokenStore(folder, meta)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: damaged ({error}); delete the folder") from error


def build_store(
    folder: str | Path,
    dataset: Dataset,
    tokenize_fn: TokenizeFn,
    *,
    on_bad_record: _BadRecordPolicy = "error",
    num_workers: int = 0,
    name: str,
    progress: Callable[[int, int], None] | None = None,
) -> TokenStore:
    """Tokenize every record of `dataset` into `folder` and open the result.

    A folder that already holds a store with this fingerprint is opened instead; any other is
    replaced.

    Args:
        folder: of the store; its parent is made where missing.
        dataset: records; goes to the workers by pickle, like `tokenize_fn`.
        tokenize_fn: record -> examples.
        on_bad_record: `error` raises the first bad record (the first in the data, whatever the
            workers' order); `skip` leaves it out, counts and lists it.
        num_workers: spawned processes; 0 tokenizes in this one. The result does not depend on it.
        name: the dataset's name in the config.
        progress: called with (records done, records in all).

    Raises:
        DataError: a bad record, starting `file:line:`; no sample left; a worker that died.
    """
    folder = Path(folder)
    fingerprint = store_fingerprint(dataset, tokenize_fn, on_bad_record)
    if (ready := _open_if_equal(folder, fingerprint)) is not None:
        return ready
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.parent / f".{folder.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.draft"
    draft.mkdir()
    try:
        job = _Job(dataset, tokenize_fn, on_bad_record)
        with ExitStack() as stack:
            writer = _Writer(draft, stack)
            for chunk in _tokenize(job, num_workers, name):
                writer.append(chunk)
                if progress is not None:
                    progress(writer.num_records, len(dataset))
        writer.finish(name, fingerprint)
        return _publish(draft, folder, fingerprint)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@dataclass
class _Chunk:
    """Samples of a run of records, flat."""

    num_records: int = 0
    lengths: list[int] = field(default_factory=list)
    ids: list[np.ndarray] = field(default_factory=list)
    mask: list[np.ndarray] = field(default_factory=list)
    keys: list[tuple[str, int, int]] = field(default_factory=list)
    media: dict[int, tuple[bytes, int]] = field(default_factory=dict)
    """Sample of the chunk -> JSON text of its media, and its vision tiles; only those with media."""
    dropped: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)


class _NoteKey:
    """Tells a programmer's error which record it happened on."""

    def __init__(self, key: SampleKey) -> None:
        self.key = key

    def __enter__(self) -> None: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and not isinstance(error, DataError):
            error.add_note(f"while tokenizing {self.key}")


@dataclass
class _Job:
    """What a worker needs."""

    dataset: Dataset
    tokenize_fn: TokenizeFn
    on_bad_record: str

    def run(self, start: int, stop: int) -> _Chunk:
        chunk = _Chunk(num_records=stop - start)
        for index in range(start, stop):
            key = self.dataset.key(index)
            try:
                with _NoteKey(key):
                    self._tokenize(index, key, chunk)
            except DroppedSample as dropped:
                chunk.dropped[dropped.reason] += 1
            except DataError as error:
                message = str(error)
                if not message.startswith(f"{key}:"):
                    message = f"{key}: {message}"
                if self.on_bad_record == "error":
                    raise DataError(message) from error
                chunk.bad.append(message)
        chunk.events.update(self.tokenize_fn.take_counts())
        # One array per chunk is much cheaper to send than thousands.
        chunk.ids = [np.concatenate(chunk.ids)] if chunk.ids else []
        chunk.mask = [np.concatenate(chunk.mask)] if chunk.mask else []
        return chunk

    def _tokenize(self, index: int, key: SampleKey, chunk: _Chunk) -> None:
        examples = self.tokenize_fn(self.dataset[index])
        rows = []
        for place, example in enumerate(examples):
            part = place if example.part is None else example.part
            ids = np.asarray(example.input_ids, dtype=np.int32)
            mask = np.asarray(example.loss_mask, dtype=np.bool_)
            if ids.ndim != 1 or ids.shape != mask.shape:
                raise DataError(
                    f"ids of shape {ids.shape} and a mask of {mask.shape}, expected (T,) of both"
                )
            if len(ids) > self.tokenize_fn.max_length:
                raise DataError(
                    f"{len(ids)} tokens, over the tokenize_fn's max_length "
                    f"{self.tokenize_fn.max_length}"
                )
            if len(ids) == 0:
                chunk.dropped["empty"] += 1
                continue
            rows.append((ids, mask, part, _media_of(example)))
        if not examples:
            chunk.dropped["no example"] += 1
        for ids, mask, part, media in rows:
            if media is not None:
                chunk.media[len(chunk.lengths)] = media
            chunk.lengths.append(len(ids))
            chunk.ids.append(ids)
            chunk.mask.append(mask)
            chunk.keys.append((key.file, key.line, part))


def _media_of(example: Example) -> tuple[bytes, int] | None:
    if not example.media:
        return None
    try:
        text = json.dumps(dict(example.media), ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise TypeError(f"a tokenize function's media must be plain JSON data: {error}") from error
    return text.encode("utf-8", "surrogatepass"), example.num_tiles


def _tokenize(job: _Job, num_workers: int, name: str) -> Iterator[_Chunk]:
    """Chunks in the order of the records."""
    total = len(job.dataset)
    size = _CHUNK_RECORDS
    if num_workers:
        size = max(1, min(size, total // (num_workers * 4)))
    spans = [(start, min(start + size, total)) for start in range(0, total, size)]
    if num_workers == 0:
        for start, stop in spans:
            yield job.run(start, stop)
        return
    with ExitStack() as stack:
        pool = ProcessPoolExecutor(
            min(num_workers, max(len(spans), 1)),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(job,),
        )
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        # A bounded number of chunks in flight: results wait in memory until their turn.
        waiting: deque[Future[_Chunk]] = deque()
        try:
            for start, stop in spans:
                waiting.append(pool.submit(_run_in_worker, start, stop))
                if len(waiting) >= num_workers * 4:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                f"dataset {name!r}: a tokenize worker died (killed, or out of memory); "
                "try fewer dataloader.num_workers"
            ) from error


def _start_worker(job: _Job) -> None:
    # Kept on the worker's process object: sending a large index with every task would be slow.
    vars(multiprocessing.current_process())["pegboard_job"] = job


def _run_in_worker(start: int, stop: int) -> _Chunk:
    job: _Job = vars(multiprocessing.current_process())["pegboard_job"]
    return job.run(start, stop)


class _Writer:
    """Appends chunks to the files of a draft folder."""

    def __init__(self, draft: Path, stack: ExitStack) -> None:
        self.num_records = 0
        self._draft = draft
        self._ids_file = stack.enter_context(open(draft / "ids.bin", "wb"))
        self._mask_file = stack.enter_context(open(draft / "mask.bin", "wb"))
        self._media_file = stack.enter_context(open(draft / "media.bin", "wb"))
        self._media_bytes: list[np.ndarray] = []
        self._num_tiles: list[np.ndarray] = []
        self._lengths: list[np.ndarray] = []
        self._num_targets: list[np.ndarray] = []
        self._keys: list[np.ndarray] = []
        self._files: dict[str, int] = {}
        self._num_supervised = 0
        self._num_bad = 0
        self._bad: list[str] = []
        self._dropped: Counter[str] = Counter()
        self._events: Counter[str] = Counter()

    def append(self, chunk: _Chunk) -> None:
        for ids, mask in zip(chunk.ids, chunk.mask, strict=True):
            self._ids_file.write(ids.data)
            self._mask_file.write(mask.view(np.uint8).data)
            self._num_supervised += int(mask.sum())
        rows = [
            (self._files.setdefault(file, len(self._files)), line, part)
            for file, line, part in chunk.keys
        ]
        self._keys.append(np.array(rows, dtype=np.int64).reshape(-1, 3))
        lengths = np.array(chunk.lengths, dtype=np.int64)
        self._lengths.append(lengths)
        if len(lengths):
            counts = _count_targets(np.concatenate(chunk.mask), np.cumsum(lengths) - lengths)
            self._num_targets.append(counts)
        sizes = np.zeros(len(chunk.lengths), dtype=np.int64)
        tiles = np.zeros(len(chunk.lengths), dtype=np.int32)
        for sample, (text, count) in sorted(chunk.media.items()):
            self._media_file.write(text)
            sizes[sample], tiles[sample] = len(text), count
        self._media_bytes.append(sizes)
        self._num_tiles.append(tiles)
        self.num_records += chunk.num_records
        self._num_bad += len(chunk.bad)
        self._bad += chunk.bad[: MAX_LISTED_BAD_RECORDS - len(self._bad)]
        self._dropped.update(chunk.dropped)
        self._events.update(chunk.events)

    def finish(self, name: str, fingerprint: str | None) -> None:
        """Write the small files, meta.json last; the data files are closed already."""
        lengths = np.concatenate([np.empty(0, dtype=np.int64), *self._lengths])
        if not len(lengths):
            reasons = Counter(self._dropped)
            if self._num_bad:
                reasons["bad record"] = self._num_bad
            counts = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
            first = f"; the first bad one: {self._bad[0]}" if self._bad else ""
            raise DataError(
                f"dataset {name!r}: none of its {self.num_records} records gave a sample to train "
                f"on ({counts or 'it has no records'}){first}"
            )
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        np.save(self._draft / "offsets.npy", offsets)
        np.save(self._draft / "keys.npy", np.concatenate(self._keys))
        np.save(self._draft / "num_targets.npy", np.concatenate(self._num_targets))
        media_offsets = np.concatenate([[0], np.cumsum(np.concatenate(self._media_bytes))])
        num_tiles = np.concatenate(self._num_tiles)
        if media_offsets[-1]:
            np.save(self._draft / "media_offsets.npy", media_offsets)
            np.save(self._draft / "num_tiles.npy", num_tiles)
        else:
            (self._draft / "media.bin").unlink()
        meta = {
            "format_version": FORMAT_VERSION,
            "name": name,
            "fingerprint": fingerprint,
            "num_records": self.num_records,
            "num_samples": len(lengths),
            "num_tokens": int(offsets[-1]),
            "num_supervised": self._num_supervised,
            "media_bytes": int(media_offsets[-1]),
            "num_tiles": int(num_tiles.sum()),
            "dropped": dict(self._dropped),
            "num_bad": self._num_bad,
            "bad_records": self._bad,
            "events": dict(self._events),
            "files": list(self._files),
        }
        (self._draft / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _count_targets(mask: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Supervised tokens of each sample but its first; samples begin at `starts` and none is empty."""
    sums = np.add.reduceat(mask.view(np.uint8), starts, dtype=np.int32)
    return sums - mask[starts]


def _open_if_equal(folder: Path, fingerprint: str | None) -> TokenStore | None:
    """The store in `folder` if it is whole and of this fingerprint."""
    if fingerprint is None or not folder.exists():
        return None
    try:
        store = open_store(folder)
    except DataError:
        return None
    return store if store.meta["fingerprint"] == fingerprint else None


def _publish(draft: Path, folder: Path, fingerprint: str | None) -> TokenStore:
    """Give the finished draft its name; if another process was first, use an equal store of its."""
    for _ in range(10):
        try:
            os.rename(draft, folder)
        except OSError:
            if not folder.exists():
                raise
            if (winner := _open_if_equal(folder, fingerprint)) is not None:
                return winner
            # A stale or damaged store: move it away first, so that no reader sees half of it.
            aside = draft.with_suffix(f".stale-{uuid.uuid4().hex[:8]}")
            with suppress(FileNotFoundError):
                os.rename(folder, aside)
                shutil.rmtree(aside, ignore_errors=True)
        else:
            return open_store(folder)
    raise DataError(
        f"{folder}: other processes keep replacing this token store; give each run its own folder"
    )
