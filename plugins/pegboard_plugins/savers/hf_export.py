"""An export that transformers and vLLM open: `run_dir/export/`.

Tensors are gathered one at a time, in the order of the weight map; rank 0 writes each straight to
its place in a file and the others drop it. Which file holds which tensor is planned from shapes
alone, so it does not depend on ranks or sharding.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pegboard import CheckpointError
from pegboard.commit import commit_folder, rank_and_world, write_text
from pegboard.savers import SaveRequest
from pegboard.tensor_file import TensorFileWriter, TensorSpec, num_bytes
from pegboard.train_state import named_tensors
from pegboard.weight_export import iter_published

__all__ = ["HFExporter", "ShardPlan", "plan_shards"]

_EXPORT_DTYPES = ("bfloat16", "float32", "float16")
_COPIED = (
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


class ShardPlan(NamedTuple):
    """Which tensors each weight file holds."""

    files: dict[str, dict[str, TensorSpec]]
    """File name -> tensor name -> shape and dtype."""
    total_bytes: int

    @property
    def file_of(self) -> dict[str, str]:
        """Tensor name -> file name, sorted by tensor name."""
        pairs = ((name, file) for file, layout in self.files.items() for name in layout)
        return dict(sorted(pairs))


def plan_shards(specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> ShardPlan:
    """Fill files in the given order; a tensor over the limit has a file for itself."""
    shards: list[dict[str, TensorSpec]] = []
    room = -1
    for name, spec in specs.items():
        if not shards or num_bytes(spec) > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = spec
        room -= num_bytes(spec)
    if len(shards) == 1:
        files = {"model.safetensors": shards[0]}
    else:
        files = {
            f"model-{index:05d}-of-{len(shards):05d}.safetensors": layout
            for index, layout in enumerate(shards, start=1)
        }
    return ShardPlan(files, sum(num_bytes(spec) for spec in specs.values()))


class HFExporter:
    """Built HFSaver."""

    def __init__(
        self, *, every_steps: int | None, dtype: str | None, max_shard_bytes: int, folder_name: str
    ) -> None:
        self._every_steps = every_steps
        self._dtype = dtype
        self._max_shard_bytes = max_shard_bytes
        self._folder_name = folder_name

    def due(self, step: int, *, is_last: bool) -> bool:
        """At the end, and at multiples of `every_steps`."""
        return is_last or (self._every_steps is not None and step % self._every_steps == 0)

    def save(self, request: SaveRequest) -> Path:
        """Write the export; an earlier one at the same place is replaced. Collective.

        Raises:
            CheckpointError: on all ranks; an earlier export is then still there.
        """
        folder = request.run_dir / self._folder_name
        if self._every_steps is not None:
            folder /= f"step_{request.step:08d}"
        dtype_name = self._dtype or request.loaded_dtype
        if dtype_name not in _EXPORT_DTYPES:
            dtype_name = "bfloat16"
        tensors = named_tensors(request.module)
        specs = _published_specs(request, tensors, getattr(torch, dtype_name))
        plan = plan_shards(specs, self._max_shard_bytes)

        def write(temporary: Path) -> None:
            published = iter_published(tensors, request.model.weight_map, _gather)
            _write_weights(temporary, plan, specs, published)
            if rank_and_world()[0] == 0:
                _write_texts(temporary, plan, dtype_name, request)

        commit_folder(folder, write)
        return folder


def _gather(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _published_specs(
    request: SaveRequest, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, TensorSpec]:
    """Shape and dtype of every tensor of the export, in the map's order; only floats are cast."""
    weight_map = request.model.weight_map
    dtypes: dict[str, torch.dtype] = {}
    for entry in weight_map.entries:
        if entry.ours not in tensors:
            raise CheckpointError(
                f"export: the weight map names {entry.ours!r}, which the module doesn't have"
            )
        ours = tensors[entry.ours].dtype
        for piece in entry.pieces:
            dtypes[piece.published] = dtype if ours.is_floating_point else ours
    return {
        name: TensorSpec(tuple(shape), dtypes[name])
        for name, shape in weight_map.published_shapes().items()
    }


