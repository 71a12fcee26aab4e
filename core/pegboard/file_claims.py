"""Share work through a folder: who does what, and whether they are still alive.

A claim is a small file that names its owner; making it is the claim, removing it ends it. Who waits
asks for the owner's life: on this machine by process id and start time, elsewhere by the claim's
time, which its owner renews. A claim whose owner is gone is taken away, so nobody waits for the dead.
NOTE: a claim saves work, it does not exclude: in rare races two processes do the same thing, so what
is claimed must end in one atomic rename of equal bytes.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = [
    "Claims",
    "describe_owner",
    "do_once",
    "is_alive_here",
    "open_claims",
    "owner_of_this_process",
]

_RENEW_S = 5.0
_STALE_S = 30.0
"""A claim of another machine that was not renewed for so long (by our clock) is nobody's."""
_CHECK_S = 0.5
_POLL_S = 0.05
_LONGEST_POLL_S = 0.5


def owner_of_this_process() -> dict[str, Any]:
    """What a claim says of its owner: enough to ask later whether it still runs."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": pid,
        "started": _start_time(pid),
    }


def is_alive_here(owner: dict[str, Any]) -> bool | None:
    """Whether the owner runs; None if it is of another machine, so that this one can't know."""
    if owner.get("machine") != _machine():
        return None
    pid = owner.get("pid")
    if not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _start_time(pid) == owner.get("started")


def describe_owner(owner: dict[str, Any]) -> str:
    """`process 123 on host`, for messages."""
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"


class Claims:
    """The claims of a folder, as one process sees them; close it when done.

    Args:
        folder: must be there; claims are `<name>.claim` in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._text = json.dumps(owner_of_this_process()).encode()
        self._held: set[Path] = set()
        self._seen: dict[Path, tuple[int, float]] = {}
        """Foreign claim -> its time when it last changed, and our clock then."""
        self._checked: dict[Path, float] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, name: str) -> bool:
        """Claim `name`; False if a living process has it.

        Raises:
            FileNotFoundError: the folder is gone.
        """
        path = self._path(name)
        if self._make(path):
            return True
        if not self._is_dead(path):
            return False
        # Renaming first makes sure that only one of those who see it dead removes it.
        aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.dead")
        with suppress(FileNotFoundError):
            os.rename(path, aside)
            aside.unlink(missing_ok=True)
        return self._make(path)

    def release(self, name: str) -> None:
        """End a claim of this process."""
        path = self._path(name)
        self._held.discard(path)
        path.unlink(missing_ok=True)

    def owner(self, name: str) -> dict[str, Any] | None:
        """Who has `name`; None if nobody, or if it can't be read."""
        return _read_owner(self._path(name))

    def close(self) -> None:
        """End every claim of this process."""
        self._stop.set()
        for path in list(self._held):
            path.unlink(missing_ok=True)
        self._held.clear()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.claim"

    def _make(self, path: Path) -> bool:
        draft = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.new")
        draft.write_bytes(self._text)
        try:
            os.link(draft, path)  # whole at once, unlike open(..., "x") and a write
        except FileExistsError:
            return False
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise
            # A file system without hard links.
            try:
                with path.open("xb") as file:
                    file.write(self._text)
            except FileExistsError:
                return False
        finally:
            draft.unlink(missing_ok=True)
        self._held.add(path)
        if self._thread is None:
            self._thread = threading.Thread(target=self._renew, daemon=True, name="pegboard-claims")
            self._thread.start()
        return True

    def _renew(self) -> None:
        while not self._stop.wait(_RENEW_S):
            for path in list(self._held):
                with suppress(OSError):
                    os.utime(path)

    def _is_dead(self, path: Path) -> bool:
        now = time.monotonic()
        if now - self._checked.get(path, -_CHECK_S) < _CHECK_S:
            return False
        self._checked[path] = now
        owner = _read_owner(path)
        alive = is_alive_here(owner) if owner is not None else None
        if alive is not None:
            return not alive
        try:
            changed = path.stat().st_mtime_ns
        except FileNotFoundError:
            return False
        last, since = self._seen.get(path, (None, now))
        if changed != last:
            self._seen[path] = (changed, now)
            return False
        return now - since > _STALE_S


def do_once(
    claims: Claims,
    name: str,
    is_done: Callable[[], bool],
    work: Callable[[], None],
    waiting: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Do `work` in one of the processes that ask for it; return in all when `is_done`.

    A process that fails leaves the work to the next, which then fails by itself, or doesn't.

    Args:
        waiting: called about once in ten seconds with the owner who is waited for.
    """
    pause, told = _POLL_S, time.monotonic()
    while not is_done():
        try:
            taken = claims.take(name)
        except FileNotFoundError:
            if is_done():
                return
            raise
        if taken:
            try:
                if not is_done():
                    work()
            finally:
                claims.release(name)
            return
        if waiting is not None and time.monotonic() - told > 10:
            told = time.monotonic()
            if (owner := claims.owner(name)) is not None:
                waiting(owner)
        time.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_POLL_S)


@contextmanager
def open_claims(folder: Path) -> Iterator[Claims]:
    """The claims of a folder, all released at the end."""
    claims = Claims(folder)
    try:
        yield claims
    finally:
        claims.close()


def _read_owner(path: Path) -> dict[str, Any] | None:
    try:
        owner = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return owner if isinstance(owner, dict) else None


def _machine() -> str:
    """Where a process id means the same process: this boot, this process namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _start_time(pid: int) -> str:
    """Tells a process from a later one of the same id; empty where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return ""
    # Killed, but its parent has not asked for it yet: such a one does no more work.
    return "ended" if fields[0] in "ZX" else fields[19]
