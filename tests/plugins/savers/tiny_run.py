"""A tiny model, its weight map and its optimizer, for the tests of savers; no tests in here.

Run as a script under RANK and WORLD_SIZE it is one rank of the two-rank scenes: see `main`.
"""

from __future__ import annotations

import datetime
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from pegboard.contracts import BuiltModel
from pegboard.errors import CheckpointError
from pegboard.parallel import leave_ranks
from pegboard.savers import SaveRequest
from pegboard.train_state import load_train_state, named_tensors, save_train_state
from pegboard.weight_map import WeightMap, fused, renamed
from pegboard_plugins.savers.component import CheckpointSaver, HFSaver

WEIGHT_MAP = WeightMap(
    entries=(
        renamed("embed.weight", "model.embed_tokens.weight", (11, 6)),
        renamed("norm.weight", "model.norm.weight", (6,)),
        fused("up.weight", (("model.gate.weight", 3), ("model.up.weight", 4)), (7, 6)),
        renamed("scale", "model.scale", ()),
    ),
    tied={"lm_head.weight": "model.embed_tokens.weight"},
)


class TinyModel(nn.Module):
    """Odd sizes, a frozen norm, a 0-dim parameter, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.RMSNorm(6)
        self.up = nn.Linear(6, 7, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.loads: Tensor
        self.register_buffer("loads", torch.zeros(3, dtype=torch.int64))
        self.norm.weight.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.up(self.norm(self.embed(ids)))
        return hidden * self.scale


class TinyTokenizer:
    """Writes one file, as a tokenizer would."""

    eos_token_ids = (2, 5)
    pad_token_id = 0
    vocab_size = 11
    chat_template = "{{ messages }}"

    def save(self, folder: str) -> None:
        Path(folder, "tokenizer_config.json").write_text("{}", encoding="utf-8")


def make(seed: int, *, shard: bool = False) -> tuple[TinyModel, torch.optim.AdamW]:
    """Model with weights of this seed; FSDP over all ranks if asked."""
    torch.manual_seed(seed)
    module = TinyModel()
    if shard:
        # A 0-dim parameter can't be sharded: it stays plain and equal on all ranks.
        fully_shard(module.up)
        fully_shard(module, ignored_params={module.scale})
    trained = [p for p in module.parameters() if p.requires_grad]
    return module, torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    """A few optimizer steps on fixed ids."""
    for step in range(steps):
        ids = torch.arange(8).add(step) % 11
        module(ids).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        module.get_buffer("loads").add_(steps)


def whole_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Whole parameters, buffers and optimizer state on every rank."""

    def whole(tensor: Tensor) -> Tensor:
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return full.detach().clone()

    tensors = named_tensors(module)
    state = {f"model.{name}": whole(tensor) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        for key, value in optimizer.state.get(tensor, {}).items():
            state[f"{key}.{name}"] = whole(value)
    return state


def request_for(
    run_dir: Path, module: nn.Module, optimizer: torch.optim.Optimizer, **changes: Any
) -> SaveRequest:
    """What a trainer would pass at step 3."""
    hf_config = {"model_type": "qwen3", "dtype": "float32", "vision_config": {"dtype": "float32"}}
    values: dict[str, Any] = {
        "step": 3,
        "is_last": True,
        "run_dir": run_dir,
        "model": BuiltModel(module, WEIGHT_MAP, (), hf_config),
        "module": module,
        "optimizer": optimizer,
        "tokenizer": TinyTokenizer(),
        "loaded_dtype": None,
        "source_folder": None,
        "train_state": {"step": 3, "cursor": [1, 2]},
    }
    return SaveRequest(**(values | changes))


def _said(action: Any) -> str:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return "no error"


def main(folder: Path) -> None:
    """Resume from `folder/one`, save to `folder/two`, fail to save where rank 1's disk is full."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    results: dict[str, Any] = {}
    module, optimizer = make(seed=5, shard=True)
    results["train_state"] = load_train_state(folder / "one", module, optimizer)
    resumed = whole_state(module, optimizer)

    module, optimizer = make(seed=6, shard=True)
    train(module, optimizer)
    torch.manual_seed(100 + rank)
    save_train_state(folder / "two", module, optimizer, {"step": 3})
    saved = whole_state(module, optimizer)
    draw = torch.rand(3)
    load_train_state(folder / "two", module, optimizer)
    results["same_draw"] = torch.equal(draw, torch.rand(3))

    run_dir = folder / "run"
    request = request_for(run_dir, module, optimizer)
    savers = {
        "checkpoint": CheckpointSaver(CheckpointSaver.Config()).build(),
        "export": HFSaver(HFSaver.Config(dtype="float32", max_shard_size_gb=2e-7)).build(),
    }
    for saver in savers.values():
        saver.save(request)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
    full_one = request_for(run_dir, module, optimizer, step=4)
    results["full_on_rank_1"] = _said(lambda: savers["checkpoint"].save(full_one))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
    results["full_on_rank_0"] = _said(lambda: savers["export"].save(full_one))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
    results["export_full_on_rank_1"] = _said(lambda: savers["export"].save(full_one))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

    if rank == 0:
        save_file(resumed, folder / "resumed.safetensors")
        save_file(saved, folder / "saved.safetensors")
    (folder / f"results_{rank}.json").write_text(json.dumps(results), encoding="utf-8")
    leave_ranks()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
