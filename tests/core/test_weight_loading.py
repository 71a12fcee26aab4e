"""Claim: every rank gets exactly its rows of the published weights, and what does not fit is told
in one report before anything is copied."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from pegboard.errors import WeightsError
from pegboard.initialization import init_module_weights, local_part
from pegboard.weight_loading import load_published_weights
from pegboard.weight_map import Entry, Piece, WeightMap, fused, renamed


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.empty(3, 4, 2))


class Toy(nn.Module):
    initializer_range = 0.5

    def __init__(self, vocabulary: int = 10) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 6)
        self.qkv = nn.Linear(6, 7)
        self.norm = nn.LayerNorm(6)
        self.experts = Experts()


def toy_map(vocabulary: int = 10) -> WeightMap:
    parts = [("q", 4), ("k", 2), ("v", 1)]
    return WeightMap(
        (
            renamed("embed.weight", "embed_tokens.weight", (vocabulary, 6)),
            fused("qkv.weight", [(f"{part}.weight", rows) for part, rows in parts], (7, 6)),
            fused("qkv.bias", [(f"{part}.bias", rows) for part, rows in parts], (7,)),
            renamed("norm.weight", "norm.weight", (6,)),
            renamed("norm.bias", "norm.bias", (6,)),
            Entry(
                "experts.stack",
                (3, 4, 2),
                tuple(
                    Piece(f"e{e}.{part}", ours=((e, e + 1), (row, row + 2)), squeeze=True)
                    for e in range(3)
                    for part, row in (("gate", 0), ("up", 2))
                ),
            ),
        ),
        tied={"lm_head.weight": "embed_tokens.weight"},
    )


def published() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = toy_map().published_shapes()
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def expected(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    experts = [torch.cat([tensors[f"e{e}.gate"], tensors[f"e{e}.up"]]) for e in range(3)]
    return {
        "embed.weight": tensors["embed_tokens.weight"],
        "qkv.weight": torch.cat([tensors[f"{part}.weight"] for part in "qkv"]),
        "qkv.bias": torch.cat([tensors[f"{part}.bias"] for part in "qkv"]),
        "norm.weight": tensors["norm.weight"],
        "norm.bias": tensors["norm.bias"],
        "experts.stack": torch.stack(experts),
    }


def saved(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder


def saved_in_shards(folder: Path, tensors: dict[str, Tensor]) -> Path:
    names = sorted(tensors)
    files = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    index = {name: file for file, held in files.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@contextmanager
def as_rank(rank: int, world_size: int) -> Iterator[None]:
    """One rank of a group whose collectives do nothing: only the sharding is real."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sharded_toy(world_size: int, vocabulary: int = 10) -> nn.Module:
    with torch.device("meta"):
        module = Toy(vocabulary)
    # A name per rank: torch caches by mesh equality, and one process is every rank here in turn.
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=(f"as_rank_{dist.get_rank()}",))
    fully_shard(module.experts, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module.to_empty(device="cpu")


def over_ranks(
    world_size: int, fill: Callable[[nn.Module], object], vocabulary: int = 10
) -> dict[str, Tensor]:
    """Run `fill` as every rank in turn and put the local rows together."""
    rows: dict[str, list[Tensor]] = {}
    for rank in range(world_size):
        with as_rank(rank, world_size):
            module = sharded_toy(world_size, vocabulary)
            fill(module)
            for name, parameter in module.named_parameters():
                rows.setdefault(name, []).append(local_part(parameter).clone())
    return {name: torch.cat(parts) for name, parts in rows.items()}


@pytest.mark.parametrize("save", [saved, saved_in_shards])
def test_a_plain_module_gets_every_tensor(
    save: Callable[[Path, dict[str, Tensor]], Path], tmp_path: Path
) -> None:
    tensors, module = published(), Toy()
    report = load_published_weights(module, toy_map(), save(tmp_path, tensors))
    for name, want in expected(tensors).items():
        assert torch.equal(module.get_parameter(name), want), name
    assert report.dtype == "float32" and report.num_tensors == len(tensors) and report.resized == ()


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_every_rank_gets_its_own_rows_even_where_they_divide_unevenly(
    world_size: int, tmp_path: Path
) -> None:
    tensors = published()
    saved_in_shards(tmp_path, tensors)
    loaded = over_ranks(
        world_size, lambda module: load_published_weights(module, toy_map(), tmp_path)
    )
    for name, want in expected(tensors).items():
        assert torch.equal(loaded[name], want), name


def test_values_are_converted_and_the_dtype_on_disk_is_reported(tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in published().items()}
    module = Toy()
    report = load_published_weights(module, toy_map(), saved(tmp_path, tensors))
    assert report.dtype == "bfloat16"
    assert torch.equal(module.norm.weight, tensors["norm.weight"].float())


def test_one_report_names_all_that_does_not_fit_and_copies_nothing(tmp_path: Path) -> None:
    tensors = published()
    del tensors["k.weight"], tensors["e2.up"]
    tensors["extra.weight"] = torch.zeros(1)
    tensors["norm.weight"] = torch.zeros(5)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 5, "layers": 1}))
    module = Toy()
    before = {
        name: p.detach().clone() for name, p in module.named_parameters() if "stack" not in name
    }
    with pytest.raises(WeightsError) as caught:
        load_published_weights(
            module, toy_map(), saved(tmp_path, tensors), hf_config={"hidden_size": 6, "layers": 1}
        )
    text = str(caught.value)
    assert "2 missing: k.weight, e2.up" in text
    assert "1 unexpected: extra.weight" in text
    assert "norm.weight is [5] on disk, [6] in the model" in text
    assert "hidden_size (model 6, weights 5)" in text and "layers" not in text
    assert all(torch.equal(module.get_parameter(name), value) for name, value in before.items())


