"""Ranks, meshes and sharding: how one model becomes many ranks' model, with exact sums.

Always the same path, one process included: a process group, a mesh, FSDP2. Gradients are summed, never
averaged, over data ranks: each rank's loss is already divided by the whole step's count. Under expert
parallelism each rank keeps some experts and tokens travel to them; every rank still has data of its own, and
what is not an expert is sharded over all of them.
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
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from pegboard.contracts import BuiltModel
from pegboard.device import communication_backend, device_memory_bytes
from pegboard.errors import ConfigError, PluginError
from pegboard.expert_dispatch import AllToAllDispatcher, journeys_kept
from pegboard.gloo_threads import let_gloo_finish
from pegboard.initialization import plain_name

__all__ = [
    "Ranks",
    "apply_activation_checkpointing",
    "check_sizes",
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
    expert_mesh: DeviceMesh | None = None
    """The same ranks with `shard` split into (`expert_shard`, `expert`); None without expert
    parallelism. Ranks that share the experts are neighbours: on one machine, if they fit."""


def check_sizes(world_size: int, replicate_size: int, expert_parallel_size: int) -> None:
    """ConfigError if the ranks can't be laid out like this."""
    if world_size % replicate_size:
        raise ConfigError(
            f"parallel.replicate_size: {replicate_size} does not divide the {world_size} ranks of this run"
        )
    sharing = world_size // replicate_size
    if sharing % expert_parallel_size:
        fitting = ", ".join(str(n) for n in range(1, sharing + 1) if sharing % n == 0)
        each = f" that each of {replicate_size} replicas has" if replicate_size > 1 else ""
        raise ConfigError(
            f"parallel.expert_parallel_size: {expert_parallel_size} does not divide the {sharing} "
            f"ranks{each}; these sizes do: {fitting}"
        )


def join_ranks(
    device: torch.device, replicate_size: int = 1, expert_parallel_size: int = 1
) -> Ranks:
    """Start the process group; a process without torchrun becomes a world of one.

    Raises:
        ConfigError: if the ranks can't be laid out like this.
    """
    if not dist.is_initialized():
        backend = communication_backend(device)
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend, timeout=timedelta(minutes=30))
        else:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    world_size = dist.get_world_size()
    check_sizes(world_size, replicate_size, expert_parallel_size)
    # Axes of size 1 are left out, but for the last. Both meshes count ranks in the same order.
    replicas = {"replicate": replicate_size} if replicate_size > 1 else {}
    sharing = world_size // replicate_size
    mesh = _mesh(device, {**replicas, "shard": sharing})
    expert_mesh = None
    if expert_parallel_size > 1:
        split = {
            "expert_shard": sharing // expert_parallel_size,
            "expert": expert_parallel_size,
        }
        expert_mesh = _mesh(device, {**replicas, **split})
    return Ranks(dist.get_rank(), world_size, device, mesh, expert_mesh)


def _mesh(device: torch.device, axes: Mapping[str, int]) -> DeviceMesh:
    return init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))


