"""Save all that a run needs to go on, and read it back under any number of ranks.

Each rank writes the boxes of the tensors that it holds into one safetensors file; `manifest.json`
says which box lies in which file. A reader fills its own boxes from whatever overlaps them, so the
layout of the run that wrote does not matter. Safetensors and JSON only: opening runs no code.

    step_00000100/
        state.json                        format version, train_state (cursor, counters)
        manifest.json                     tensor -> shape, dtype, [file, offsets, sizes]
        shard_00000_of_00002.safetensors  boxes, and the random state of rank 0
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pegboard.commit import all_ranks, commit_folder, gather_from_ranks, rank_and_world, write_text
from pegboard.errors import CheckpointError
from pegboard.optimizer_state import (
    create_state,
    drop_unsaved_state,
    optimizer_entries,
    set_numbers,
)
from pegboard.tensor_file import TensorFileWriter, TensorSpec

__all__ = [
    "FORMAT_VERSION",
    "checkpoint_steps",
    "load_train_state",
    "named_tensors",
    "newest_checkpoint",
    "save_train_state",
]

FORMAT_VERSION = 1

_STATE = "state.json"
_MANIFEST = "manifest.json"
_STEP_FOLDER = re.compile(r"step_(\d+)")
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


class _Box(NamedTuple):
    """The part of a whole tensor that one rank holds."""

    shape: tuple[int, ...]
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


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
    tensors = _prefixed(model_tensors, optimizer_tensors)
    rank, world_size = rank_and_world()
    boxes = {name: _local_box(name, tensor) for name, tensor in tensors.items()}
    held: list[dict[str, _Box]] = gather_from_ranks(boxes)
    owners = _assign_owners(held)
    random_state = _random_state()
    state_text = json.dumps({"format_version": FORMAT_VERSION, "train_state": dict(train_state)})
    manifest = {
        "format_version": FORMAT_VERSION,
        "world_size": world_size,
        "tensors": _manifest_entries(held, owners),
        "optimizer_numbers": numbers,
    }

    def write(temporary: Path) -> None:
        mine = [name for name in tensors if (rank, name) in owners]
        layout = {name: TensorSpec(boxes[name].sizes, tensors[name].dtype) for name in mine}
        layout |= {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in random_state.items()}
        with TensorFileWriter(temporary / _shard_name(rank, world_size), layout, {}) as file:
            for name in mine:
                file.write(name, _local_part(tensors[name]))
            for name, tensor in random_state.items():
                file.write(name, tensor)
        if rank == 0:
            write_text(temporary / _MANIFEST, json.dumps(manifest))
            write_text(temporary / _STATE, state_text)

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
    state = _read_json(folder / _STATE)
    manifest = _read_json(folder / _MANIFEST)
    for part, name in ((state, _STATE), (manifest, _MANIFEST)):
        if part.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{folder / name}: format version {part.get('format_version')}, expected "
                f"{FORMAT_VERSION}; resume with the version that wrote it"
            )
    entries: dict[str, Any] = manifest["tensors"]
    model_tensors = named_tensors(module)
    _check_same(folder, "model", _prefixed(model_tensors, {}), entries)
    create_state(optimizer)
    saved_numbers: dict[str, Any] = manifest["optimizer_numbers"]
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

    def read() -> None:
        with _ShardReader(folder) as shards, torch.no_grad():
            for name, tensor in tensors.items():
                _fill(folder, name, tensor, entries[name]["pieces"], shards)
            if manifest["world_size"] == world_size:
                _restore_random_state(shards, _shard_name(rank, world_size))

    all_ranks(f"{folder}: can't be resumed", read)
    train_state = state["train_state"]
    if not isinstance(train_state, dict):
        raise CheckpointError(f"{folder / _STATE}: train_state is not an object")
    return train_state


def checkpoint_steps(run_dir: Path) -> dict[int, Path]:
    """Step -> folder of every complete checkpoint of a run, by step."""
    found: dict[int, Path] = {}
    parent = run_dir / "checkpoints"
    if parent.is_dir():
        for folder in parent.iterdir():
            match = _STEP_FOLDER.fullmatch(folder.name)
            if match and (folder / _STATE).is_file() and (folder / _MANIFEST).is_file():
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
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def _prefixed(model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}": t for name, t in model.items()} | {
        f"optim.{name}": t for name, t in optimizer.items()
    }


def _local_part(tensor: Tensor) -> Tensor:
    """What this rank holds, as a view."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _local_box(name: str, tensor: Tensor) -> _Box:
    shape = tuple(tensor.shape)
    dtype = str(tensor.dtype).removeprefix("torch.")
    if not isinstance(tensor, DTensor):
        return _Box(shape, dtype, (0,) * len(shape), shape)
    chunks = tensor.__create_chunk_list__()
    held = tuple(int(size) for size in _local_part(tensor).shape)
    if len(chunks) != 1 or (0 not in held and tuple(chunks[0].sizes) != held):
        raise CheckpointError(
            f"{name}: this rank holds {held} of {shape} under {tensor.placements}, which is not "
            "one box of the tensor; shard it so that each rank's part is contiguous"
        )
    # An empty part has a box of no volume whatever its offset.
    return _Box(shape, dtype, tuple(chunks[0].offsets), held)


