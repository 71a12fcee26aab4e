"""Write a folder whole or not at all, by all ranks together.

Ranks write into `folder.tmp-...`, say to each other whether it went well, and rank 0 renames. A
failure on any rank becomes the same CheckpointError on every rank, so that none waits for another
that is gone; what stood at `folder` before stays.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pegboard.errors import CheckpointError

__all__ = ["all_ranks", "commit_folder", "gather_from_ranks", "rank_and_world", "write_text"]


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_from_ranks(value: Any) -> list[Any]:
    """`value` of every rank, in rank order. Collective."""
    _, world_size = rank_and_world()
    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    dist.all_gather_object(values, value)
    return values


def all_ranks(what: str, action: Callable[[], None]) -> None:
    """Run `action` on every rank; if it fails on one, raise on all. Collective.

    `action` must leave no rank alone in a collective of its own when it fails.

    Raises:
        CheckpointError: `what`, then the first failing rank and its error.
    """
    failure: Exception | None = None
    try:
        action()
    # Whatever it is (libraries raise bare Exception for a full disk), the other ranks must hear.
    except Exception as error:  # noqa: BLE001
        failure = error
    said = None if failure is None else _describe(failure)
    failed = [(rank, text) for rank, text in enumerate(gather_from_ranks(said)) if text is not None]
    if failed:
        rank, text = failed[0]
        others = f" (and {len(failed) - 1} other ranks)" if len(failed) > 1 else ""
        raise CheckpointError(f"{what}: rank {rank}{others}: {text}") from failure


def commit_folder(folder: Path, *writes: Callable[[Path], None]) -> None:
    """Call `write(temporary folder)` on every rank, then put the result at `folder`. Collective.

    Each of `writes` begins once the one before is done on every rank. A folder that already
    stands there is replaced. Files are brought to the disk before the rename.

    Raises:
        CheckpointError: on all ranks if any rank failed; `folder` is then as it was before.
    """
    rank, _ = rank_and_world()
    token = gather_from_ranks(secrets.token_hex(4))[0]
    temporary = folder.with_name(f"{folder.name}.tmp-{token}")

    def begin() -> None:
        if rank == 0:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _clear_leftovers(folder)
            temporary.mkdir()

    def finish() -> None:
        if rank == 0:
            for path in [*temporary.rglob("*"), temporary]:
                _sync(path)
            _put_in_place(temporary, folder, token)

    what = f"{folder}: could not be written; what stood there before is untouched"
    try:
        all_ranks(what, begin)
        for write in writes:
            all_ranks(what, partial(write, temporary))
        all_ranks(what, finish)
    except BaseException:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text and bring it to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _clear_leftovers(folder: Path) -> None:
    """Undo what a killed run left half done."""
    for aside in folder.parent.glob(f"{folder.name}.old-*"):
        if folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(folder)
    for leftover in folder.parent.glob(f"{folder.name}.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _put_in_place(temporary: Path, folder: Path, token: str) -> None:
    if not folder.exists():
        temporary.rename(folder)
        _sync(folder.parent)
        return
    # A folder that isn't empty can't be renamed over: the old one steps aside and comes back if
    # the new one can't take its place.
    aside = folder.with_name(f"{folder.name}.old-{token}")
    folder.rename(aside)
    try:
        temporary.rename(folder)
    except OSError:
        aside.rename(folder)
        raise
    _sync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _describe(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, CheckpointError) else f"{type(error).__name__}: {text}"