def _write_weights(
    folder: Path,
    plan: ShardPlan,
    specs: Mapping[str, TensorSpec],
    published: Iterable[tuple[str, Tensor]],
) -> None:
    """Take all of `published` on every rank, whatever happens to the disk of rank 0."""
    writes = rank_and_world()[0] == 0
    file_of = plan.file_of
    missing = set(specs)
    open_files: dict[str, TensorFileWriter] = {}
    failure: Exception | None = None
    try:
        for name, tensor in published:
            # Every rank checks, so that all stop at the same tensor.
            if name not in missing or tuple(tensor.shape) != specs[name].shape:
                raise CheckpointError(
                    f"export: tensor {name!r} of shape {tuple(tensor.shape)} is not what the weight "
                    f"map says: {specs.get(name)}"
                )
            missing.remove(name)
            if writes and failure is None:
                try:
                    _write_one(folder, plan, open_files, file_of[name], name, tensor, specs[name])
                # The others are in the next gather already: take part to the end, then tell them.
                except (OSError, RuntimeError, MemoryError) as error:
                    failure = error
    finally:
        for file in open_files.values():
            with suppress(OSError, ValueError):
                file.close()
    if failure is not None:
        raise failure
    if missing:
        raise CheckpointError(f"export: never published: {sorted(missing)[:5]}")


def _write_one(
    folder: Path,
    plan: ShardPlan,
    open_files: dict[str, TensorFileWriter],
    file_name: str,
    name: str,
    tensor: Tensor,
    spec: TensorSpec,
) -> None:
    if file_name not in open_files:
        layout = plan.files[file_name]
        open_files[file_name] = TensorFileWriter(folder / file_name, layout, {"format": "pt"})
    open_files[file_name].write(name, tensor.to(spec.dtype))
    if open_files[file_name].complete:
        open_files.pop(file_name).close()


def _write_texts(folder: Path, plan: ShardPlan, dtype_name: str, request: SaveRequest) -> None:
    if len(plan.files) > 1:
        index = {"metadata": {"total_size": plan.total_bytes}, "weight_map": plan.file_of}
        _write_json(folder / "model.safetensors.index.json", index)
    config = _with_dtype(request.model.hf_config, dtype_name)
    config["torch_dtype"] = dtype_name
    _write_json(folder / "config.json", config)
    request.tokenizer.save(str(folder))
    _write_chat_template(folder, request.tokenizer.chat_template)
    source = request.source_folder
    generation = "generation_config.json"
    if source is not None and (source / generation).is_file():
        shutil.copyfile(source / generation, folder / generation)
    elif not (folder / generation).exists():
        ids = list(request.tokenizer.eos_token_ids)
        _write_json(
            folder / generation,
            {
                "eos_token_id": ids[0] if len(ids) == 1 else ids,
                "pad_token_id": request.tokenizer.pad_token_id,
            },
        )
    if source is not None:
        _copy_from_source(source, folder, config)


def _with_dtype(config: Mapping[str, Any], dtype_name: str) -> dict[str, Any]:
    """A copy that names the exported dtype wherever one is named (`torch_dtype`: all versions
    of transformers read it, `dtype` only newer ones)."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            result["torch_dtype"] = dtype_name
        else:
            result[key] = _with_dtype(value, dtype_name) if isinstance(value, Mapping) else value
    return result


def _write_chat_template(folder: Path, template: str | None) -> None:
    """Add the template if the tokenizer's own files don't hold it."""
    if template is None or (folder / "chat_template.jinja").exists():
        return
    config = folder / "tokenizer_config.json"
    if config.exists() and "chat_template" in json.loads(config.read_text(encoding="utf-8")):
        return
    write_text(folder / "chat_template.jinja", template)


def _copy_from_source(source: Path, folder: Path, config: Mapping[str, Any]) -> None:
    """What other programs want beside the weights: image processing, and code the config names."""
    names = [name for name in _COPIED if (source / name).is_file()]
    tokenizer_config = folder / "tokenizer_config.json"
    texts = [tokenizer_config.read_text(encoding="utf-8")] if tokenizer_config.exists() else []
    texts += [(source / name).read_text(encoding="utf-8") for name in names]
    if any("auto_map" in values for values in [config, *map(json.loads, texts)]):
        names += sorted(path.name for path in source.glob("*.py"))
    names += sorted(path.name for path in source.glob("*.model"))
    for name in names:
        # Also over what the tokenizer wrote: these go along as they came.
        shutil.copyfile(source / name, folder / name)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