def _assign_owners(held: Sequence[Mapping[str, _Box]]) -> set[tuple[int, str]]:
    """(rank, name) pairs such that each distinct box is written once, bytes evened out."""
    load = [0] * len(held)
    owners: set[tuple[int, str]] = set()
    for name in held[0]:
        holders: dict[_Box, list[int]] = {}
        for rank, boxes in enumerate(held):
            holders.setdefault(boxes[name], []).append(rank)
        for box, ranks in holders.items():
            if math.prod(box.sizes) > 0:
                owner = min(ranks, key=lambda rank: (load[rank], rank))
                load[owner] += math.prod(box.sizes) * getattr(torch, box.dtype).itemsize
                owners.add((owner, name))
    return owners


def _manifest_entries(
    held: Sequence[Mapping[str, _Box]], owners: set[tuple[int, str]]
) -> dict[str, Any]:
    return {
        name: {
            "shape": box.shape,
            "dtype": box.dtype,
            "pieces": [
                [_shard_name(rank, len(held)), held[rank][name].offsets, held[rank][name].sizes]
                for rank in range(len(held))
                if (rank, name) in owners
            ],
        }
        for name, box in held[0].items()
    }


def _shard_name(rank: int, world_size: int) -> str:
    return f"shard_{rank:05d}_of_{world_size:05d}.safetensors"


def _random_state() -> dict[str, Tensor]:
    """uint8 states of torch's generators on this rank."""
    states = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["rng.cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random_state(shards: _ShardReader, file: str) -> None:
    shard = shards.open(file)
    torch.set_rng_state(shard.get_tensor("rng.cpu"))
    on_cuda = torch.cuda.is_initialized()
    if on_cuda and "rng.cuda" in set(shard.keys()):
        torch.cuda.set_rng_state(shard.get_tensor("rng.cuda"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a readable checkpoint: {error}; resume from another one"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


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
        found = (tuple(entries[name]["shape"]), entries[name]["dtype"])
        expected = (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        if found != expected:
            raise CheckpointError(
                f"{folder}: {part}: {name.removeprefix(prefix)} is {found[1]} {list(found[0])} in "
                f"the checkpoint, expected {expected[1]} {list(expected[0])}; resume with the "
                "config that wrote it"
            )


class _ShardReader:
    """Keeps the opened shards of a checkpoint (memory-mapped)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.clear()

    def open(self, name: str) -> Any:
        if name not in self._files:
            path = self._folder / name
            try:
                self._files[name] = safe_open(path, framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: missing or damaged: {error}") from error
        return self._files[name]


def _fill(
    folder: Path,
    name: str,
    tensor: Tensor,
    pieces: Iterable[tuple[str, Sequence[int], Sequence[int]]],
    shards: _ShardReader,
) -> None:
    """Copy into this rank's box all that overlaps it."""
    target = _local_part(tensor)
    box = _local_box(name, tensor)
    filled = 0
    for file, offsets, sizes in pieces:
        start = [max(a, b) for a, b in zip(offsets, box.offsets, strict=True)]
        stop = [
            min(a + n, b + m)
            for a, n, b, m in zip(offsets, sizes, box.offsets, box.sizes, strict=True)
        ]
        extent = [b - a for a, b in zip(start, stop, strict=True)]
        if any(n <= 0 for n in extent):
            continue
        theirs = tuple(slice(a - o, b - o) for a, b, o in zip(start, stop, offsets, strict=True))
        ours = tuple(slice(a - o, b - o) for a, b, o in zip(start, stop, box.offsets, strict=True))
        shard = shards.open(file)
        whole = extent == list(sizes)
        part = shard.get_tensor(name) if whole else shard.get_slice(name)[theirs]
        target[ours].copy_(part)
        filled += math.prod(extent)
    if filled != math.prod(box.sizes):
        raise CheckpointError(
            f"{folder}: {name}: {math.prod(box.sizes) - filled} elements are in no file of the "
            "checkpoint; resume from another one"
        )
