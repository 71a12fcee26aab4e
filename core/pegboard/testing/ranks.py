"""Run a function on several gloo ranks, each a fresh process.

The part under test is found again in the child by its module's file, so that it may stand in a test
file that no import path leads to.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pegboard.testing.case import Case

__all__ = ["load_class", "run_on_ranks"]

_CHILD = "from pegboard.testing.ranks import child; child()"


def run_on_ranks(
    world_size: int, function: Callable[[Case, int, int], list[float]], case: Case
) -> list[float]:
    """What rank 0's `function(case, rank, world_size)` gives.

    Args:
        world_size: number of processes, each on one thread.
        function: at the top of a module that can be imported.
        case: of its options travel those that JSON can say, and functions at the top of a module.

    Raises:
        AssertionError: a rank failed (with its output), or they did not end within two minutes.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cls = case.component
    file = sys.modules[cls.__module__].__file__
    job = {
        "function": [function.__module__, function.__name__],
        "component": [cls.__module__, file, cls.__qualname__],
        "config": dict(case.config),
        "options": {n: v for n, v in case.options.items() if _is_json(v)},
        "functions": {
            n: [v.__module__, sys.modules[v.__module__].__file__, v.__qualname__]
            for n, v in case.options.items()
            if inspect.isfunction(v) and "<" not in v.__qualname__
        },
        "folder": str(case.folder),
    }
    children = []
    for rank in range(world_size):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "PEGBOARD_CHECK": json.dumps(job),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        children.append(
            subprocess.Popen(
                [sys.executable, "-c", _CHILD],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = []
    try:
        for rank, process in enumerate(children):
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, f"rank {rank} of {world_size} failed:\n{output}"
            said.append(output)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"{world_size} ranks hang: two minutes passed") from error
    finally:
        for process in children:
            process.kill()
            process.wait()
    line = next(line for line in said[0].splitlines() if line.startswith("result "))
    result: list[float] = json.loads(line.removeprefix("result "))
    return result


def child() -> None:
    """What each process runs."""
    from pegboard.parallel import leave_ranks

    job: dict[str, Any] = json.loads(os.environ["PEGBOARD_CHECK"])
    module_name, name = job["function"]
    function = getattr(importlib.import_module(module_name), name)
    functions = {name: load_class(*place) for name, place in job["functions"].items()}
    options = {**job["options"], **functions}
    case = Case(load_class(*job["component"]), job["config"], Path(job["folder"]), options)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    result = function(case, rank, world_size)
    leave_ranks()
    print("result " + json.dumps(result), flush=True)


def load_class(module_name: str, file: str, qualname: str) -> Any:
    """A class or function in a fresh process: by its module's name, else by its file."""
    try:
        module: Any = importlib.import_module(module_name)
    except ImportError:
        spec = importlib.util.spec_from_file_location(module_name, file)
        if spec is None or spec.loader is None:
            raise
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    for part in qualname.split("."):
        module = getattr(module, part)
    return module


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
