"""An export that transformers and vLLM open: `run_dir/export/`.

Which tensor stands in which file at which offset is planned from shapes alone, so the bytes do not
depend on ranks or sharding. Rank 0 makes the files with their headers; then every rank writes what
it holds straight to its place: nothing is gathered, unless an export has to compute it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pegboard import CheckpointError
from pegboard.commit import commit_folder, gather_from_ranks, rank_and_world, write_text
from pegboard.savers import SaveRequest
from pegboard.tensor_file import TensorFile, TensorFileLayout, TensorSpec, num_bytes
from pegboard.train_state import named_tensors
from pegboard.weight_export import PublishedPart, write_parts

if TYPE_CHECKING:
    from pegboard.contracts import Tokenizer

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

        layouts = {
            file: TensorFileLayout(specs, {"format": "pt"}) for file, specs in plan.files.items()
        }
        written = 0

        def make(temporary: Path) -> None:
            if rank_and_world()[0] == 0:
                for name, layout in layouts.items():
                    with TensorFile.create(temporary / name, layout):
                        pass
                _write_texts(temporary, plan, dtype_name, request)

        def fill(temporary: Path) -> None:
            nonlocal written
            written = _write_weights(temporary, plan, layouts, request, tensors)

        def count(temporary: Path) -> None:
            del temporary
            found = sum(gather_from_ranks(written))
            expected = sum(prod(spec.shape) for spec in specs.values())
            if found != expected:
                raise CheckpointError(
                    f"export: {found} of {expected} elements were written; the weight map's pieces "
                    "do not cover the published tensors once each"
                )

        commit_folder(folder, make, fill, count)
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
    layouts: Mapping[str, TensorFileLayout],
    request: SaveRequest,
    tensors: Mapping[str, Tensor],
) -> int:
    """Write this rank's share into the files that stand there; returns the number of elements."""
    file_of = plan.file_of
    written = 0
    with ExitStack() as stack:
        open_files: dict[str, TensorFile] = {}

        def write(part: PublishedPart) -> None:
            nonlocal written
            file = file_of[part.name]
            if file not in open_files:
                opened = TensorFile(folder / file, layouts[file])
                open_files[file] = stack.enter_context(opened)
            dtype = layouts[file].specs[part.name].dtype
            written += open_files[file].write(part.name, part.values.to(dtype), part.where)

        write_parts(tensors, request.model.weight_map, _gather, write)
    return written


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
    _write_generation_config(folder, source, request.tokenizer)
    if source is not None:
        _copy_from_source(source, folder, config)


def _write_generation_config(folder: Path, source: Path | None, tokenizer: Tokenizer) -> None:
    """Theirs, or a short one, with all the tokens that end a turn.

    A base model's own names only the end of a document: after chats it would write on and on.
    """
    file = folder / "generation_config.json"
    if source is not None and (source / file.name).is_file():
        shutil.copyfile(source / file.name, file)
    config: Any = {"pad_token_id": tokenizer.pad_token_id}
    if file.exists():
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            return  # goes along as it came
    if not isinstance(config, dict):
        return
    said = config.get("eos_token_id")
    ends = said if isinstance(said, list) else [] if said is None else [said]
    missing = [token for token in tokenizer.eos_token_ids if token not in ends]
    if missing or not file.exists():
        ends = [*ends, *missing]
        _write_json(file, config | {"eos_token_id": ends[0] if len(ends) == 1 else ends})


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
