"""Tell the callbacks of a run what happens, and see to it that none of them can hang or break it.

A callback may run on one rank and the run lives on many. So what it asks for, or how it failed, is kept here,
told with the counts of the next step, and agreed on by all ranks before the run ends by it.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from loguru import logger

from pegboard.callbacks import (
    EVENTS,
    Callback,
    CheckpointSaved,
    StepEnd,
    TrainEnd,
    TrainFailure,
    TrainStart,
)
from pegboard.errors import PegboardError, PluginError, TrainingError
from pegboard.registry import nearest

if TYPE_CHECKING:
    from pegboard.component import CallbackComponent
    from pegboard.parallel import Ranks
    from pegboard.registry import Registry

__all__ = ["CallbackCalls", "check_callback"]


@dataclass
class _Told:
    callback: Callback
    who: str
    """For messages: class and plugin."""
    failed: bool = False


class CallbackCalls:
    """The callbacks of a run, on this rank.

    Args:
        components: as the config names them; the same on every rank.
        registry: knows which plugin offers each.
    """

    def __init__(
        self,
        components: Sequence[CallbackComponent],
        registry: Registry,
        run_dir: Path,
        ranks: Ranks,
    ) -> None:
        self._ranks, self._any = ranks, bool(components)
        self._told: list[_Told] = []
        self._failure: str | None = None
        self._reason: str | None = None
        self._is_over = False
        for component in components:
            if ranks.rank != 0 and not component.every_rank:
                continue
            name = type(component).__name__
            plugin = component.plugin or registry.plugin_of("callback", name)
            who = f"callback '{name}' of plugin '{plugin}'"
            try:
                self._told.append(_Told(check_callback(component.build(run_dir)), who))
            except Exception as error:  # noqa: BLE001 (other ranks wait: they are told first)
                self._note_failure(who, "build", error)

    @property
    def wants_end(self) -> bool:
        """Whether a callback of this rank asked for a stop or failed; goes into the next step's counts."""
        return self._failure is not None or self._reason is not None

    def agree(self) -> str | None:
        """Why the run is to stop, the same on every rank; None if no callback asked. Collective.

        Raises:
            TrainingError: a callback failed, on whichever rank.
        """
        if not self._any:
            return None
        told: list[Any] = [(self._failure, self._reason)]
        if self._ranks.world_size > 1:
            told *= self._ranks.world_size
            dist.all_gather_object(told, (self._failure, self._reason))
        for failure, _ in told:
            if failure is not None:
                raise TrainingError(failure)
        return next((reason for _, reason in told if reason is not None), None)

    def train_start(self, event: TrainStart) -> None:
        for told in self._told:
            own = replace(event, config=copy.deepcopy(dict(event.config)))
            self._call(told, "on_train_start", own)

    def step_end(self, event: StepEnd) -> None:
        event = replace(event, metrics=MappingProxyType(dict(event.metrics)))
        for told in self._told:
            reason = self._call(told, "on_step_end", event, f" of step {event.step}", _reason)
            if reason is not None and self._reason is None:
                self._reason = f"{reason} ({told.who})"

    def checkpoint_saved(self, event: CheckpointSaved) -> None:
        for told in self._told:
            self._call(told, "on_checkpoint_saved", event, f" of step {event.step}")

    def train_end(self, event: TrainEnd) -> None:
        self._is_over = True
        for told in self._told:
            self._call(told, "on_train_end", event)

    def train_error(self, event: TrainFailure) -> None:
        """Raises nothing, and does nothing after `train_end`."""
        if self._is_over:
            return
        self._is_over = True
        for told in self._told:
            self._call(told, "on_train_error", event)

    def _call(
        self,
        told: _Told,
        event_name: str,
        event: Any,
        when: str = "",
        check: Callable[[Any], str | None] = lambda returned: None,
    ) -> str | None:
        if told.failed:
            return None
        try:
            return check(getattr(told.callback, event_name)(event))
        except Exception as error:  # noqa: BLE001 (somebody else's code, and other ranks wait for this one)
            told.failed = True
            self._note_failure(told.who, event_name + when, error)
            return None

    def _note_failure(self, who: str, where: str, error: Exception) -> None:
        text = " ".join(str(error).split())
        if not isinstance(error, PegboardError):
            frames = traceback.extract_tb(error.__traceback__)
            text = f"{type(error).__name__}: {text} ({frames[-1].filename}:{frames[-1].lineno})"
        message = f"{who} failed in {where}: {text}"
        logger.opt(exception=error).error(message)
        if self._failure is None:
            self._failure = message


def check_callback(built: Any) -> Callback:
    """What a component built, if it is a callback whose methods are events.

    Raises:
        PluginError: it is none, or has an `on_...` method that nobody would call.
    """
    if not isinstance(built, Callback):
        raise PluginError(
            f"build() returned {type(built).__name__}; expected an object derived from pegboard.Callback"
        )
    for name in dir(built):
        if name.startswith("on_") and name not in EVENTS:
            near = nearest(name, EVENTS)
            hint = f"did you mean '{near}'?" if near else f"events are {', '.join(EVENTS)}"
            raise PluginError(f"no event calls '{name}': {hint}")
    return built


def _reason(returned: Any) -> str | None:
    if returned is None or (isinstance(returned, str) and returned):
        return returned
    raise PluginError(
        f"on_step_end returned {returned!r}; expected None, or a text that says why the run is to stop"
    )
