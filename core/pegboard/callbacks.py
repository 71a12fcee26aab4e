"""What happens in a run, told to whoever wants to know: the events and what each one says.

Events are facts: a callback reads them and changes nothing of the run. The one thing it may do is ask, at the
end of a step, that the run stops.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "EVENTS",
    "Callback",
    "CheckpointSaved",
    "StepEnd",
    "TrainEnd",
    "TrainFailure",
    "TrainStart",
]


@dataclass(frozen=True, kw_only=True)
class TrainStart:
    """Model, data and ranks are there; the first step comes next.

    >>> from pathlib import Path
    >>> from pegboard import TrainStart
    >>> start = TrainStart(
    ...     run_dir=Path("work_dirs/a"), config={"seed": 42}, step=0, total_steps=100,
    ...     resumed_from=None, rank=0, world_size=1,
    ... )
    >>> start.total_steps - start.step
    100
    """

    run_dir: Path
    """Folder of the run, the same on every rank."""
    config: Mapping[str, Any]
    """JSON of the run with every default written out; a copy."""
    step: int
    """Steps done so far: 0, or those of the checkpoint that the run goes on from."""
    total_steps: int
    resumed_from: Path | None
    """The checkpoint; None for a run that starts anew."""
    rank: int
    world_size: int


@dataclass(frozen=True, kw_only=True)
class StepEnd:
    """A step is done, logged and evaluated, and not saved yet.

    >>> from pegboard import StepEnd
    >>> StepEnd(step=1, total_steps=100, metrics={"loss": 2.5}, applied=True).metrics["loss"]
    2.5
    """

    step: int
    """Counts from 1."""
    total_steps: int
    metrics: Mapping[str, float]
    """Of this step, keys as in metrics.jsonl, also where that leaves steps out. What a model reports itself is
    there on logged steps, and `eval_loss` and the like after an evaluation. Losses, counts and norms are global
    and the same on every rank; times and memory are this rank's. A number may be NaN or infinite."""
    applied: bool
    """False if the step was skipped, because loss or gradients were not finite."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved:
    """A saver has written something, whole and in its place.

    >>> from pathlib import Path
    >>> from pegboard import CheckpointSaved
    >>> CheckpointSaved(step=50, path=Path("work_dirs/a/hf"), saver="HFSaver").path.name
    'hf'
    """

    step: int
    path: Path
    saver: str
    """Class name of the saver, such as `CheckpointSaver`; an export is told of too."""


@dataclass(frozen=True, kw_only=True)
class TrainEnd:
    """The run ended as it should, after its last save.

    >>> from pegboard import TrainEnd
    >>> TrainEnd(step=60, total_steps=100, stopped="SIGTERM").stopped
    'SIGTERM'
    """

    step: int
    """Steps done in all."""
    total_steps: int
    stopped: str | None
    """Why it ended before its last step (SIGTERM, or the reason that a callback gave); None if it didn't."""


@dataclass(frozen=True, kw_only=True)
class TrainFailure:
    """The run ends by an error on this rank. Other ranks may be anywhere: nothing collective works here.

    >>> from pegboard import TrainFailure
    >>> TrainFailure(step=60, error=OSError("disk is full")).error
    OSError('disk is full')
    """

    step: int
    """Steps done in all."""
    error: BaseException
    """What ends it; KeyboardInterrupt is one too."""


class Callback:
    """Base of every built callback: an `on_...` method for each event, which does nothing here.

    `on_train_start` comes first, and one of `on_train_end` and `on_train_error` last; a process that is killed
    tells nobody. Methods are called on rank 0, or on every rank where the component says `every_rank = True`.
    They run between steps, and other ranks wait for them in the next one. A method that raises ends the run, as
    a stop does: after the next step, with its last saves, on every rank, by an error that names the callback and its
    plugin. The callback that raised is called no more.

    >>> from pegboard import Callback, StepEnd
    >>> class Enough(Callback):
    ...     def on_step_end(self, event):
    ...         return "the loss is low" if event.metrics["loss"] < 0.1 else None
    >>> Enough().on_step_end(StepEnd(step=7, total_steps=9, metrics={"loss": 0.05}, applied=True))
    'the loss is low'
    """

    def on_train_start(self, event: TrainStart) -> None:
        del event

    def on_step_end(self, event: StepEnd) -> str | None:
        """Returns the reason why the run is to stop, or None to go on.

        A run stops as it does by SIGTERM: all ranks learn it with the counts of the next step, which is the last.
        """
        del event
        return None

    def on_checkpoint_saved(self, event: CheckpointSaved) -> None:
        del event

    def on_train_end(self, event: TrainEnd) -> None:
        del event

    def on_train_error(self, event: TrainFailure) -> None:
        """Raising here changes nothing: the error of the run is the one that is told."""
        del event


EVENTS = tuple(name for name in vars(Callback) if name.startswith("on_"))
"""Methods of a callback, in the order of a run."""
