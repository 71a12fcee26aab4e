"""Spawned processes that make the parts of a token store, watched so that a dead one is named.

Each does what its parent could do alone: claim parts and make them. Nothing travels back but the
number of the record that it is on, so a large dataset costs no pipe.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, MutableSequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from pegboard.errors import DataError
from pegboard.exit_codes import how_it_ended
from pegboard.file_claims import open_claims
from pegboard.store_parts import BuildProgress, PartsOfStore, make_parts

__all__ = ["run_workers"]

_POLL_S = 0.05


def run_workers(
    parts: PartsOfStore,
    number: int,
    progress: Callable[[BuildProgress], None] | None = None,
) -> None:
    """Return when the workers have nothing more to do.

    Raises:
        DataError: one died; the message names the record that it was on.
        Exception: what a worker raised.
    """
    done = 0
    with _Workers(parts, number) as workers:
        while workers.are_running():
            parts.look()
            if progress is not None:
                records, tokens = workers.progress()
                # A worker forgets a part's records before the listing here shows the part.
                done = max(done, min(parts.num_done() + records, parts.total))
                progress(BuildProgress(done, parts.total, tokens))
            time.sleep(_POLL_S)


class _Workers:
    """The processes, ended when left."""

    def __init__(self, parts: PartsOfStore, number: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._parts = parts
        self._notes: list[MutableSequence[int]] = []
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        try:
            for _ in range(number):
                # Record it is on (-1: none), records of its part before that, all tokens so far.
                notes = context.RawArray("q", [-1, 0, 0])
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_worker_main, args=(parts, notes, theirs), daemon=True
                )
                process.start()
                theirs.close()
                self._notes.append(notes)
                self._pipes.append(ours)
                self._processes.append(process)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process.is_alive():
                process.terminate()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()

    def progress(self) -> tuple[int, int]:
        """(records of unfinished parts, all tokens) of these workers."""
        return sum(note[1] for note in self._notes), sum(note[2] for note in self._notes)

    def are_running(self) -> bool:
        """Whether any still works; raises what one of them raised, or that one died."""
        running = False
        for process, pipe, notes in zip(self._processes, self._pipes, self._notes, strict=True):
            exit_code = process.exitcode
            # Asked of the living too: a long message keeps them until it is read.
            if pipe.poll() and (error := _receive(pipe)) is not None:
                raise error
            if exit_code is None:
                running = True
            elif exit_code != 0:
                raise DataError(self._obituary(process.pid, exit_code, notes[0]))
        return running

    def _obituary(self, pid: int, exit_code: int, record: int) -> str:
        how = f"process {pid}, {how_it_ended(exit_code)}"
        who = f"a tokenize worker of dataset {self._parts.name!r} died"
        if record < 0:
            where = f"{who} between records"
        else:
            dataset = self._parts.job.dataset
            start, stop = self._parts.span(record // self._parts.size)
            span = f"{dataset.key(start)} to {dataset.key(stop - 1)}"
            where = f"{dataset.key(record)}: {who} on this record, of its span {span}"
        return f"{where} ({how}); what is done is kept, so start again, with fewer workers if memory is short"


def _worker_main(parts: PartsOfStore, notes: MutableSequence[int], errors: Connection) -> None:
    # Ctrl-C goes to the whole group; the parent decides what becomes of its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()
    before = 0

    def tell(index: int, part_tokens: int) -> None:
        if os.getppid() != parent:
            os._exit(1)  # the parent was killed, and nobody takes note of this worker any more
        notes[0], notes[1], notes[2] = index, index % parts.size, before + part_tokens

    def part_done() -> None:
        nonlocal before
        before = notes[2]
        notes[0], notes[1] = -1, 0

    def waiting(who: str) -> None:
        del who
        if os.getppid() != parent:
            os._exit(1)

    try:
        with open_claims(parts.draft) as claims:
            make_parts(parts, claims, tell, part_done, waiting)
    except Exception as error:  # noqa: BLE001 - the parent raises it
        if isinstance(error, FileNotFoundError) and not parts.draft.is_dir():
            return  # put together and published by another process
        _send(errors, error)
        os._exit(1)


def _receive(errors: Connection) -> Exception | None:
    """What a worker raised; None if it ended without a word, or inside of one."""
    with suppress(EOFError, OSError):
        error: Exception = errors.recv()
        return error
    return None


def _send(errors: Connection, error: Exception) -> None:
    try:
        pickle.loads(pickle.dumps(error))
        errors.send(error)
    except Exception:  # noqa: BLE001 - one that does not pickle, or not come back
        notes = " ".join(getattr(error, "__notes__", ()))
        errors.send(RuntimeError(f"{type(error).__name__}: {error} {notes}".strip()))
