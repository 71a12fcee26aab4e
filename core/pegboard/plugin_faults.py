"""What is wrong with a plugin, in one line: its own place, what happened there, what to write.

pluggy checks hooks when a plugin is registered, in words for pluggy's users over several lines; these
are for the author of a plugin, and for whoever has one that broke.
"""

from __future__ import annotations

import importlib
import inspect
import os
import traceback
from pathlib import Path

import pluggy

from pegboard.errors import PegboardError, PluginError
from pegboard.plugin_trace import implementation_place
from pegboard.registry import HOOKS, nearest

__all__ = ["check_hooks", "describe_fault", "signature_fault"]

# Up to the separator: beside `pegboard` lies `pegboard_rivers`, whose frames are the plugin's own.
_OUR_FRAMES = (
    *(os.path.join(Path(f).parent, "") for f in (__file__, importlib.__file__, pluggy.__file__)),
    "<frozen ",
)


def check_hooks(plugin: object, manager: pluggy.PluginManager) -> None:
    """That a registered plugin has hooks, only ones that there are and that run; PluginError otherwise."""
    callers = manager.get_hookcallers(plugin) or []
    if not callers:
        raise PluginError("it has no hooks; mark its register functions with @pegboard.hookimpl")
    known = list(HOOKS.values())
    for caller in callers:
        own = [one for one in caller.get_hookimpls() if one.plugin is plugin]
        # An optional one is of another version of Pegboard, and its author knows.
        if not caller.has_spec() and not all(one.optionalhook for one in own):
            near = nearest(caller.name, known)
            hint = f" Did you mean '{near}'?" if near else f" Hooks: {', '.join(known)}."
            place = implementation_place(getattr(plugin, caller.name))
            raise PluginError(f"{place}: there is no hook '{caller.name}'.{hint}")
        for one in own if caller.has_spec() else ():
            # A wrapper is a generator by its nature.
            if not (one.wrapper or one.hookwrapper) and _runs_later(one.function):
                raise PluginError(
                    f"{implementation_place(one.function)}: {caller.name} is a generator or an async "
                    "function, of which a call runs nothing; write a plain function without yield"
                )


def _runs_later(function: object) -> bool:
    return (
        inspect.isgeneratorfunction(function)
        or inspect.iscoroutinefunction(function)
        or inspect.isasyncgenfunction(function)
    )


def signature_fault(plugin: object, error: pluggy.PluginValidationError) -> PluginError:
    """pluggy's four lines in one, at the function that is wrong."""
    text = " ".join(str(error).split())
    for hook in HOOKS.values():
        function = getattr(plugin, hook, None)
        if function is not None and f"hook {hook!r}" in str(error):
            if "Argument(s)" not in text:
                return PluginError(f"{implementation_place(function)}: {text}")
            return PluginError(
                f"{implementation_place(function)}: {hook}{inspect.signature(function)} does not fit "
                f"the hook; write def {hook}(register)"
            )
    return PluginError(text)


def describe_fault(error: BaseException) -> str:
    """One line: the plugin's own place, then what happened there."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_OUR_FRAMES)
    ]
    place = f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""
    if isinstance(error, SyntaxError) and error.filename:
        place = f"{error.filename}:{error.lineno}: "
    try:
        text = " ".join(str(error).split())
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001 - a stranger's __str__, which may raise SystemExit too
        text = "its message can't be shown"
    if isinstance(error, PegboardError):
        return f"{place}{text}"
    return f"{place}{type(error).__name__}: {text}"
