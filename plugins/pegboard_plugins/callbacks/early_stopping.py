"""Stop when an evaluation is no longer a new best.

What was evaluated before a restart stands in metrics.jsonl, so a run that is resumed stops where the uninterrupted one
would have: nothing is kept in checkpoints.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from pegboard import Callback, StepEnd, TrainStart

__all__ = ["StopWhenNoBetter"]


class StopWhenNoBetter(Callback):
    """The built EarlyStopping.

    Args:
        history: the run's metrics.jsonl.
        metric: key that an evaluation adds to a step's metrics.
        patience: evaluations in a row without a new best after which it asks for a stop.
        min_change: what a new best must gain over the best.
    """

    def __init__(
        self,
        history: Path,
        metric: str,
        *,
        lower_is_better: bool = True,
        patience: int,
        min_change: float = 0.0,
    ) -> None:
        self._history, self._metric = history, metric
        self._sign = 1.0 if lower_is_better else -1.0
        self._patience, self._min_change = patience, min_change
        self._best, self._best_step, self._num_worse = math.inf, 0, 0

    def on_train_start(self, event: TrainStart) -> None:
        if event.resumed_from is None:
            return
        # A run that was interrupted evaluated once more before it ended.
        every = (event.config.get("eval") or {}).get("every_steps", 1)
        values = _values_until(event.step, self._history, self._metric)
        for step in sorted(step for step in values if step % every == 0):
            self._take(step, values[step])

    def on_step_end(self, event: StepEnd) -> str | None:
        value = event.metrics.get(self._metric)
        if value is None:
            return None
        self._take(event.step, value)
        if self._num_worse < self._patience:
            return None
        if math.isinf(self._best):
            return f"{self._metric} was not finite in {self._num_worse} evaluations"
        return (
            f"{self._metric} has not been better than {self._sign * self._best:.6g} of step "
            f"{self._best_step} in {self._num_worse} evaluations"
        )

    def _take(self, step: int, value: float) -> None:
        signed = self._sign * value
        if math.isfinite(value) and signed < self._best - self._min_change:
            self._best, self._best_step, self._num_worse = signed, step, 0
        else:
            self._num_worse += 1


def _values_until(last_step: int, history: Path, metric: str) -> dict[int, float]:
    """The metric by step; a step that was repeated after a restart counts as it was the last time."""
    found: dict[int, float] = {}
    try:
        lines = history.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return found
    for line in lines:
        try:
            numbers = json.loads(line)
        except ValueError:
            continue  # a line that a killed run did not finish
        if metric in numbers and numbers["step"] <= last_step:
            value = numbers[metric]
            found[numbers["step"]] = math.nan if value is None else value
    return found
