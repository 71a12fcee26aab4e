"""Claim: LocalAdamW gives sharded tensors the very numbers that torch's AdamW gives plain ones, keeps its state in
their layout, and takes tensors of different meshes in one group."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from pegboard_plugins.optimizers.local_adamw import LocalAdamW

SHAPES = [(3, 2), (5,), (4, 4)]


@pytest.fixture
def one_rank() -> Iterator[None]:
    # Another test of this process may have started one, and may still use it.
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    if ours:
        dist.destroy_process_group()


@pytest.mark.parametrize("fused", [True, None])
def test_shards_of_two_meshes_move_as_plain_tensors_do(one_rank: None, fused: bool | None) -> None:
    meshes = [
        DeviceMesh("cpu", [0], mesh_dim_names=("shard",)),
        DeviceMesh("cpu", [[0]], mesh_dim_names=("shard", "expert")),
    ]
    generator = torch.Generator().manual_seed(0)
    plain = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    sharded = [
        nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)] * mesh.ndim))
        for p, mesh in zip(plain, [*meshes, meshes[0]], strict=True)
    ]
    theirs = torch.optim.AdamW(plain, lr=0.1, weight_decay=0.1, fused=fused)
    ours = LocalAdamW(sharded, lr=0.1, weight_decay=0.1, fused=fused)
    for _ in range(3):
        for one, other in zip(plain, sharded, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            assert isinstance(other, DTensor)
            other.grad = distribute_tensor(one.grad, other.device_mesh, other.placements)
        theirs.step()
        ours.step()
    for one, other in zip(plain, sharded, strict=True):
        assert isinstance(other, DTensor)
        assert torch.equal(one, other.full_tensor())
        for key in ("exp_avg", "exp_avg_sq"):
            state = ours.state[other][key]
            assert isinstance(state, DTensor) and state.placements == other.placements
            assert torch.equal(theirs.state[one][key], state.full_tensor())
