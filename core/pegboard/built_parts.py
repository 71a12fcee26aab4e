"""What a part's `build` returned has what its kind promises: said where it is built, by the part's name, and not
some steps later in another file's traceback.
"""

from __future__ import annotations

from typing import TypeVar

from pegboard.component import Component
from pegboard.errors import PluginError

__all__ = ["check_built"]

_PROMISED = {
    "dataset": ("__len__", "__getitem__", "key", "fingerprint"),
    "tokenize_fn": ("__call__", "max_length", "take_counts", "fingerprint"),
    "loss": ("__call__", "step_counts"),
    "saver": ("due", "save"),
}
"""Of the kinds that most people write; what else a kind promises, the contract kit tries."""

Built = TypeVar("Built")


def check_built(component: Component, built: Built) -> Built:
    """`built`, as it is.

    Raises:
        PluginError: it is None, or lacks what is asked of a built part of its kind.
    """
    promised = _PROMISED[component.kind]
    missing = [name for name in promised if not hasattr(built, name)]
    if not missing:
        return built
    kind = component.kind.replace("_", " ")
    who = f"{kind} '{type(component).__name__}': build() returned"
    if built is None:
        raise PluginError(f"{who} None; return an object that has {', '.join(promised)}")
    raise PluginError(
        f"{who} an object of type {type(built).__name__}, which lacks {', '.join(missing)}; "
        f"a built {kind} has {', '.join(promised)}"
    )
