"""Notice what a plugin does to the process while it is imported, name it, and undo it.

What is merely installed changes no run, so a plugin that prints, or changes what all code shares, is
told of and its change taken back. This is a fence against carelessness, not a sandbox: a plugin is
Python code with the rights of whoever starts the run.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO, cast

from pegboard.launch_errors import is_speaker
from pegboard.plugin_sources import PluginSource

__all__ = ["guarded"]

SLOW_AFTER_S = 5.0
_BLANKET = (Warning, UserWarning, DeprecationWarning, FutureWarning, RuntimeWarning)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def guarded(source: PluginSource) -> Iterator[list[str]]:
    """Import a plugin and call its hooks inside; yields the list that notes are added to at the end.

    Its prints go to stderr, so that they spoil no `--json`. After 5 s it is named while it is still
    importing.
    """
    notes: list[str] = []
    before = _Snapshot()
    output = _Diverted(sys.stderr)
    timer = threading.Timer(SLOW_AFTER_S, _tell_slow, (source,))
    timer.daemon = True
    timer.start()
    try:
        with redirect_stdout(cast(TextIO, output)):
            try:
                yield notes
            finally:
                if sys.stdout is not output:
                    notes.append("it replaces sys.stdout (undone)")
                    _keep_until_exit(sys.stdout)
    finally:
        timer.cancel()
        if output.first_line:
            notes.append(f"it prints while it is loaded: {output.first_line!r}")
        for what in before.undo():
            notes.append(f"it changes {what}" + ("" if "can't be undone" in what else " (undone)"))


def _tell_slow(source: PluginSource) -> None:
    if is_speaker():
        print(
            f"plugin {source} has been loading for {SLOW_AFTER_S:.0f} s. {source.remedy}",
            file=sys.stderr,
            flush=True,
        )


class _Diverted:
    """Another stream (with its encoding, buffer, ...) that keeps the first line written to it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._kept = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if len(self._kept) < 80:
            self._kept += text[:80]
        return self._stream.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def close(self) -> None:
        """The stream is not the plugin's to close."""

    def detach(self) -> Any:
        """Nor to take apart: what it wraps anew goes on to serve both."""
        return self._stream.buffer

    @property
    def first_line(self) -> str:
        lines = self._kept.strip().splitlines()
        return lines[0] if lines else ""


class _Snapshot:
    """What all code of the process shares, and how to put it back."""

    def __init__(self) -> None:
        self._environment = dict(os.environ)
        self._path = list(sys.path)
        self._filters = list(warnings.filters)
        self._watched: list[tuple[str, Callable[[], Any], Any, Callable[[Any], object]]] = [
            (what, read, read(), restore) for what, read, restore in _WATCHED
        ]

    def undo(self) -> list[str]:
        """What has changed since, in words; it is as it was after the call."""
        changed = []
        for what, read, old, restore in self._watched:
            if old is not None and read() != old:
                try:
                    restore(old)
                except (OSError, TypeError, ValueError) as error:
                    what += f", which can't be undone: {error}"
                changed.append(what)
        changed += self._undo_environment()
        if sys.path[: len(self._path)] != self._path:
            changed.append("the order of sys.path")
            sys.path[:] = [*self._path, *(p for p in sys.path if p not in self._path)]
        if self._blanket_filters():
            changed.append("the warnings filters for all code")
            warnings.filters[:] = self._filters  # type: ignore[index]
            with warnings.catch_warnings():
                pass  # forgets what was decided under the other filters
        return changed

    def _undo_environment(self) -> list[str]:
        """Variables that were there: a library that is imported may add its own."""
        names = [n for n, value in self._environment.items() if os.environ.get(n) != value]
        for name in names:
            os.environ[name] = self._environment[name]
        return [f"the environment ({', '.join(sorted(names))})"] if names else []

    def _blanket_filters(self) -> bool:
        """Filters that hold for every module's warnings; numpy and torch add narrow ones."""
        now = warnings.filters
        if any(one not in now for one in self._filters):
            return True
        return any(
            message is None and module is None and category in _BLANKET
            for one in now
            if one not in self._filters
            for _, message, category, module, _ in [one]
        )


def _keep_until_exit(replaced: object) -> None:
    """A `TextIOWrapper(sys.stdout.buffer)` that nobody holds any more closes our own stream's buffer."""
    atexit.register(lambda kept: None, replaced)


def _restore_stderr(stream: Any) -> None:
    _keep_until_exit(sys.stderr)
    sys.stderr = stream


def _current_folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was deleted
        return None


def _random_state() -> Any:
    """None before anybody has imported it: it costs a tenth of the start."""
    random = sys.modules.get("random")
    return random.getstate() if random is not None else None


def _restore_random(state: Any) -> None:
    if state is not None:
        sys.modules["random"].setstate(state)


def _torch_modes() -> tuple[str, bool, str]:
    """As torch starts with, where nobody has imported it: the plugin may be who does."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "get_float32_matmul_precision"):
        return "float32", True, "highest"
    return (
        str(torch.get_default_dtype()).removeprefix("torch."),
        torch.is_grad_enabled(),
        torch.get_float32_matmul_precision(),
    )


def _restore_torch(modes: tuple[str, bool, str]) -> None:
    torch = sys.modules["torch"]
    torch.set_default_dtype(getattr(torch, modes[0]))
    torch.set_grad_enabled(modes[1])
    torch.set_float32_matmul_precision(modes[2])


def _logging_state() -> tuple[int, tuple[logging.Handler, ...], int]:
    root = logging.getLogger()
    return root.level, tuple(root.handlers), root.manager.disable


def _restore_logging(state: tuple[int, tuple[logging.Handler, ...], int]) -> None:
    root = logging.getLogger()
    root.setLevel(state[0])
    root.handlers[:] = state[1]
    logging.disable(state[2])


def _signal_handlers() -> tuple[Any, ...]:
    return tuple(map(signal.getsignal, _SIGNALS))


def _restore_signals(handlers: tuple[Any, ...]) -> None:
    for number, handler in zip(_SIGNALS, handlers, strict=True):
        signal.signal(number, handler)


_WATCHED: tuple[tuple[str, Callable[[], Any], Callable[[Any], object]], ...] = (
    ("the current folder", _current_folder, os.chdir),
    ("the root logger", _logging_state, _restore_logging),
    ("the handlers of SIGINT or SIGTERM", _signal_handlers, _restore_signals),
    ("sys.stderr", lambda: sys.stderr, _restore_stderr),
    ("sys.excepthook", lambda: sys.excepthook, lambda old: setattr(sys, "excepthook", old)),
    ("the state of random", _random_state, _restore_random),
    ("torch's default dtype, gradient mode or precision", _torch_modes, _restore_torch),
)
