"""Learning-rate schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pegboard

from .component import ConstantSchedule, CosineSchedule, LinearSchedule


@pegboard.hookimpl
def register_lr_schedules(register: Callable[[type[Any]], None]) -> None:
    register(ConstantSchedule)
    register(CosineSchedule)
    register(LinearSchedule)
