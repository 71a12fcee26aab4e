"""Claim: one table of boxes says what to export, whatever is renamed, fused, stacked or merged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pegboard.weight_export import iter_published
from pegboard.weight_map import Entry, Piece, WeightMap, fused, renamed


def export(tensors: dict[str, Tensor], weight_map: WeightMap) -> dict[str, Tensor]:
    return dict(iter_published(tensors, weight_map, lambda tensor: tensor))


def test_a_fused_tensor_is_published_as_its_parts() -> None:
    whole = torch.arange(12.0).reshape(6, 2)
    weight_map = WeightMap((fused("qk", [("q", 4), ("k", 2)], (6, 2)),))
    assert weight_map.published_shapes() == {"q": (4, 2), "k": (2, 2)}
    exported = export({"qk": whole}, weight_map)
    assert torch.equal(exported["q"], whole[:4]) and torch.equal(exported["k"], whole[4:])


def test_parts_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match="5 rows"):
        fused("qk", [("q", 3), ("k", 2)], (6, 2))


def test_a_stack_is_published_expert_by_expert() -> None:
    stack = torch.randn(2, 4, 3)
    pieces = [
        Piece(f"e{expert}.{part}", ours=((expert, expert + 1), (row, row + 2)), squeeze=True)
        for expert in range(2)
        for part, row in (("gate", 0), ("up", 2))
    ]
    weight_map = WeightMap((Entry("experts", (2, 4, 3), tuple(pieces)),))
    assert weight_map.published_shapes()["e1.up"] == (2, 3)
    exported = export({"experts": stack}, weight_map)
    assert torch.equal(exported["e1.up"], stack[1, 2:]) and torch.equal(
        exported["e0.gate"], stack[0, :2]
    )


def test_two_of_ours_can_fill_one_published_tensor() -> None:
    weight_map = WeightMap(
        (
            Entry("top", (1, 2), (Piece("both", theirs=((0, 1),)),)),
            Entry("bottom", (2, 2), (Piece("both", theirs=((1, 3),)),)),
        )
    )
    tensors = {"top": torch.randn(1, 2), "bottom": torch.randn(2, 2)}
    assert weight_map.published_shapes() == {"both": (3, 2)}
    assert torch.equal(
        export(tensors, weight_map)["both"], torch.cat([tensors["top"], tensors["bottom"]])
    )


def test_a_published_tensor_that_stays_incomplete_is_a_fault() -> None:
    with pytest.raises(ValueError, match="both"):
        export(
            {"bottom": torch.randn(2, 2)},
            WeightMap((Entry("bottom", (2, 2), (Piece("both", theirs=((1, 3),)),)),)),
        )


def test_a_merge_publishes_its_result_in_place_of_ours() -> None:
    entry = Entry("w", (2, 2), (Piece("w"),), also=("a", "b"), merge=lambda w, a, b: w + b @ a)
    tensors = {"w": torch.zeros(2, 2), "a": torch.ones(1, 2), "b": torch.ones(2, 1)}
    weight_map = WeightMap((entry,), unpublished=("a", "b"))
    assert torch.equal(export(tensors, weight_map)["w"], torch.ones(2, 2))
    assert weight_map.unmapped(tensors) == []


def test_gather_is_asked_for_one_tensor_at_a_time_in_the_order_of_the_map() -> None:
    asked: list[float] = []

    def gather(tensor: Tensor) -> Tensor:
        asked.append(float(tensor))
        return tensor

    weight_map = WeightMap((renamed("b", "B", ()), renamed("a", "A", ())))
    iterator = iter_published({"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, weight_map, gather)
    assert next(iterator)[0] == "B" and asked == [2.0]
    assert next(iterator)[0] == "A" and asked == [2.0, 1.0]


def test_a_nested_map_is_prefixed_on_our_side_and_renamed_on_theirs() -> None:
    inner = WeightMap(
        (renamed("x", "model.x", (1,)),), tied={"head": "model.x"}, unpublished=("y",)
    )
    outer = inner.prefixed("text.", lambda name: name.replace("model.", "model.text."))
    assert outer.entries[0].ours == "text.x"
    assert outer.published_shapes() == {"model.text.x": (1,)}
    assert outer.tied == {"head": "model.text.x"}
    assert outer.unmapped(["text.x", "text.y", "z"]) == ["z"]
