"""Checkpoints to resume from: `run_dir/checkpoints/step_00000100/`.

The newest few are kept. An old one goes only after the new one is in its place, and is renamed
before it is deleted, so that a kill in between leaves nothing that looks whole.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from pegboard.commit import gather_from_ranks, rank_and_world
from pegboard.savers import SaveRequest
from pegboard.train_state import checkpoint_steps, save_train_state

__all__ = ["CheckpointWriter"]


class CheckpointWriter:
    """Built CheckpointSaver."""

    def __init__(self, *, every_steps: int | None, keep_last: int) -> None:
        self._every_steps = every_steps
        self._keep_last = keep_last

    def due(self, step: int, *, is_last: bool) -> bool:
        """At the end, and at multiples of `every_steps`."""
        return is_last or (self._every_steps is not None and step % self._every_steps == 0)

    def save(self, request: SaveRequest) -> Path | None:
        """Write the checkpoint of this step, then delete old ones. Collective.

        A run that was resumed and had nothing left to train stands on the checkpoint of this very
        step: that one stays as it is, and nothing is written.

        Raises:
            CheckpointError: on all ranks; older checkpoints are then all still there.
        """
        stands = request.step in checkpoint_steps(request.run_dir)
        if gather_from_ranks(stands)[0]:
            return None
        folder = request.run_dir / "checkpoints" / f"step_{request.step:08d}"
        save_train_state(folder, request.module, request.optimizer, request.train_state)
        if rank_and_world()[0] == 0:
            self._delete_old(request.run_dir, folder)
        return folder

    def _delete_old(self, run_dir: Path, written: Path) -> None:
        others = [path for path in checkpoint_steps(run_dir).values() if path != written]
        for path in others[: max(0, len(others) - (self._keep_last - 1))]:
            path.rename(path.with_name(f"{path.name}.tmp-deleted"))
        # Also what a killed run left. The new checkpoint is safe already: a file that can't be
        # deleted is no reason to stop.
        for leftover in written.parent.glob("step_*.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
