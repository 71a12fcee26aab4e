"""What a model promises: built on meta, filled, loaded and saved by its map, the same packed or alone.

Options: `make_batch(examples, scale) -> Batch` for a model that takes more than text, at the top of
its module, so that the processes of ranks find it;
`reference(folder, batch) -> logits_TV`, what another implementation gives for the published weights
in `folder`, and `tolerance` (1e-4) for it; `reference_gradients(folder, batch) -> {published name:
gradient}` of the cross entropy summed over `batch.targets`, times `scale`, and `gradient_tolerance`
(1e-4, of each norm); `publish(folder)`, which writes config.json and model.safetensors as another
implementation publishes such a model; `vocab_size` where the config says none.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pegboard.component import ModelComponent
from pegboard.contracts import Batch, BuiltModel
from pegboard.errors import ConfigError
from pegboard.initialization import unfilled_tensors
from pegboard.parallel import apply_activation_checkpointing
from pegboard.testing.case import Case, Check
from pegboard.testing.ranks import run_on_ranks
from pegboard.testing.rows import build_on_cpu, make_examples, make_row
from pegboard.weight_export import iter_published
from pegboard.weight_loading import load_published_weights

__all__ = ["CHECKS", "OPTIONS", "losses_on_ranks", "mixed_losses_on_ranks"]

OPTIONS = frozenset(
    {
        "collator",
        "gradient_tolerance",
        "make_batch",
        "publish",
        "reference",
        "reference_gradients",
        "tolerance",
        "vocab_size",
    }
)

LENGTHS = (6, 3, 9)


def _vocab_size(case: Case, built: BuiltModel) -> int:
    text = built.hf_config.get("text_config", built.hf_config)
    return int(case.options.get("vocab_size") or text["vocab_size"])


def _batch(
    case: Case, built: BuiltModel, which: slice = slice(None), *, text_only: bool = False
) -> Batch:
    examples = make_examples(LENGTHS, min(_vocab_size(case, built), 200))
    scale = 1 / sum(len(example.input_ids) - 1 for example in examples)
    make = case.options.get("make_batch", make_row)
    batch: Batch = (make_row if text_only else make)(examples[which], scale)
    return batch.with_scales(_scales(case, built))


def _scales(case: Case, built: BuiltModel) -> dict[str, float]:
    """Those of the whole step, the same for every batch and rank: a model learns by them what other ranks have."""
    examples = make_examples(LENGTHS, min(_vocab_size(case, built), 200))
    scale = 1 / sum(len(example.input_ids) - 1 for example in examples)
    make = case.options.get("make_batch", make_row)
    whole = built.step_counts(make(examples, scale)) if built.step_counts else {}
    own = {name: 1 / count if count else 0.0 for name, count in whole.items()}
    return {**own, "targets": scale}


def _loss(case: Case) -> Any:
    return case.builtin("loss", "ChunkedCrossEntropy").build()


def _builds_on_meta(case: Case) -> None:
    before = torch.random.get_rng_state()
    with torch.device("meta"):
        built = case.make().build()
    real = [name for name, p in built.module.named_parameters() if not p.is_meta]
    assert not real, f"not on meta: {', '.join(real[:3])}"
    assert torch.equal(torch.random.get_rng_state(), before), "building drew random numbers"


def _every_parameter_is_mapped_once(case: Case) -> None:
    built, module = build_on_cpu(case.make())
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    left = built.weight_map.unmapped(shapes)
    assert not left, f"no entry of the weight map for {', '.join(left[:3])}"
    names = [entry.ours for entry in built.weight_map.entries]
    assert len(names) == len(set(names)), "a parameter has two entries in the weight map"
    for entry in built.weight_map.entries:
        assert entry.ours in shapes, f"the weight map names {entry.ours}, which is no parameter"
        found = shapes[entry.ours]
        assert tuple(entry.shape) == found, f"{entry.ours} is {found}, {entry.shape} in the map"


def _everything_is_filled(case: Case) -> None:
    _, module = build_on_cpu(case.make())
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point():
            assert torch.isfinite(tensor).all(), f"{name} is not filled after meta initialisation"
    for name, owner in module.named_modules():
        left = ", ".join(unfilled_tensors(owner))
        assert not left, f"{name}: reset_parameters does not fill {left}"


def _one_seed_one_model(case: Case) -> None:
    one, two, other = (build_on_cpu(case.make(), seed=seed)[1] for seed in (1, 1, 2))
    first, second, third = (dict(m.named_parameters()) for m in (one, two, other))
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name} differs for one seed"
    assert any(not torch.equal(first[name], third[name]) for name in first), "the seed is ignored"


def _paths_lead_somewhere(case: Case) -> None:
    built, module = build_on_cpu(case.make())
    paths = [unit.path for unit in built.shard_units] + list(built.checkpoint_units)
    modules = dict(module.named_modules())
    for path in paths:
        assert path, "the root is no unit of its own"
        assert path in modules, f"no module {path!r} for a shard or checkpoint unit"
    names = [name for name, _ in module.named_parameters()]
    assert set(built.expert_axis) <= set(names), "expert_axis names what is no parameter"
    for group, prefixes in built.freeze_groups.items():
        for prefix in prefixes:
            assert any(n.startswith(prefix) for n in names), f"{group}: nothing starts {prefix!r}"


def _weights_come_back(case: Case) -> None:
    built, module = build_on_cpu(case.make())
    tensors: Any = dict(module.named_parameters())
    published = dict(iter_published(tensors, built.weight_map, lambda tensor: tensor))
    shapes = built.weight_map.published_shapes()
    assert published.keys() == shapes.keys(), "the export holds other names than the map says"
    whole = {name: tensor.detach().clone().contiguous() for name, tensor in published.items()}
    save_file(whole, case.folder / "model.safetensors", {"format": "pt"})
    again, other = build_on_cpu(case.make(), seed=2)
    load_published_weights(other, again.weight_map, case.folder)
    back: Any = dict(other.named_parameters())
    for name, tensor in module.named_parameters():
        if name not in built.weight_map.unpublished:
            assert torch.equal(back[name], tensor), f"{name} is another after save and load"


def _config_goes_both_ways(case: Case) -> None:
    part = case.make()
    with torch.device("meta"):
        built = part.build()
    said = json.loads(json.dumps(built.hf_config))
    assert isinstance(said.get("model_type"), str), "hf_config has no `model_type`"
    try:
        fields = type(part).config_from_hf(said)
    except NotImplementedError as error:
        raise AssertionError("config_from_hf is not there: an export can't be loaded") from error
    except ConfigError as error:
        raise AssertionError(f"its own hf_config is refused: {error}") from error
    again = case.make_from(_with_models_read(fields, part))
    with torch.device("meta"):
        second = again.build().hf_config
    assert json.loads(json.dumps(second)) == said, "the model read from its hf_config says another"


def _with_models_read(fields: dict[str, Any], part: ModelComponent) -> dict[str, Any]:
    """Models inside, left as they were published, as JSON fields of the classes that `part` has."""
    read = dict(fields)
    for name, value in fields.items():
        inner = getattr(part.config, name, None)
        if isinstance(inner, ModelComponent) and "class_name" not in value:
            own = _with_models_read(type(inner).config_from_hf(value), inner)
            read[name] = {"class_name": type(inner).__name__, **own}
    return read


def _every_weight_gets_a_gradient(case: Case) -> None:
    built, module = build_on_cpu(case.make())
    output: Any = module(_batch(case, built), _loss(case))
    assert output.loss.shape == () and torch.isfinite(output.loss), f"loss {output.loss}"
    output.loss.backward()
    without = [
        name
        for name, p in module.named_parameters()
        if p.grad is None and not (built.frozen and name.startswith(built.frozen))
    ]
    assert not without, f"no gradient: {', '.join(without[:3])}"


def _gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def _packed_is_alone(case: Case) -> None:
    built, module = build_on_cpu(case.make(), dtype=torch.float64)
    loss = _loss(case)
    output: Any = module(_batch(case, built), loss)
    output.loss.backward()
    together, whole = output.loss.item(), _gradients(module)
    module.zero_grad(set_to_none=True)
    alone = 0.0
    for index in range(len(LENGTHS)):
        one: Any = module(_batch(case, built, slice(index, index + 1)), loss)
        one.loss.backward()
        alone += one.loss.item()
    assert abs(together - alone) <= 1e-9 * abs(alone), (
        f"a pack has loss {together}, its samples alone {alone}: something looks across a boundary"
    )
    for name, gradient in _gradients(module).items():
        assert torch.allclose(gradient, whole[name], rtol=1e-7, atol=1e-10), (
            f"the gradient of {name} differs between a pack and its samples alone"
        )


def _recomputing_changes_nothing(case: Case) -> None:
    found = []
    for mode in ("none", "full"):
        built, module = build_on_cpu(case.make(), dtype=torch.float64)
        assert mode == "none" or built.checkpoint_units, "no checkpoint_units to recompute"
        apply_activation_checkpointing(built, mode)
        output: Any = module(_batch(case, built), _loss(case))
        output.loss.backward()
        found.append((output.loss.item(), _gradients(module)))
    (plain, one), (recomputed, two) = found
    assert plain == recomputed, f"the loss is {plain}, recomputed {recomputed}"
    for name, gradient in one.items():
        assert torch.allclose(gradient, two[name], rtol=1e-9, atol=1e-12), f"gradient of {name}"


def _no_samples_are_no_trouble(case: Case) -> None:
    """A rank short of packs gets a filler: every unit must still run and give gradients."""
    built, module = build_on_cpu(case.make())
    collator = case.options.get("collator") or case.builtin("collator", "SFTLLMCollator")
    filler: Batch = collator.build(pad_token_id=0)([])
    counts = built.step_counts(filler) if built.step_counts else {}
    output: Any = module(
        filler.with_scales({**dict.fromkeys(counts, 0.0), "targets": 0.0}), _loss(case)
    )
    output.loss.backward()
    assert output.loss.item() == 0, f"the loss of nothing is {output.loss.item()}"
    wrong = [n for n, g in _gradients(module).items() if not torch.equal(g, torch.zeros_like(g))]
    assert not wrong, f"a gradient from nothing: {', '.join(wrong[:3])}"


def losses_on_ranks(case: Case, rank: int, world_size: int) -> list[float]:
    """Global loss and gradient norm after one sharded step; run on every rank."""
    return _losses(case, rank, world_size, mixed=False)


def mixed_losses_on_ranks(case: Case, rank: int, world_size: int) -> list[float]:
    """The same, every other batch of text alone: of two ranks, one has nothing but text."""
    return _losses(case, rank, world_size, mixed=True)


def _losses(case: Case, rank: int, world_size: int, *, mixed: bool) -> list[float]:
    import torch.distributed as dist

    from pegboard.parallel import gradient_norm, join_ranks, shard_model, trainable_parameters
    from pegboard.testing.rows import fill

    torch.set_default_dtype(torch.float64)
    with torch.device("meta"):
        built = case.make().build()
    ranks = join_ranks(torch.device("cpu"))
    shard_model(built, ranks, torch.float64, torch.float64)
    module = fill(built, seed=1)
    torch.set_default_dtype(torch.float32)
    loss = _loss(case)
    total = torch.zeros((), dtype=torch.float64)
    turns = -(-len(LENGTHS) // world_size)
    collator = case.options.get("collator") or case.builtin("collator", "SFTLLMCollator")
    for turn in range(turns):
        index = turn * world_size + rank
        if index < len(LENGTHS):
            text_only = mixed and index % 2 == 1
            batch = _batch(case, built, slice(index, index + 1), text_only=text_only)
        else:
            filler: Batch = collator.build(pad_token_id=0)([])
            batch = filler.with_scales(_scales(case, built))
        output: Any = module(batch, loss)
        output.loss.backward()
        total += output.loss.detach()
    dist.all_reduce(total)
    norm = gradient_norm([p for _, p in trainable_parameters(module)], ranks)
    return [float(total), float(norm)]


def _two_ranks_are_one(case: Case) -> None:
    _compare_ranks(case, losses_on_ranks)


def _a_rank_of_text_alone_is_no_trouble(case: Case) -> None:
    import pytest

    if "make_batch" not in case.options:
        pytest.skip("no option `make_batch`: it takes text alone")
    _compare_ranks(case, mixed_losses_on_ranks)


def _compare_ranks(case: Case, function: Callable[[Case, int, int], list[float]]) -> None:
    one, two = (run_on_ranks(n, function, case) for n in (1, 2))
    for name, alone, shared in zip(("loss", "gradient norm"), one, two, strict=True):
        assert abs(alone - shared) <= 1e-9 * abs(alone), (
            f"the {name} is {alone} on one rank and {shared} on two"
        )


def _publish(case: Case) -> tuple[BuiltModel, nn.Module]:
    """A model whose weights and config.json lie in the case's folder."""
    built, module = build_on_cpu(case.make())
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        # Fresh norms are all ones and fresh biases zero: exchanged or left out, they would not show.
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.1)
    whole = {
        name: tensor.clone() for name, tensor in _published(built, module.state_dict()).items()
    }
    save_file(whole, case.folder / "model.safetensors", {"format": "pt"})
    (case.folder / "config.json").write_text(json.dumps(built.hf_config), encoding="utf-8")
    return built, module


