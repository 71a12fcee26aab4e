"""An adapter as peft opens it: `run_dir/adapter/adapter_config.json` and `adapter_model.safetensors`.

An adapter is small: it is gathered whole, one tensor at a time, and rank 0 writes it.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from pegboard import Adapter, CheckpointError
from pegboard.commit import commit_folder, rank_and_world, write_text
from pegboard.savers import SaveRequest
from pegboard.train_state import named_tensors
from pegboard.weight_export import iter_published

__all__ = ["AdapterWriter"]


class AdapterWriter:
    """Built AdapterSaver."""

    def __init__(self, *, every_steps: int | None, folder_name: str) -> None:
        self._every_steps = every_steps
        self._folder_name = folder_name

    def due(self, step: int, *, is_last: bool) -> bool:
        """At the end, and at multiples of `every_steps`."""
        return is_last or (self._every_steps is not None and step % self._every_steps == 0)

    def save(self, request: SaveRequest) -> Path:
        """Write the adapter in float32 as it is trained; one at the same place is replaced. Collective.

        Raises:
            CheckpointError: on all ranks; the model has no adapter, or it can't be written.
        """
        adapter = request.model.adapter
        if adapter is None:
            raise CheckpointError(
                "AdapterSaver: the model has no adapter; add a transform that makes one (LoRA), or "
                "use HFSaver"
            )
        folder = request.run_dir / self._folder_name
        if self._every_steps is not None:
            folder /= f"step_{request.step:08d}"
        tensors = named_tensors(request.module)
        published: dict[str, Tensor] = {}
        for name, whole in iter_published(tensors, adapter.weight_map, _gather):
            if rank_and_world()[0] == 0:
                published[name] = whole.to("cpu", copy=True).contiguous()

        def write(temporary: Path) -> None:
            if rank_and_world()[0] == 0:
                save_file(published, temporary / "adapter_model.safetensors", {"format": "pt"})
                write_text(temporary / "adapter_config.json", _config_text(adapter, request))

        commit_folder(folder, write)
        return folder


def _config_text(adapter: Adapter, request: SaveRequest) -> str:
    base = None if request.source_folder is None else _name_of(request.source_folder)
    config = {"base_model_name_or_path": base, **adapter.config}
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _name_of(folder: Path) -> str:
    """Where another machine finds the base model: the hub's name of a folder in its cache, else the path."""
    repository = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not repository.startswith("models--"):
        return str(folder)
    return repository.removeprefix("models--").replace("--", "/", 1)


def _gather(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
