"""From a validated config to built objects, in dependency order.

First what needs no other rank (tokenizer, tokenized data), then the process group, then the model: built on
meta, sharded, initialised, and loaded slice by slice.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from loguru import logger
from torch import nn

from pegboard.built_parts import check_built
from pegboard.component import ModelComponent, ParameterGroup
from pegboard.contracts import BuiltModel, Loss, Tokenizer
from pegboard.data_loading import DataSource, PlanCache, RunData
from pegboard.device import default_compute_dtype, takes_pinned_memory
from pegboard.errors import ConfigError, PluginError
from pegboard.initialization import init_module_weights
from pegboard.parallel import (
    Ranks,
    apply_activation_checkpointing,
    shard_model,
    trainable_parameters,
)
from pegboard.preparation import PLANS_FOLDER, cache_folder
from pegboard.published_config import export_config
from pegboard.weight_loading import load_published_weights

if TYPE_CHECKING:
    from pegboard.run_config import RunConfig

__all__ = [
    "ModelOnRanks",
    "build_model",
    "build_optimizer",
    "build_run_data",
    "find_weights_folder",
    "tokenizer_fits",
]


@dataclass(eq=False)
class ModelOnRanks:
    """A sharded model with its weights."""

    built: BuiltModel
    module: nn.Module
    loss: Loss
    loaded_dtype: str | None


def find_weights_folder(load_from: str | None) -> Path | None:
    """Local folder of `load_from`; a hub id is downloaded (safetensors, JSON, tokenizer files and code).

    Raises:
        ConfigError: neither a folder nor a hub id that can be had.
    """
    if load_from is None:
        return None
    if Path(load_from).is_dir():
        return Path(load_from)
    from huggingface_hub import snapshot_download

    # Code is only carried along: nothing runs it without --trust-remote-code.
    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(load_from, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"load_from: {load_from!r} is neither a folder nor a model of the hub that can be "
            f"reached: {reason}"
        ) from error


def tokenizer_fits(tokenizer: Tokenizer, built: BuiltModel) -> None:
    """ConfigError if the tokenizer has ids that the model has no embedding for."""
    inside = "text_config" in built.hf_config
    text = built.hf_config["text_config"] if inside else built.hf_config
    if tokenizer.vocab_size > text["vocab_size"]:
        raise ConfigError(
            f"model.{'text_config.' if inside else ''}vocab_size: {text['vocab_size']} is smaller "
            f"than the tokenizer's {tokenizer.vocab_size}; make it as large, where weights are loaded "
            'with "resize_embeddings": true beside it'
        )


def build_model(
    run: RunConfig, ranks: Ranks, tokenizer: Tokenizer, weights: Path | None
) -> ModelOnRanks:
    """Build on meta, shard, initialise, load. Collective."""
    compute_name, reduce_name = run.precision.compute_dtype, run.precision.reduce_dtype
    compute = getattr(torch, compute_name) if compute_name else default_compute_dtype(ranks.device)
    # A float64 run is float64 all over.
    reduce = compute if compute == torch.float64 else getattr(torch, reduce_name)
    built = _build_on_meta(run, torch.promote_types(compute, torch.float32))
    tokenizer_fits(tokenizer, built)
    built.hf_config = export_config(run.model, built.hf_config, weights)
    _freeze(built, compute)
    checkpointing = run.activation_checkpointing
    apply_activation_checkpointing(built, checkpointing.mode, checkpointing.ratio)
    module = shard_model(built, ranks, compute, reduce)
    module.to_empty(device=ranks.device)
    loaded_dtype = _fill(run, built, weights)
    loss = check_built(run.loss, run.loss.build())
    return ModelOnRanks(built, module, loss, loaded_dtype)


def _build_on_meta(run: RunConfig, master: torch.dtype) -> BuiltModel:
    """The model after its transforms, every parameter in the map of its weights."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(master)
    try:
        with torch.device("meta"):
            built = run.model.build()
            for transform in run.transforms:
                built = transform.build()(built)
    finally:
        torch.set_default_dtype(previous)
    names = [name for name, _ in built.module.named_parameters()]
    if unmapped := built.weight_map.unmapped(names):
        raise PluginError(
            f"model '{type(run.model).__name__}': no weight map entry for {', '.join(unmapped)}"
        )
    return built


