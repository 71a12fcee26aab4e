"""The claim: a model that differs from its reference in a logit, in one gradient, in a name or in a bit is found, and
one that doesn't passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pegboard.contracts import Batch
from pegboard.testing import Case, checks_for
from pegboard.testing.case import TINY_MODEL
from pegboard.testing.rows import build_on_cpu
from pegboard.weight_export import iter_published
from pegboard.weight_loading import load_published_weights
from pegboard_plugins.losses.component import ChunkedCrossEntropy
from pegboard_plugins.qwen3.component import Qwen3

NAME = "model.layers.0.self_attn.k_proj.weight"


def opened(folder: Path) -> tuple[Any, Any]:
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    built, module = build_on_cpu(Qwen3(Qwen3.Config(**Qwen3.config_from_hf(said))), seed=9)
    load_published_weights(module, built.weight_map, folder)
    return built, module


def logits(folder: Path, batch: Batch) -> Tensor:
    found: Tensor = opened(folder)[1].logits(batch)
    return found


def gradients(folder: Path, batch: Batch) -> dict[str, Tensor]:
    built, module = opened(folder)
    torch.autograd.backward(
        module(batch, ChunkedCrossEntropy(ChunkedCrossEntropy.Config()).build()).loss
    )
    grown = {name: parameter.grad for name, parameter in module.named_parameters()}
    return dict(iter_published(grown, built.weight_map, lambda tensor: tensor))


def publish(folder: Path) -> None:
    built, module = build_on_cpu(Qwen3(Qwen3.Config(**TINY_MODEL)))
    tensors = dict(iter_published(module.state_dict(), built.weight_map, lambda tensor: tensor))
    whole = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(built.hf_config), encoding="utf-8")


def run(check: str, folder: Path, **options: Any) -> None:
    (found,) = (one for one in checks_for("model") if one.name == check)
    found.run(Case(Qwen3, TINY_MODEL, folder, options))


def test_the_same_model_passes(tmp_path: Path) -> None:
    run("equals_the_reference", tmp_path, reference=logits)
    run("gradients_equal_the_reference", tmp_path, reference_gradients=gradients)
    run("a_published_folder_comes_back", tmp_path, publish=publish)


def test_one_logit_off_is_found(tmp_path: Path) -> None:
    def off(folder: Path, batch: Batch) -> Tensor:
        found = logits(folder, batch).detach()
        found[2, 3] += found.abs().max() * 1e-3
        return found

    with pytest.raises(AssertionError, match="logits differ from the reference"):
        run("equals_the_reference", tmp_path, reference=off)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found[NAME].mul_(1.001), f"the gradient of {NAME}"),
        (lambda found: found.pop(NAME), "on one side only"),
    ],
)
def test_one_gradient_off_is_found(
    change: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path
) -> None:
    def off(folder: Path, batch: Batch) -> dict[str, Tensor]:
        found = gradients(folder, batch)
        change(found)
        return found

    with pytest.raises(AssertionError, match=message):
        run("gradients_equal_the_reference", tmp_path, reference_gradients=off)


def test_a_tensor_that_the_export_leaves_out_is_found(tmp_path: Path) -> None:
    class Forgetful(Qwen3):
        @classmethod
        def config_from_hf(cls, hf_config: Any) -> dict[str, Any]:
            return {**super().config_from_hf(hf_config), "tie_word_embeddings": True}

    (check,) = (one for one in checks_for("model") if one.name == "a_published_folder_comes_back")
    with pytest.raises(AssertionError, match="lm_head.weight"):
        check.run(Case(Forgetful, TINY_MODEL, tmp_path, {"publish": publish}))
