"""Ranks, meshes and sharding: how one model becomes many ranks' model, with exact sums.

Always the same path, one process included: a process group, a mesh, FSDP2. Gradients are summed, never
averaged, over data ranks: each rank's loss is already divided by the whole step's count.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.utils.checkpoint import checkpoint

from pegboard.contracts import BuiltModel
from pegboard.device import communication_backend, device_memory_bytes
from pegboard.errors import ConfigError

__all__ = [
    "Ranks",
    "apply_activation_checkpointing",
    "clip_gradients",
    "gather_whole",
    "gradient_norm",
    "join_ranks",
    "leave_ranks",
    "reduce_once_per_step",
    "set_gradient_sync",
    "shard_model",
    "sum_over_ranks",
    "trainable_parameters",
]


@dataclass(frozen=True)
class Ranks:
    """This process among the others, and the mesh that data and parameters are spread over."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh
    """Axes (`replicate`, `shard`), or (`shard`,) without replication."""


def join_ranks(device: torch.device, replicate_size: int = 1) -> Ranks:
    """Start the process group; a process without torchrun becomes a world of one.

    Raises:
        ConfigError: if `replicate_size` doesn't divide the world size.
    """
    if not dist.is_initialized():
        backend = communication_backend(device)
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend, timeout=timedelta(minutes=30))
        else:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    world_size = dist.get_world_size()
    if world_size % replicate_size:
        raise ConfigError(
            f"parallel.replicate_size: {replicate_size} does not divide the {world_size} ranks of this run"
        )
    if replicate_size == 1:
        mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    else:
        shape = (replicate_size, world_size // replicate_size)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    return Ranks(dist.get_rank(), world_size, device, mesh)


def leave_ranks() -> None:
    """End the process group once everybody is there (a rank that leaves early can abort the others)."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def apply_activation_checkpointing(
    built: BuiltModel, mode: str, ratio: float | None = None
) -> None:
    """Recompute activations of `checkpoint_units` in backward, in place; names of modules stay.

    Args:
        mode: `none`, `full` (every unit) or `ratio` (that share of them, evenly spread).
    """
    if mode == "none":
        return
    share = 1.0 if mode == "full" else float(ratio or 0.0)
    for index, path in enumerate(built.checkpoint_units):
        if int((index + 1) * share) > int(index * share):
            module = built.module.get_submodule(path)
            inner = module.forward

            def recomputed(*args: Any, _inner: Any = inner) -> Any:
                return checkpoint(_inner, *args, use_reentrant=False, preserve_rng_state=True)

            # On the instance: the class and the parameter names must stay as they are.
            module.forward = recomputed


def shard_model(
    built: BuiltModel, ranks: Ranks, compute_dtype: torch.dtype, reduce_dtype: torch.dtype
) -> nn.Module:
    """Shard every unit, then the root, so that gradients are exact sums over ranks.

    Parameters keep their own (master) dtype; `compute_dtype` is what forward and backward see.
    """
    for unit in built.shard_units:
        if unit.mesh != "dense":
            raise ConfigError(f"shard unit {unit.path}: this release has no '{unit.mesh}' mesh")
        dtype = getattr(torch, unit.param_dtype) if unit.param_dtype else compute_dtype
        _shard_one(built.module.get_submodule(unit.path), ranks, dtype, reduce_dtype, unit.reshard)
    # The root's weights are needed by backward at once: freeing them after forward would only gather twice.
    _shard_one(built.module, ranks, compute_dtype, reduce_dtype, reshard=False)
    for module in built.module.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # NOTE: without this gloo refuses the factor (PREMUL_SUM); with it a factor of 1 is a plain sum.
            module.set_force_sum_reduction_for_comms(True)
    return built.module


def _shard_one(
    module: nn.Module,
    ranks: Ranks,
    compute_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard: bool,
) -> None:
    # cast_forward_inputs would round token weights and rotary tables that must stay as they are.
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
    )
    fully_shard(module, mesh=ranks.mesh, mp_policy=policy, reshard_after_forward=reshard)


def reduce_once_per_step(policy: str, module: nn.Module, device: torch.device) -> bool:
    """Whether gradients are reduced once a step (held whole until then) or with each micro-batch."""
    if policy != "auto":
        return policy == "per_step"
    elements = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return 4 * elements < 0.10 * device_memory_bytes(device)


def sum_over_ranks(values: Mapping[str, float], ranks: Ranks) -> dict[str, float]:
    """Sums of host numbers by name; every rank passes the same names."""
    names = sorted(values)
    # On the CPU, through gloo: no device sync, and exact for counts.
    total = torch.tensor([values[name] for name in names], dtype=torch.float64)
    if ranks.world_size > 1:
        dist.all_reduce(total)
    return dict(zip(names, total.tolist(), strict=True))


def gradient_norm(parameters: Iterable[nn.Parameter], ranks: Ranks) -> Tensor:
    """() float64 norm of the whole gradient, the same on every rank, over any mix of meshes."""
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for gradient in (p.grad for p in parameters if p.grad is not None):
        local, copies = gradient, 1
        if isinstance(gradient, DTensor):
            local = gradient.to_local()
            for placement, size in zip(
                gradient.placements, gradient.device_mesh.shape, strict=True
            ):
                copies *= size if isinstance(placement, Replicate) else 1
        if local.numel():
            norm = torch.linalg.vector_norm(local).double()
            total += norm * norm / copies
    if ranks.world_size > 1:
        dist.all_reduce(total)
    return total.sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients by max_norm / norm where that is below 1; no host sync."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in (p.grad for p in parameters if p.grad is not None):
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        local.mul_(factor.to(local.dtype))


def gather_whole(tensor: Tensor) -> Tensor:
    """The whole tensor on every rank; collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def set_gradient_sync(module: nn.Module, enabled: bool) -> None:
    """Whether the next backward reduces gradients over ranks."""
    cast(FSDPModule, module).set_requires_gradient_sync(enabled)


def trainable_parameters(module: nn.Module) -> Sequence[tuple[str, nn.Parameter]]:
    """Named parameters that train, in the module's order."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]