def leave_ranks() -> None:
    """End the process group once everybody is there (a rank that leaves early can abort the others)."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        let_gloo_finish()


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

            def recomputed(
                *args: Any, _inner: Any = inner, _module: nn.Module = module, **named: Any
            ) -> Any:
                return checkpoint(
                    _inner,
                    *args,
                    **named,
                    use_reentrant=False,
                    preserve_rng_state=True,
                    context_fn=lambda: journeys_kept(_module),
                )

            # On the instance: the class and the parameter names must stay as they are.
            module.forward = recomputed


def shard_model(
    built: BuiltModel, ranks: Ranks, compute_dtype: torch.dtype, reduce_dtype: torch.dtype
) -> nn.Module:
    """Shard every unit, then the root, so that gradients are exact sums over ranks.

    Parameters keep their own (master) dtype; `compute_dtype` is what forward and backward see.
    """
    placed: set[str] = set()
    for unit in built.shard_units:
        module = built.module.get_submodule(unit.path)
        mesh = ranks.mesh
        if unit.mesh == "expert" and ranks.expert_mesh is not None:
            placed |= _share_experts(built, unit.path, ranks.expert_mesh)
            names = ranks.expert_mesh.mesh_dim_names or ()
            mesh = ranks.expert_mesh[names[:-1]]
        elif unit.mesh not in ("dense", "expert"):
            raise PluginError(f"shard unit {unit.path}: no mesh {unit.mesh!r}; dense or expert")
        dtype = compute_dtype
        if unit.param_dtype and compute_dtype != torch.float64:  # float64 runs are float64 all over
            dtype = getattr(torch, unit.param_dtype)
        _shard_one(module, mesh, dtype, reduce_dtype, unit.reshard)
    if ranks.expert_mesh is not None:
        if not built.expert_axis:
            raise ConfigError(
                "parallel.expert_parallel_size: the model has no experts; set it to 1"
            )
        if left := sorted(built.expert_axis.keys() - placed):
            raise PluginError(f"expert_axis: {left[0]} lies in no shard unit of the expert mesh")
    # The root's weights are needed by backward at once: freeing them after forward would only gather twice.
    _shard_one(built.module, ranks.mesh, compute_dtype, reduce_dtype, reshard=False)
    for module in built.module.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # NOTE: without this gloo refuses the factor (PREMUL_SUM); with it a factor of 1 is a plain sum.
            module.set_force_sum_reduction_for_comms(True)
    return built.module


def _share_experts(built: BuiltModel, path: str, expert_mesh: DeviceMesh) -> set[str]:
    """Keep 1/size of each expert tensor of a unit; returns the tensors' names."""
    module, axis = built.module.get_submodule(path), expert_mesh["expert"]
    shared, num_experts = set(), 0
    for key, parameter in list(module.named_parameters()):
        name = f"{path}.{plain_name(key)}"
        if name not in built.expert_axis:
            # It would be copied over the expert axis, and its gradient summed over the rest only.
            raise PluginError(
                f"{name}: lies in a shard unit of the expert mesh but has no expert_axis"
            )
        dim = built.expert_axis[name]
        num_experts = parameter.shape[dim]
        if num_experts % axis.size():
            raise ConfigError(
                f"parallel.expert_parallel_size: {axis.size()} does not divide the {num_experts} "
                f"experts of {path}"
            )
        # From meta, so there is nothing to send.
        part = distribute_tensor(parameter.detach(), axis, [Shard(dim)], src_data_rank=None)
        owner = module.get_submodule(key.rpartition(".")[0])
        replaced = nn.Parameter(part, requires_grad=parameter.requires_grad)
        owner.register_parameter(key.rpartition(".")[2], replaced)
        shared.add(name)
    if not hasattr(module, "dispatcher"):
        raise PluginError(
            f"{path} ({type(module).__name__}): a shard unit of the expert mesh needs an attribute "
            "'dispatcher', through which it sends tokens to other ranks"
        )
    module.dispatcher = AllToAllDispatcher(axis.get_group(), num_experts)  # type: ignore[assignment]
    return shared


def _shard_one(
    module: nn.Module,
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard: bool,
) -> None:
    # cast_forward_inputs would round token weights and rotary tables that must stay as they are.
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
    )
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)


def reduce_once_per_step(policy: str, module: nn.Module, ranks: Ranks) -> bool:
    """Whether gradients are reduced once a step (held whole until then) or with each micro-batch.

    The same on every rank, or they would wait for each other: `auto` goes by the smallest device.
    Collective.
    """
    if policy != "auto":
        return policy == "per_step"
    elements = sum(_gathered_elements(p) for p in module.parameters() if p.requires_grad)
    fits = 4 * elements < 0.10 * device_memory_bytes(ranks.device)
    return sum_over_ranks({"fits": float(fits)}, ranks)["fits"] == ranks.world_size


def _gathered_elements(parameter: nn.Parameter) -> int:
    """Elements that this rank holds while forward or backward needs the parameter."""
    if not isinstance(parameter, DTensor):
        return parameter.numel()
    mesh = parameter.device_mesh
    sizes = dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=False))
    return parameter.numel() // sizes.get("expert", 1)


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
