"""`--trace-hooks`: one line on stderr for each plugin's import and each hook call.

trace: import   losses  3.1 ms
trace: register_losses  losses  .../losses/__init__.py:15  CrossEntropy, MeanError  0.1 ms
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pegboard.launch_errors import is_speaker

if TYPE_CHECKING:
    import pluggy
    from pluggy import HookImpl

__all__ = ["implementation_place", "trace_hooks", "trace_import"]


def trace_hooks(manager: pluggy.PluginManager) -> None:
    """Watch every hook call of a manager from now on."""
    began: list[float] = []

    def before(
        hook: str, implementations: Sequence[HookImpl], arguments: Mapping[str, Any]
    ) -> None:
        began.append(time.perf_counter())

    def after(
        outcome: pluggy.Result[Any],
        hook: str,
        implementations: Sequence[HookImpl],
        arguments: Mapping[str, Any],
    ) -> None:
        seconds = time.perf_counter() - began.pop()
        offered = ", ".join(getattr(arguments.get("register"), "names", ())) or "nothing"
        for implementation in implementations:  # one, as plugins are called one by one
            place = implementation_place(implementation.function)
            failed = f"  raised {type(outcome.exception).__name__}" if outcome.exception else ""
            _say(f"{hook}  {implementation.plugin_name}  {place}  {offered}{failed}", seconds)

    manager.add_hookcall_monitoring(before, after)


@contextmanager
def trace_import(name: str) -> Iterator[None]:
    """Time the import of one plugin."""
    began = time.perf_counter()
    try:
        yield
    finally:
        _say(f"import  {name}", time.perf_counter() - began)


def implementation_place(function: Callable[..., Any]) -> str:
    """`file:line` of a hook's function; empty if it has no code of its own."""
    code = getattr(function, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else ""


def _say(text: str, seconds: float) -> None:
    if is_speaker():
        print(f"trace: {text}  {seconds * 1e3:.1f} ms", file=sys.stderr)
