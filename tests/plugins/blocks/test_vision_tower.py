"""Claim: the tower keeps nothing for backward when it does not train and less when it recomputes, without
changing a gradient; it runs on no tiles; drop path keeps the mean; positions follow the tile's size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pegboard.initialization import init_module_weights
from pegboard_plugins.blocks.vision import TileProjector, VisionTower, drop_path, pixel_shuffle
from pegboard_plugins.blocks.vision_config import VisionConfig

CONFIG = VisionConfig(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=4,
    num_attention_heads=3,
    image_size=28,
    patch_size=7,
)


def tower(recompute_ratio: float = 0.0, seed: int = 1, **changes: Any) -> VisionTower:
    module = VisionTower(CONFIG.model_copy(update=changes), recompute_ratio=recompute_ratio)
    init_module_weights(module, seed)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        module.embeddings.position_embeddings.normal_(0, 0.5, generator=generator)
    return module.double()


def pixels(tiles: int, size: int = 28) -> Tensor:
    return torch.rand(
        tiles, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )


def bytes_kept(module: nn.Module, inputs: Tensor) -> tuple[int, Tensor]:
    """(bytes of activations that forward keeps for backward, what it returns); parameters are not counted."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        if tensor.untyped_storage().data_ptr() not in own:
            kept += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(inputs)
    return kept, out


def test_a_frozen_tower_keeps_nothing_for_backward() -> None:
    module = tower()
    kept, _ = bytes_kept(module, pixels(2))
    assert kept > 100_000
    module.requires_grad_(False)
    kept, out = bytes_kept(module, pixels(2))
    assert kept == 0 and not out.requires_grad


def test_recomputing_keeps_less_and_changes_no_gradient() -> None:
    found = {}
    for ratio in (0.0, 0.5, 1.0):
        module = tower(recompute_ratio=ratio)
        module.train()
        kept, out = bytes_kept(module, pixels(2))
        torch.manual_seed(0)
        out.sin().sum().backward()
        found[ratio] = kept, [p.grad for p in module.parameters()]
    assert found[1.0][0] < found[0.5][0] < found[0.0][0]
    for ratio in (0.5, 1.0):
        for one, two in zip(found[0.0][1], found[ratio][1], strict=True):
            assert one is not None and two is not None
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_recomputing_drops_the_same_tiles_again() -> None:
    gradients = []
    for ratio in (0.0, 1.0):
        module = tower(recompute_ratio=ratio, drop_path_rate=0.5).train()
        torch.manual_seed(5)
        module(pixels(6)).sin().sum().backward()
        gradients.append([p.grad for p in module.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm_type", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("recompute_ratio", [0.0, 1.0])
def test_no_tiles_give_no_rows_and_a_zero_gradient_for_everything(
    norm_type: str, recompute_ratio: float
) -> None:
    module = tower(recompute_ratio, norm_type=norm_type, use_qk_norm=norm_type == "rms_norm")
    module.train()
    projector = TileProjector(96, 16).double()
    rows = module(pixels(0))
    assert rows.shape == (0, 17, 24)
    joined = pixel_shuffle(rows[:, 1:].unflatten(1, (4, 4)), 2)
    features = projector(joined.flatten(0, 2))
    assert features.shape == (0, 16)
    into = torch.zeros(3, 16, dtype=torch.float64)
    into.index_copy(0, torch.zeros(0, dtype=torch.long), features).sum().backward()
    for name, parameter in [*module.named_parameters(), *projector.named_parameters()]:
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_drop_path_drops_whole_tiles_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    out = drop_path(torch.ones(4000, 3, 2), 0.25)
    per_tile = out.flatten(1)
    assert bool((per_tile == per_tile[:, :1]).all())
    assert sorted(per_tile[:, 0].unique().tolist()) == pytest.approx([0.0, 1 / 0.75])
    assert float(out.mean()) == pytest.approx(1.0, abs=0.04)
    untouched = torch.ones(2, 1, 1)
    assert drop_path(untouched, 0.0) is untouched


def test_drop_path_is_for_training_only_and_rises_with_depth() -> None:
    module = tower(drop_path_rate=0.6)
    rates = [layer.drop_path_rate for layer in module.encoder.layer]
    assert rates == pytest.approx([0.0, 0.2, 0.4, 0.6])
    module.eval()
    assert torch.equal(module(pixels(3)), module(pixels(3)))
    module.train()
    assert not torch.equal(module(pixels(3)), module(pixels(3)))
    with torch.no_grad():  # as a frozen tower runs
        assert torch.equal(module(pixels(3)), module(pixels(3)))


def test_a_tile_computes_what_it_computes_alone() -> None:
    module = tower().eval()
    together = module(pixels(3))
    alone = torch.cat([module(tile[None]) for tile in pixels(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_positions_are_interpolated_for_another_size_and_the_class_row_is_not() -> None:
    module = tower().eval()
    native = module.embeddings.position_embeddings
    larger = module.embeddings._positions(8)
    assert larger.shape == (1, 65, 24)
    assert torch.equal(larger[:, 0], native[:, 0])
    assert module(pixels(1, size=56)).shape == (1, 65, 24)
    assert module.embeddings._positions(4) is native


def test_pixel_shuffle_undoes_into_the_same_numbers_for_oblong_grids_too() -> None:
    grid = torch.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    joined = pixel_shuffle(grid, 2)
    assert joined.shape == (2, 2, 3, 12)
    # A joined patch holds exactly its 2 x 2 neighbours.
    for row in range(2):
        for column in range(3):
            inside = grid[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(1)
            assert torch.equal(joined[:, row, column].sort().values, inside.sort().values)


def test_fresh_scales_are_the_configs_and_positions_are_zero() -> None:
    module = VisionTower(CONFIG)
    init_module_weights(module, 1)
    layer: Any = module.encoder.layer[0]
    assert bool((layer.lambda_1 == 0.1).all()) and bool((layer.lambda_2 == 0.1).all())
    assert not module.embeddings.position_embeddings.any()
    assert not module.embeddings.cls_token.any()
    assert bool((layer.layernorm_before.weight == 1).all())
    assert float(layer.mlp.fc1.weight.detach().std()) == pytest.approx(0.02, rel=0.2)
