"""Published safetensors into a (sharded) module: each rank reads its own rows and nothing else.

The weight map is read from the disk: for every piece, the part of it that this rank holds is cut
out of the memory-mapped file. Everything that does not fit is found first and told in one report;
then tensors are copied.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pegboard.errors import WeightsError
from pegboard.initialization import local_box, local_part, plain_name
from pegboard.weight_map import overlap

if TYPE_CHECKING:
    from torch import nn

    from pegboard.weight_map import WeightMap

__all__ = ["LoadReport", "load_published_weights"]

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SHOWN = 8
_NAMES = frozenset({"architectures", "dtype", "model_type", "torch_dtype", "transformers_version"})
"""Keys of config.json that say what something is called, not how large it is."""
_RESIZE_HINT = "; set resize_embeddings to true to add rows"


class LoadReport(NamedTuple):
    """What was loaded."""

    dtype: str
    """Dtype that most of the elements have on disk, such as `bfloat16`."""
    num_tensors: int
    """Published tensors read, in part or whole."""
    resized: tuple[str, ...]
    """Parameters with more rows than were published; the last rows keep what they had."""


class _OnDisk(NamedTuple):
    file: Path
    shape: tuple[int, ...]
    dtype: str


def load_published_weights(
    module: nn.Module,
    weight_map: WeightMap,
    folder: str | Path,
    *,
    resize_embeddings: bool = False,
    hf_config: Mapping[str, Any] | None = None,
    file_name: str = "model.safetensors",
) -> LoadReport:
    """Copy a published folder's weights into `module` in place, converting dtype. No communication.

    Args:
        module: allocated (not meta), plain or sharded; parameters named as in `weight_map`.
        weight_map: names and layouts.
        folder: holds `file_name`, or `file_name`.index.json and the files that it lists.
        resize_embeddings: parameters whose first dim is the vocabulary (of `nn.Embedding`, or of a
            module with a true `holds_vocabulary`) may have more rows than published: the first rows
            are filled.
        hf_config: the model's config.json, to name the field behind a shape that differs.
        file_name: what the weights are called.

    Raises:
        WeightsError: one report of every missing file and every missing, unexpected or misshapen
            tensor; nothing has been copied then.
    """
    import torch

    folder = Path(folder)
    parameters = {plain_name(name): p for name, p in module.named_parameters()}
    growing = _vocabulary_parameters(module) if resize_embeddings else frozenset()
    disk = _read_headers(folder, file_name)
    weight_map = weight_map.as_found(disk)
    resized = _check(weight_map, disk, folder, growing, hf_config)
    with ExitStack() as stack, torch.no_grad():
        open_files: dict[Path, Any] = {}
        for entry in weight_map.entries:
            parameter = parameters[entry.ours]
            target, held = local_part(parameter), local_box(parameter)
            for piece in entry.pieces:
                source = disk[piece.published]
                region = overlap(piece, entry.shape, held, source.shape)
                if region is None:
                    continue
                into, out_of = region
                if source.file not in open_files:
                    open_files[source.file] = stack.enter_context(_open(source.file))
                if source.shape:
                    values = open_files[source.file].get_slice(piece.published)[out_of]
                else:
                    values = open_files[source.file].get_tensor(piece.published)
                target[into].copy_(values.unsqueeze(0) if piece.squeeze else values)
    names = [piece.published for entry in weight_map.entries for piece in entry.pieces]
    return LoadReport(_main_dtype([disk[name] for name in names]), len(set(names)), resized)


def _read_headers(folder: Path, file_name: str) -> dict[str, _OnDisk]:
    """Every tensor in the folder; reads the files' headers only."""
    files = _weight_files(folder, file_name)
    if missing := [path.name for path in files if not path.is_file()]:
        raise WeightsError(
            f"{folder}: {len(missing)} of {len(files)} weight files are missing: {_some(missing)}; "
            "download them again"
        )
    disk: dict[str, _OnDisk] = {}
    for path in files:
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                tensor = file.get_slice(name)
                disk[name] = _OnDisk(path, tuple(tensor.get_shape()), tensor.get_dtype())
    return disk


