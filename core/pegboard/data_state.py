"""What a checkpoint says of the data: where the run stands, and in the order of what.

The place is one cursor, with the epochs that ended a run before it. Beside it stands what the order was made of, part by part, so that a run
that is resumed with something else says which part it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loguru import logger

from pegboard.data_loading import Cursor, RunData
from pegboard.errors import CheckpointError

__all__ = ["cursor_of", "data_state"]

_WORDS = {
    "datasets": "the datasets (records, tokenizing, names, ratios or weights)",
    "packer": "dataloader.packer",
    "pack_max_length": "dataloader.pack_max_length",
    "seed": "seed",
    "global_batch_size": "global_batch_size",
}


def data_state(data: RunData, cursor: Cursor) -> dict[str, Any]:
    """JSON-able; equal on every rank.

    Args:
        cursor: where the next step begins; at an epoch's end that is the next epoch's start.
    """
    return {
        "cursor": cursor._asdict(),
        "ended_epochs": data.planner.ended_before(cursor.epoch),
        "made_of": _parts(data),
    }


def cursor_of(state: Mapping[str, Any], data: RunData, folder: Path, *, go_on: bool) -> Cursor:
    """Where a checkpoint's run goes on.

    Args:
        state: what `data_state` gave.
        folder: of the checkpoint, for messages.
        go_on: take the same place of the new order where the data, or what orders it, has changed.

    Raises:
        CheckpointError: it has changed, and `go_on` is false.
    """
    saved, ours = state["made_of"], _parts(data)
    changed = [words for name, words in _WORDS.items() if saved.get(name) != ours.get(name)]
    cursor = Cursor(**state["cursor"])
    # A run that ended has trained what a cutting packer would have kept for an epoch more.
    data.planner.end_epochs(state.get("ended_epochs", ()))
    if not changed:
        # A last epoch that is the last no more has no short pack at its end.
        return data.nearest_cursor(cursor)
    what = ", ".join(changed)
    if not go_on:
        raise CheckpointError(
            f"{folder}: was made with other data, packing, seed or global_batch_size: changed since: "
            f"{what}; resume with the config it was made with, start a new run with load_from, or set "
            'on_changed_data to "continue" to go on at the same place of the new order'
        )
    if changed != [_WORDS["global_batch_size"]]:
        logger.warning(
            f"changed since {folder}: {what}; going on at pack {cursor.pack} of epoch {cursor.epoch} "
            "of the new order: some samples may come twice or not at all"
        )
    return data.nearest_cursor(cursor)


def _parts(data: RunData) -> dict[str, str]:
    return data.planner.identity() | {"global_batch_size": str(data.global_batch_size)}
