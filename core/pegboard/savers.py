"""What a saver is given, and when it is called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pegboard.contracts import BuiltModel, Tokenizer

__all__ = ["SaveRequest", "Saver"]


@dataclass(frozen=True, kw_only=True)
class SaveRequest:
    """The state of a run at the end of a step. Every rank gets one, at the same step."""

    step: int
    is_last: bool
    """The run ends after this step, or was asked to stop."""
    run_dir: Path
    model: BuiltModel
    module: nn.Module
    """The sharded module."""
    optimizer: torch.optim.Optimizer
    tokenizer: Tokenizer
    loaded_dtype: str | None
    """Dtype of the weights the run started from, such as `bfloat16`; None from scratch."""
    source_folder: Path | None
    """Folder of the weights the run started from."""
    train_state: Mapping[str, Any]
    """JSON-able: step, data cursor, run identity, counters."""


class Saver(Protocol):
    """A built saver. `due` must say the same on every rank; `save` is collective."""

    def due(self, step: int, *, is_last: bool) -> bool: ...

    def save(self, request: SaveRequest) -> Path | None:
        """Write, commit by rename, return what was written (None if nothing)."""
        ...