def _published(built: BuiltModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(iter_published(tensors, built.weight_map, lambda tensor: tensor))


def _equals_the_reference(case: Case) -> None:
    import pytest

    if "reference" not in case.options:
        pytest.skip("no option `reference`")
    built, module = _publish(case)
    batch = _batch(case, built)
    wanted = case.options["reference"](case.folder, batch).detach()
    found: Any = module.eval()
    with torch.no_grad():
        logits = found.logits(batch)
    tolerance = float(case.options.get("tolerance", 1e-4))
    worst = float((logits - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
    assert worst <= tolerance, f"logits differ from the reference by {worst:.2e} of the largest"


def _gradients_equal_the_reference(case: Case) -> None:
    import pytest

    if "reference_gradients" not in case.options:
        pytest.skip("no option `reference_gradients`")
    built, module = _publish(case)
    batch = _batch(case, built)
    wanted = case.options["reference_gradients"](case.folder, batch)
    output: Any = module(batch, _loss(case))
    output.loss.backward()
    found = _published(built, _gradients(module))
    assert found.keys() == wanted.keys(), (
        f"gradients of {sorted(found.keys() ^ wanted.keys())[:3]} on one side only"
    )
    tolerance = float(case.options.get("gradient_tolerance", 1e-4))
    for name, gradient in wanted.items():
        off = float((found[name] - gradient).norm() / gradient.norm().clamp_min(1e-12))
        assert off <= tolerance, f"the gradient of {name} is off the reference by {off:.2e}"


def _a_published_folder_comes_back(case: Case) -> None:
    import pytest

    if "publish" not in case.options:
        pytest.skip("no option `publish`")
    case.options["publish"](case.folder)
    said = json.loads((case.folder / "config.json").read_text(encoding="utf-8"))
    part = case.make()
    built, module = build_on_cpu(
        case.make_from(_with_models_read(type(part).config_from_hf(said), part))
    )
    load_published_weights(module, built.weight_map, case.folder)
    ours = _published(built, module.state_dict())
    theirs = load_file(case.folder / "model.safetensors")
    assert ours.keys() == theirs.keys(), (
        f"published on one side only: {sorted(ours.keys() ^ theirs.keys())[:3]}"
    )
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), f"{name} is another after load and save"


CHECKS = (
    Check("builds_on_meta", _builds_on_meta),
    Check("every_parameter_is_mapped_once", _every_parameter_is_mapped_once),
    Check("everything_is_filled", _everything_is_filled),
    Check("one_seed_one_model", _one_seed_one_model),
    Check("paths_lead_somewhere", _paths_lead_somewhere),
    Check("weights_come_back", _weights_come_back),
    Check("config_goes_both_ways", _config_goes_both_ways),
    Check("every_weight_gets_a_gradient", _every_weight_gets_a_gradient),
    Check("packed_is_alone", _packed_is_alone),
    Check("recomputing_changes_nothing", _recomputing_changes_nothing),
    Check("no_samples_are_no_trouble", _no_samples_are_no_trouble),
    Check("two_ranks_are_one", _two_ranks_are_one),
    Check("a_rank_of_text_alone_is_no_trouble", _a_rank_of_text_alone_is_no_trouble),
    Check("equals_the_reference", _equals_the_reference),
    Check("gradients_equal_the_reference", _gradients_equal_the_reference),
    Check("a_published_folder_comes_back", _a_published_folder_comes_back),
)
