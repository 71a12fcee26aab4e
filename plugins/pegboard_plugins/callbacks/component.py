"""EarlyStopping, as a JSON file sees it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from pegboard import Callback, CallbackComponent, ComponentConfig, Problem

if TYPE_CHECKING:
    from pegboard.run_config import RunConfig

__all__ = ["EarlyStopping"]


class EarlyStopping(CallbackComponent):
    """Stops a run whose evaluation has not got better for a while."""

    known_as: ClassVar[tuple[str, ...]] = ("early_stop", "EarlyStoppingCallback")

    class Config(ComponentConfig):
        metric: str = Field(
            default="eval_loss",
            min_length=1,
            description="What is watched: eval_loss, or eval_loss/<name> of one evaluation dataset.",
        )
        better: Literal["lower", "higher"] = Field(
            default="lower", description="Which way is better."
        )
        patience: int = Field(
            default=3,
            ge=1,
            description="Evaluations in a row without a new best after which the run stops.",
        )
        min_change: float = Field(
            default=0.0,
            ge=0,
            description="A value counts as a new best only if it is better than the best by more than this.",
        )

    config: Config

    def check(self, run: RunConfig, path: tuple[str | int, ...]) -> Iterable[Problem]:
        """The run evaluates, and what is watched is one of its numbers."""
        if run.eval is None:
            yield Problem(
                (*path, "class_name"),
                'EarlyStopping watches the evaluation, and the run has none; write an "eval" section',
            )
            return
        known = ["eval_loss", *(f"eval_loss/{entry.name}" for entry in run.eval.datasets)]
        if self.config.metric not in known:
            yield Problem(
                (*path, "metric"),
                f"no evaluation gives {self.config.metric!r}; expected one of {', '.join(known)}",
            )

    def build(self, run_dir: Path) -> Callback:
        """Reads the earlier evaluations of a resumed run from its metrics.jsonl."""
        from .early_stopping import StopWhenNoBetter

        config = self.config
        return StopWhenNoBetter(
            run_dir / "metrics.jsonl",
            config.metric,
            lower_is_better=config.better == "lower",
            patience=config.patience,
            min_change=config.min_change,
        )