def test_tied_names_and_rotary_buffers_on_disk_are_allowed(tmp_path: Path) -> None:
    tensors = published()
    tensors["lm_head.weight"] = torch.zeros(10, 6)
    tensors["layers.0.rotary_emb.inv_freq"] = torch.zeros(3)
    load_published_weights(Toy(), toy_map(), saved(tmp_path, tensors))


def test_a_missing_shard_file_is_named(tmp_path: Path) -> None:
    saved_in_shards(tmp_path, published())
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(WeightsError, match="1 of 2 weight files are missing: model-2.safetensors"):
        load_published_weights(Toy(), toy_map(), tmp_path)


def test_a_cut_file_is_named(tmp_path: Path) -> None:
    file = saved(tmp_path, published()) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(WeightsError, match=r"model\.safetensors: not a whole safetensors file"):
        load_published_weights(Toy(), toy_map(), tmp_path)


def test_pickled_weights_are_refused_without_opening_them(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(WeightsError, match="pickled weights"):
        load_published_weights(Toy(), toy_map(), tmp_path)


def test_an_index_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    index = {"weight_map": {"norm.weight": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="plain file name"):
        load_published_weights(Toy(), toy_map(), tmp_path)


def test_an_empty_folder_and_no_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="found no weights"):
        load_published_weights(Toy(), toy_map(), tmp_path)
    with pytest.raises(WeightsError, match="no such folder"):
        load_published_weights(Toy(), toy_map(), tmp_path / "absent")


def test_a_larger_vocabulary_keeps_fresh_rows_behind_the_loaded_ones_only_when_asked(
    tmp_path: Path,
) -> None:
    tensors = published()
    saved(tmp_path, tensors)
    module = Toy(vocabulary=13)
    fresh = module.embed.weight[10:].detach().clone()
    with pytest.raises(WeightsError, match="resize_embeddings"):
        load_published_weights(module, toy_map(13), tmp_path)
    report = load_published_weights(module, toy_map(13), tmp_path, resize_embeddings=True)
    assert report.resized == ("embed.weight",)
    assert torch.equal(module.embed.weight[:10], tensors["embed_tokens.weight"])
    assert torch.equal(module.embed.weight[10:], fresh)


def test_a_smaller_vocabulary_is_refused_even_when_resizing(tmp_path: Path) -> None:
    saved(tmp_path, published())
    with pytest.raises(WeightsError, match="misshapen"):
        load_published_weights(Toy(8), toy_map(8), tmp_path, resize_embeddings=True)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_fresh_weights_do_not_depend_on_the_number_of_ranks(world_size: int) -> None:
    alone = Toy()
    init_module_weights(alone, seed=7)
    together = over_ranks(world_size, lambda module: init_module_weights(module, seed=7))
    for name, parameter in alone.named_parameters():
        assert torch.equal(together[name], parameter), name


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_larger_vocabulary_is_split_over_ranks_as_one_rank_would_hold_it(
    world_size: int, tmp_path: Path
) -> None:
    def fill(module: nn.Module) -> None:
        init_module_weights(module, seed=7)
        load_published_weights(module, toy_map(13), tmp_path, resize_embeddings=True)

    saved(tmp_path, published())
    alone = Toy(13)
    fill(alone)
    together = over_ranks(world_size, fill, vocabulary=13)
    for name, parameter in alone.named_parameters():
        assert torch.equal(together[name], parameter), name


@pytest.mark.parametrize("rank", range(6))
def test_experts_sharded_over_two_meshes_get_the_experts_they_own(
    rank: int, tmp_path: Path
) -> None:
    tensors = published()
    saved(tmp_path, tensors)
    with as_rank(rank, 6):
        with torch.device("meta"):
            module = Toy()
        mesh = init_device_mesh("cpu", (2, 3), mesh_dim_names=(f"shard_{rank}", f"expert_{rank}"))
        shard, expert = mesh.get_coordinate() or (0, 0)
        experts = module.experts
        experts.stack = nn.Parameter(
            DTensor.from_local(
                torch.empty(1, 4, 2, device="meta"), mesh[f"expert_{rank}"], [Shard(0)]
            )
        )
        fully_shard(experts, mesh=mesh[f"shard_{rank}"])
        module.to_empty(device="cpu")
        load_published_weights(module, toy_map(), tmp_path)
        # One expert per expert rank: the first shard rank holds it, the second holds none.
        whole = expected(tensors)["experts.stack"]
        want = whole[expert : expert + 1] if shard == 0 else whole[:0]
        assert torch.equal(local_part(experts.stack), want)


@pytest.mark.parametrize("index", [[], {"weight_map": {"a": 5}}, {"weight_map": {"a": ["b"]}}, {}])
def test_an_index_of_another_form_is_named(index: object, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"index\.json: not a safetensors index"):
        load_published_weights(Toy(), toy_map(), tmp_path)