def _freeze(built: BuiltModel, compute: torch.dtype) -> None:
    for name, parameter in built.module.named_parameters():
        trains = not (built.frozen and name.startswith(built.frozen))
        parameter.requires_grad_(trains)
        if not trains and parameter.is_floating_point():
            # Master weights in float32 are for what an optimizer moves.
            parameter.data = parameter.data.to(compute)


def _fill(run: RunConfig, built: BuiltModel, weights: Path | None) -> str | None:
    """Draw what is not loaded and load the rest; returns the dtype that was loaded."""
    resize = _resizes_embeddings(run.model)
    # What is loaded whole needs no drawing; loading fails before it copies if anything is missing.
    loaded_whole = weights is not None and not resize
    skip = {entry.ours for entry in built.weight_map.entries} if loaded_whole else set()
    init_module_weights(built.module, run.seed, skip=skip)
    loaded_dtype = None
    if weights is None:
        logger.info("load_from is not set: training starts from scratch")
    else:
        report = load_published_weights(
            built.module,
            built.weight_map,
            weights,
            resize_embeddings=resize,
            hf_config=built.hf_config,
        )
        logger.info(f"loaded {report.num_tensors} tensors ({report.dtype}) from {weights}")
        if report.resized:
            logger.info(
                f"more rows than published, the rest initialised: {', '.join(report.resized)}"
            )
        loaded_dtype = report.dtype
    if built.adapter is not None and built.adapter.load_from is not None:
        load_published_weights(
            built.module,
            built.adapter.weight_map,
            built.adapter.load_from,
            file_name="adapter_model.safetensors",
        )
        logger.info(f"loaded the adapter of {built.adapter.load_from}")
    return loaded_dtype


def _resizes_embeddings(model: ModelComponent) -> bool:
    """Whether the model, or one inside it, takes a smaller vocabulary's weights."""
    inner = [value for _, value in model.config if isinstance(value, ModelComponent)]
    own = bool(getattr(model.config, "resize_embeddings", False))
    return own or any(map(_resizes_embeddings, inner))


def build_optimizer(run: RunConfig, module: nn.Module) -> torch.optim.Optimizer:
    """Optimizer over the trainable parameters, one group per mesh."""
    named = trainable_parameters(module)
    if not named:
        raise ConfigError("model: every parameter is frozen, there is nothing to train")
    by_mesh: dict[object, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named:
        by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append((name, parameter))
    groups = [
        ParameterGroup(of_mesh, [p.ndim <= 1 for _, p in of_mesh]) for of_mesh in by_mesh.values()
    ]
    optimizer = run.optimizer.build(groups)
    for group in optimizer.param_groups:
        group.setdefault("base_lr", group["lr"])  # what the schedule scales
    return optimizer


def build_run_data(
    run: RunConfig,
    ranks: Ranks | None,
    sources: Sequence[DataSource],
    tokenizer: Tokenizer,
    *,
    global_batch_size: int,
    last_epoch: int | None,
    num_workers: int = 0,
) -> RunData:
    """Packs of this rank; local rank 0 plans, for all ranks of the machine.

    Args:
        ranks: None: a process by itself, before any ranks are there.
        last_epoch: where the data ends, if that is known.
        num_workers: processes of this rank that make batches.
    """
    packer = run.dataloader.packer
    return RunData(
        sources,
        packer=packer.build(),
        collator=run.dataloader.collator.build(pad_token_id=tokenizer.pad_token_id),
        pack_max_length=run.dataloader.pack_max_length,
        global_batch_size=global_batch_size,
        data_rank=ranks.rank if ranks else 0,
        data_world=ranks.world_size if ranks else 1,
        seed=run.seed,
        packer_identity=f"{type(packer).__name__} {packer.config!r}",
        plan_cache=PlanCache(
            cache_folder(run) / PLANS_FOLDER, makes=os.environ.get("LOCAL_RANK", "0") == "0"
        ),
        last_epoch=last_epoch,
        sample_costs=run.model.sample_costs,
        num_workers=num_workers,
        pin_memory=ranks is not None and takes_pinned_memory(ranks.device),
    )
