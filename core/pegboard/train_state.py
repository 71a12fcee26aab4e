"""Save all that a run needs to go on, and read it back under any number of ranks.

Parameters, buffers, optimizer state and random state become one flat dict of tensors that
torch.distributed.checkpoint (DCP) saves and loads in its safetensors storage, so the layout of the
run that wrote does not matter. Safetensors and JSON only: opening runs no code.

    step_00000100/
        state.json              format version, files and their bytes, train_state, counters
        shard-*.safetensors     boxes of tensors; each header says where its boxes lie
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from pegboard.commit import all_ranks, commit_folder, rank_and_world, write_text
from pegboard.device import random_states, set_random_state
from pegboard.errors import CheckpointError
from pegboard.initialization import plain_name
from pegboard.optimizer_state import (
    create_state,
    drop_unsaved_state,
    optimizer_entries,
    set_numbers,
)

__all__ = [
    "FORMAT_VERSION",
    "checkpoint_steps",
    "load_train_state",
    "named_tensors",
    "newest_checkpoint",
    "read_train_state",
    "save_train_state",
]

FORMAT_VERSION = 2

_STATE = "state.json"
# DCP holds a whole file in memory, twice, while it writes it.
_FILE_BYTES = 10**9
_STEP_FOLDER = re.compile(r"step_(\d+)")


def save_train_state(
    folder: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    train_state: Mapping[str, Any],
) -> None:
    """Write parameters, persistent buffers, optimizer state and random state. Collective.

    Plain tensors must be equal on all ranks (one copy is written). Hyperparameters of the
    optimizer are not saved: on resume the config's hold.

    Args:
        folder: made by this call; an existing one is replaced once the new one is complete.
        module: sharded (DTensors) or plain.
        train_state: JSON-able; rank 0's is written.

    Raises:
        CheckpointError: on all ranks if any could not write; nothing is left behind.
    """
    model_tensors = named_tensors(module)
    optimizer_tensors, numbers = optimizer_entries(model_tensors, optimizer)
    rank, world_size = rank_and_world()
    tensors = _prefixed(model_tensors, optimizer_tensors) | _random_state(rank)
    # Safetensors takes no other layout; most tensors have it and are not copied.
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    file_numbers = _file_numbers(tensors)
    state = {
        "format_version": FORMAT_VERSION,
        "world_size": world_size,
        "optimizer_numbers": numbers,
        "train_state": dict(train_state),
    }
    json.dumps(state)  # what can't be written is found before anything is
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)

    def write(temporary: Path) -> None:
        writer = HuggingFaceStorageWriter(
            str(temporary), fqn_to_index_mapping=file_numbers, save_distributed=True
        )
        _run_dcp(lambda: save(tensors, storage_writer=writer, planner=planner))
        if rank == 0:
            files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
            write_text(temporary / _STATE, json.dumps(state | {"files": files}))

    commit_folder(folder, write)


def load_train_state(
    folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Fill module and optimizer in place and give back `train_state`. Collective.

    The random state comes back only under the number of ranks that wrote it; otherwise it stays
    as the caller seeded it.

    Raises:
        CheckpointError: on all ranks; broken or missing files, another format version, or names,
            shapes or dtypes that are not this model's.
    """
    what = f"{folder}: can't be resumed"
    reader = HuggingFaceStorageReader(str(folder))
    state: dict[str, Any] = {}
    entries: dict[str, Any] = {}

    def read_layout() -> None:
        state.update(_read_state(folder))
        entries.update(reader.read_metadata().state_dict_metadata)

    all_ranks(what, read_layout)
    train_state: dict[str, Any] = state["train_state"]
    model_tensors = named_tensors(module)
    _check_same(folder, "model", _prefixed(model_tensors, {}), entries)
    create_state(optimizer)
    saved_numbers: dict[str, Any] = state["optimizer_numbers"]
    saved = {name[len("optim.") :] for name in entries if name.startswith("optim.")}
    drop_unsaved_state(model_tensors, optimizer, saved | saved_numbers.keys())
    optimizer_tensors, numbers = optimizer_entries(model_tensors, optimizer)
    tensors = _prefixed(model_tensors, optimizer_tensors)
    _check_same(folder, "optimizer", _prefixed({}, optimizer_tensors), entries)
    if saved_numbers.keys() != numbers.keys():
        odd = sorted(saved_numbers.keys() ^ numbers.keys())[:5]
        raise CheckpointError(f"{folder}: optimizer: state that only one side has: {odd}")
    set_numbers(model_tensors, optimizer, saved_numbers)
    rank, world_size = rank_and_world()
    random_state: dict[str, Tensor] = {}
    if state["world_size"] == world_size:
        random_state = {n: t for n, t in _random_state(rank).items() if n in entries}
    tensors |= random_state
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)

    def read() -> None:
        with torch.no_grad():
            _run_dcp(lambda: load(tensors, storage_reader=reader, planner=planner))

    all_ranks(what, read)
    _restore_random_state(random_state)
    return train_state


