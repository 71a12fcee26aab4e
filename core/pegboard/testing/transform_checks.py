"""What a transform promises: base weights keep their names and shapes, and the export its keys.

Options: `model`, the component it changes (a tiny Qwen3 by default).
"""

from __future__ import annotations

from typing import Any

import torch

from pegboard.contracts import BuiltModel
from pegboard.testing.case import Case, Check
from pegboard.testing.rows import build_on_cpu, fill, make_examples, make_row
from pegboard.weight_export import iter_published

__all__ = ["CHECKS", "OPTIONS"]

OPTIONS = frozenset({"model"})


def _on_meta(case: Case) -> tuple[BuiltModel, BuiltModel]:
    with torch.device("meta"):
        plain = case.model().build()
        changed = case.make().build()(case.model().build())
    return plain, changed


def _base_weights_keep_their_names(case: Case) -> None:
    plain, changed = _on_meta(case)
    after = dict(changed.module.named_parameters())
    for name, parameter in plain.module.named_parameters():
        assert name in after, f"{name} is gone: published weights would not be loaded into it"
        assert after[name].shape == parameter.shape, f"{name} has another shape"


def _stays_on_meta(case: Case) -> None:
    _, changed = _on_meta(case)
    real = [name for name, p in changed.module.named_parameters() if not p.is_meta]
    assert not real, f"made on a device before sharding: {', '.join(real[:3])}"


def _every_parameter_is_mapped(case: Case) -> None:
    _, changed = _on_meta(case)
    names = [name for name, _ in changed.module.named_parameters()]
    left = changed.weight_map.unmapped(names)
    assert not left, f"neither in the weight map nor `unpublished`: {', '.join(left[:3])}"


def _the_export_keeps_its_keys(case: Case) -> None:
    plain, changed = _on_meta(case)
    fill(changed, seed=1)
    tensors: Any = dict(changed.module.named_parameters())
    published = dict(iter_published(tensors, changed.weight_map, lambda tensor: tensor))
    wanted = plain.weight_map.published_shapes()
    assert published.keys() == wanted.keys(), "the export has other keys than the base model's"
    for name, shape in wanted.items():
        assert tuple(published[name].shape) == tuple(shape), f"{name} is exported in another shape"


def _the_changed_model_trains(case: Case) -> None:
    _, changed = _on_meta(case)
    module = fill(changed, seed=1)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not (changed.frozen and name.startswith(changed.frozen)))
    loss = case.builtin("loss", "ChunkedCrossEntropy").build()
    batch = make_row(make_examples((6, 4), vocab_size=200), 0.125)
    output: Any = module(batch, loss)
    assert torch.isfinite(output.loss), f"the loss is {output.loss.item()}"
    trained = [p for p in module.parameters() if p.requires_grad]
    if trained:
        output.loss.backward()
        assert any(p.grad is not None for p in trained), "no trainable parameter got a gradient"


def _leaves_other_models_alone(case: Case) -> None:
    before, _ = build_on_cpu(case.model())
    _on_meta(case)
    after, _ = build_on_cpu(case.model())
    one, two = (dict(b.module.named_parameters()) for b in (before, after))
    assert one.keys() == two.keys(), "a model built later has other parameters"
    assert {type(m) for m in before.module.modules()} == {
        type(m) for m in after.module.modules()
    }, "a model built later has other classes of modules"


CHECKS = (
    Check("base_weights_keep_their_names", _base_weights_keep_their_names),
    Check("stays_on_meta", _stays_on_meta),
    Check("every_parameter_is_mapped", _every_parameter_is_mapped),
    Check("the_export_keeps_its_keys", _the_export_keeps_its_keys),
    Check("the_changed_model_trains", _the_changed_model_trains),
    Check("leaves_other_models_alone", _leaves_other_models_alone),
)