def _weight_files(folder: Path, file_name: str) -> list[Path]:
    single, index = folder / file_name, folder / f"{file_name}.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            if not all(isinstance(name, str) for name in names):
                raise TypeError("a file name that is no text")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(
                f"{index}: not a safetensors index ({error}); download it again"
            ) from error
        if outside := [name for name in names if Path(name).name != name]:
            raise WeightsError(f"{index}: {_some(outside)} is not a plain file name; refused")
        return [folder / name for name in sorted(names)]
    if pickled := sorted(
        path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)
    ):
        raise WeightsError(
            f"{folder}: found only pickled weights ({_some(pickled)}), which can run code when "
            "opened; convert them to safetensors, or load a repository that has them"
        )
    what = "no such folder" if not folder.is_dir() else "found no weights"
    raise WeightsError(f"{folder}: {what}; expected {single.name} or {index.name}")


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise WeightsError(
            f"{path}: not a whole safetensors file ({error}); download it again"
        ) from error


def _check(
    weight_map: WeightMap,
    disk: Mapping[str, _OnDisk],
    folder: Path,
    growing: frozenset[str],
    hf_config: Mapping[str, Any] | None,
) -> tuple[str, ...]:
    """Raise one report of all that does not fit; return what is longer than published."""
    expected = weight_map.published_shapes()
    missing = [name for name in expected if name not in disk]
    unexpected = [
        name
        for name in disk
        if name not in expected
        and name not in weight_map.tied
        and not name.endswith("rotary_emb.inv_freq")
    ]
    owners = {piece.published: entry.ours for entry in weight_map.entries for piece in entry.pieces}
    whole = {
        piece.published
        for entry in weight_map.entries
        for piece in entry.pieces
        if not (piece.ours or piece.theirs or piece.squeeze)
    }
    misshapen, resized = [], []
    for name, want in expected.items():
        found = disk[name].shape if name in disk else want
        if found == want:
            continue
        rows_only = found[1:] == want[1:] and len(found) == len(want) and found[0] < want[0]
        if rows_only and name in whole and owners[name] in growing:
            resized.append(owners[name])
        else:
            hint = _RESIZE_HINT if rows_only and _is_vocabulary(name) else ""
            misshapen.append(f"{name} is {list(found)} on disk, {list(want)} in the model{hint}")
    problems = []
    for what, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)):
        if names:
            problems.append(
                f"{len(names)} {what}: {_some(names, '; ' if what == 'misshapen' else ', ')}"
            )
    if not problems:
        return tuple(resized)
    if fields := _differing_fields(folder, hf_config):
        problems.append(f"fields that differ from {folder / 'config.json'}: {_some(fields)}")
    raise WeightsError(f"{folder}: weights do not fit the model\n  " + "\n  ".join(problems))


def _vocabulary_parameters(module: nn.Module) -> frozenset[str]:
    from torch import nn

    return frozenset(
        plain_name(f"{name}.{key}" if name else key)
        for name, owner in module.named_modules()
        if isinstance(owner, nn.Embedding) or getattr(owner, "holds_vocabulary", False)
        for key, parameter in owner._parameters.items()
        if parameter is not None
    )


def _is_vocabulary(published: str) -> bool:
    return published.endswith(("embed_tokens.weight", "lm_head.weight"))


def _differing_fields(folder: Path, hf_config: Mapping[str, Any] | None) -> list[str]:
    try:
        published = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return _differences(hf_config or {}, published, "")


def _differences(ours: Mapping[str, Any], theirs: Any, prefix: str) -> list[str]:
    """Whole numbers, flags, lists and kinds only: nothing else shapes weights."""
    if not isinstance(theirs, Mapping):
        return []
    found = []
    for key, value in ours.items():
        if key not in theirs or key.startswith("rope") or key in _NAMES:
            continue
        if isinstance(value, Mapping):
            found += _differences(value, theirs[key], f"{prefix}{key}.")
        elif isinstance(value, (int, str, list)) and value != theirs[key]:
            found.append(f"{prefix}{key} (model {value!r}, weights {theirs[key]!r})")
    return found


def _main_dtype(tensors: Sequence[_OnDisk]) -> str:
    from math import prod

    sizes: dict[str, int] = {}
    for tensor in tensors:
        if tensor.dtype in _DTYPES:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + prod(tensor.shape)
    return _DTYPES[max(sizes, key=lambda dtype: sizes[dtype])] if sizes else "float32"


def _some(names: Sequence[str], separator: str = ", ") -> str:
    shown = separator.join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown}{separator}and {len(names) - _SHOWN} more"