def read_train_state(folder: Path) -> dict[str, Any]:
    """`train_state` of a checkpoint, without its tensors. Collective.

    Raises:
        CheckpointError: on all ranks, as `load_train_state` where the files are broken.
    """
    state: dict[str, Any] = {}
    all_ranks(f"{folder}: can't be resumed", lambda: state.update(_read_state(folder)))
    train_state: dict[str, Any] = state["train_state"]
    return train_state


def checkpoint_steps(run_dir: Path) -> dict[int, Path]:
    """Step -> folder of every complete checkpoint of a run, by step."""
    found: dict[int, Path] = {}
    parent = run_dir / "checkpoints"
    if parent.is_dir():
        for folder in parent.iterdir():
            match = _STEP_FOLDER.fullmatch(folder.name)
            if match and (folder / _STATE).is_file():
                found[int(match[1])] = folder
    return dict(sorted(found.items()))


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The complete checkpoint of the highest step under `run_dir/checkpoints`, if there is one."""
    steps = checkpoint_steps(run_dir)
    return steps[max(steps)] if steps else None


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, sharded as they are; a tied tensor once.

    Names are free of what activation checkpointing and compilation put into them.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    # NOTE: state_dict, not named_parameters: FSDP reshards gathered parameters for it first.
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{name}: a module's extra state is {type(tensor).__name__}, expected tensors only; "
                "keep it in a persistent buffer"
            )
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[plain_name(name)] = tensor
    return tensors


def _prefixed(model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}": t for name, t in model.items()} | {
        f"optim.{name}": t for name, t in optimizer.items()
    }


def _run_dcp(action: Callable[[], object]) -> None:
    """Let `action` fail only on the ranks that failed themselves: `all_ranks` tells the others."""
    try:
        with warnings.catch_warnings():
            # One process without a process group is as intended.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            action()
    except CheckpointException as error:
        rank, _ = rank_and_world()
        if rank in error.failures:
            raise error.failures[rank][0] from None


def _file_numbers(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Name -> number of the file that takes it, so that a rank's files stay small."""
    numbers: dict[str, int] = {}
    file_bytes, number = 0, 1
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if file_bytes and file_bytes + local.nbytes > _FILE_BYTES:
            file_bytes, number = 0, number + 1
        file_bytes += local.nbytes
        numbers[name] = number
    # DCP takes the first rank's numbers for all ranks, whose random states have other names.
    _, world_size = rank_and_world()
    for rank in range(world_size):
        numbers |= {f"random.{rank}.{device}": 1 for device in ("cpu", "cuda")}
    return numbers


def _read_state(folder: Path) -> dict[str, Any]:
    """`state.json`, once all the files it lists are there."""
    path = folder / _STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        version = state["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not a readable checkpoint: {error!r}; delete its folder, and --resume takes the one before"
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {version}, expected {FORMAT_VERSION}; resume with the version "
            "that wrote it"
        )
    # DCP reads the files that it finds and leaves what none of them fills as it was.
    for name, size in state["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            raise CheckpointError(
                f"{file}: missing or damaged, expected {size} bytes; delete this checkpoint's folder, and --resume takes the one before"
            )
    return dict(state)


def _random_state(rank: int) -> dict[str, Tensor]:
    """uint8 states of torch's generators on this rank, under names of its own."""
    return {f"random.{rank}.{device}": state for device, state in random_states().items()}


def _restore_random_state(states: Mapping[str, Tensor]) -> None:
    for name, state in states.items():
        set_random_state(name.rpartition(".")[2], state)


def _check_same(
    folder: Path, part: str, tensors: Mapping[str, Tensor], entries: Mapping[str, Any]
) -> None:
    """The checkpoint's names, shapes and dtypes of this part are ours."""
    prefix = {"model": "model.", "optimizer": "optim."}[part]
    saved = {name for name in entries if name.startswith(prefix)}

    def some(names: Iterable[str]) -> str:
        listed = sorted(name.removeprefix(prefix) for name in names)
        return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")

    if missing := set(tensors) - saved:
        raise CheckpointError(
            f"{folder}: {part}: the checkpoint lacks {some(missing)}; "
            "resume with the config that wrote it"
        )
    if left_over := saved - set(tensors):
        raise CheckpointError(
            f"{folder}: {part}: the checkpoint has {some(left_over)}, which this run doesn't; "
            "resume with the config that wrote it"
        )
    for name, tensor in tensors.items():
        found = _describe(entries[name].size, entries[name].properties.dtype)
        expected = _describe(tensor.shape, tensor.dtype)
        if found != expected:
            raise CheckpointError(
                f"{folder}: {part}: {name.removeprefix(prefix)} is {found} in the checkpoint, "
                f"expected {expected}; resume with the config that wrote it"
            )


def _describe(shape: Iterable[int], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
