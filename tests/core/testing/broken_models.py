"""Models and transforms with one fault each: a tiny Qwen3, and what is changed of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from broken_parts import Broken, Sound
from torch import nn

import pegboard
from pegboard import BuiltModel, ShardUnit
from pegboard.testing.case import TINY_MODEL
from pegboard.weight_map import Entry, renamed
from pegboard_plugins.qwen3.component import Qwen3

__all__ = ["BROKEN", "SOUND"]

TINY = {**TINY_MODEL, "num_hidden_layers": 1, "tie_word_embeddings": True}


class Plain(Qwen3):
    """A tiny Qwen3."""


def entries_of(built: BuiltModel, change: Callable[[Entry], Entry]) -> BuiltModel:
    entries = tuple(change(entry) for entry in built.weight_map.entries)
    return replace(built, weight_map=replace(built.weight_map, entries=entries))


class OffMeta(Qwen3):
    """Makes a weight on the CPU."""

    def build(self) -> BuiltModel:
        built = super().build()
        built.module.model.norm.weight = nn.Parameter(torch.ones(16, device="cpu"))  # type: ignore[union-attr]
        return built


class Drawing(Qwen3):
    """Draws a random number while it is built."""

    def build(self) -> BuiltModel:
        torch.rand(1, device="cpu")
        return super().build()


class MapsToNothing(Qwen3):
    """Has two entries for one parameter."""

    def build(self) -> BuiltModel:
        built = super().build()
        entries = (*built.weight_map.entries, built.weight_map.entries[0])
        return replace(built, weight_map=replace(built.weight_map, entries=entries))


class Unfilled(nn.Module):
    """A buffer that `reset_parameters` leaves as it finds it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1), persistent=False)

    def reset_parameters(self, generator: torch.Generator) -> None:
        del generator


class Buffered(Qwen3):
    """Has a buffer that nobody fills."""

    def build(self) -> BuiltModel:
        built = super().build()
        built.module.counter = Unfilled()
        return built


class AnySeed(nn.Linear):
    """Draws without the generator it is given."""

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        del generator
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=0.02)


class Seedless(Qwen3):
    """Draws weights that the seed does not decide."""

    def build(self) -> BuiltModel:
        built = super().build()
        layer: Any = built.module.model.layers[0]  # type: ignore[index, union-attr]
        layer.mlp.down_proj = AnySeed(24, 16, bias=False)
        return built


class Misplaced(Qwen3):
    """Names a shard unit that is not there."""

    def build(self) -> BuiltModel:
        return replace(super().build(), shard_units=(ShardUnit("model.layer.0"),))


def doubled(tensor: Any) -> Any:
    return 2 * tensor


class Doubling(Qwen3):
    """Exports its norm twice as large."""

    def build(self) -> BuiltModel:
        def double(entry: Entry) -> Entry:
            return replace(entry, merge=doubled) if entry.ours == "model.norm.weight" else entry

        return entries_of(super().build(), double)


class Forgetful(Qwen3):
    """Reads a config.json without one key."""

    @classmethod
    def config_from_hf(cls, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        fields = super().config_from_hf(hf_config)
        return {**fields, "tie_word_embeddings": False}


class Idle(Qwen3):
    """Has a weight that it does not use."""

    def build(self) -> BuiltModel:
        built = super().build()
        built.module.idle = nn.Linear(2, 2, bias=False)
        entry = renamed("idle.weight", "idle.weight", (2, 2))
        return replace(
            built, weight_map=replace(built.weight_map, entries=(*built.weight_map.entries, entry))
        )


class Looking(Qwen3):
    """Attends across the boundaries of samples."""

    def build(self) -> BuiltModel:
        built = super().build()
        run_layers: Any = built.module.run_layers

        def as_one_sample(hidden: Any, batch: Any) -> Any:
            bounds = torch.tensor([0, len(hidden)], dtype=torch.int32)
            return run_layers(hidden, replace(batch, cu_seqlens=bounds, max_seqlen=len(hidden)))

        built.module.run_layers = as_one_sample  # type: ignore[assignment]
        return built


class Unwrapped(Qwen3):
    """Names nothing that can be recomputed."""

    def build(self) -> BuiltModel:
        return replace(super().build(), checkpoint_units=())


class Proud(Qwen3):
    """Refuses a filler."""

    def build(self) -> BuiltModel:
        built = super().build()
        forward: Any = built.module.forward

        def with_targets(batch: Any, loss: Any) -> Any:
            if not len(batch.targets.positions_K):
                raise ValueError("nothing to predict")
            return forward(batch, loss)

        built.module.forward = with_targets
        return built


class Averaging(Qwen3):
    """Divides its loss by the number of ranks."""

    def build(self) -> BuiltModel:
        import torch.distributed as dist

        built = super().build()
        forward: Any = built.module.forward

        def mean_over_ranks(batch: Any, loss: Any) -> Any:
            out = forward(batch, loss)
            ranks = dist.get_world_size() if dist.is_initialized() else 1
            return out._replace(loss=out.loss / ranks)

        built.module.forward = mean_over_ranks
        return built


class Tilted(Qwen3):
    """Has the right loss, and another gradient."""

    def build(self) -> BuiltModel:
        built = super().build()
        forward: Any = built.module.forward

        def with_more_gradient(batch: Any, loss: Any) -> Any:
            out = forward(batch, loss)
            weight: Any = built.module.model.norm.weight  # type: ignore[union-attr]
            more = weight.sum() * len(batch.targets.positions_K)
            return out._replace(loss=out.loss + more - more.detach())

        built.module.forward = with_more_gradient
        return built


class Renaming(Qwen3):
    """Publishes a weight under a name of its own."""

    def build(self) -> BuiltModel:
        def rename_norm(entry: Entry) -> Entry:
            if entry.ours != "model.norm.weight":
                return entry
            return renamed(entry.ours, "model.last_norm.weight", entry.shape)

        return entries_of(super().build(), rename_norm)


class Swapped(Qwen3):
    """Takes the gate's rows for the up projection's."""

    def build(self) -> BuiltModel:
        def swap(entry: Entry) -> Entry:
            if not entry.ours.endswith("gate_up_proj.weight"):
                return entry
            one, two = entry.pieces
            pieces = (one._replace(published=two.published), two._replace(published=one.published))
            return replace(entry, pieces=pieces)

        return entries_of(super().build(), swap)


def transformers_logits(folder: Path, batch: Any) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    samples = batch.input_ids_T.split(batch.cu_seqlens.diff().tolist())
    with torch.no_grad():
        return torch.cat([model(sample[None]).logits[0] for sample in samples])


def transformers_gradients(folder: Path, batch: Any) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    samples = batch.input_ids_T.split(batch.cu_seqlens.diff().tolist())
    logits = torch.cat([model(sample[None]).logits[0] for sample in samples])
    targets = batch.targets
    losses = nn.functional.cross_entropy(
        logits[targets.positions_K], targets.labels_K, reduction="sum"
    )
    (losses * targets.scale).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def publish(folder: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**TINY)).save_pretrained(folder)


Change = Callable[[BuiltModel], BuiltModel]


def transform(change: Change) -> type[pegboard.TransformComponent]:
    class Changed(pegboard.TransformComponent):
        """A change."""

        config: Any

        def build(self) -> Change:
            return change

    return Changed


def freeze(built: BuiltModel) -> BuiltModel:
    return replace(built, frozen=(*built.frozen, "model.layers.0."))


def rename(built: BuiltModel) -> BuiltModel:
    module: Any = built.module
    module.model.last_norm = module.model.norm
    del module.model.norm
    module.model.__dict__["norm"] = module.model.last_norm
    return built


def add_real(built: BuiltModel) -> BuiltModel:
    built.module.extra = nn.Parameter(torch.ones(2, device="cpu"))
    return with_unpublished(built, "extra")


def add_unmapped(built: BuiltModel) -> BuiltModel:
    built.module.extra = nn.Parameter(torch.ones(2))
    return built


def hide_norm(built: BuiltModel) -> BuiltModel:
    kept = tuple(e for e in built.weight_map.entries if e.ours != "model.norm.weight")
    built = replace(built, weight_map=replace(built.weight_map, entries=kept))
    return with_unpublished(built, "model.norm.weight")


def with_unpublished(built: BuiltModel, name: str) -> BuiltModel:
    names = (*built.weight_map.unpublished, name)
    return replace(built, weight_map=replace(built.weight_map, unpublished=names))


def cut_graph(built: BuiltModel) -> BuiltModel:
    embed: Any = built.module.compute_loss

    def without_graph(hidden: Any, targets: Any, loss: Any) -> Any:
        with torch.no_grad():
            return embed(hidden, targets, loss)

    built.module.compute_loss = without_graph  # type: ignore[assignment]
    return built


def patch_everywhere(built: BuiltModel) -> BuiltModel:
    from pegboard_plugins.blocks.feed_forward import GatedFeedForward
    from pegboard_plugins.qwen3 import modeling

    class Patched(GatedFeedForward):
        """Another class, for every model that is built from now on."""

    vars(modeling)["GatedFeedForward"] = Patched
    return built


REFERENCE = {
    "reference": transformers_logits,
    "reference_gradients": transformers_gradients,
    "publish": publish,
}
AS_REFERENCE = ("equals_the_reference", "gradients_equal_the_reference")
SOUND = {
    "model": Sound(Plain, TINY, REFERENCE),
    "transform": Sound(transform(freeze)),
}


def _model(fault: str, check: str, cls: type[Qwen3], *also: str) -> Broken:
    return Broken(fault, check, cls, TINY, None, frozenset(also))


def _transform(fault: str, check: str, change: Change, *also: str) -> Broken:
    return Broken(fault, check, transform(change), also=frozenset(also))


BROKEN = [
    _model("makes a weight on the CPU", "builds_on_meta", OffMeta),
    _model("draws a random number while it is built", "builds_on_meta", Drawing),
    _model("has two entries for one parameter", "every_parameter_is_mapped_once", MapsToNothing),
    _model("has a buffer that nobody fills", "everything_is_filled", Buffered),
    _model(
        "draws weights that the seed does not decide",
        "one_seed_one_model",
        Seedless,
        "recomputing_changes_nothing",
    ),
    _model("names a shard unit that is not there", "paths_lead_somewhere", Misplaced),
    _model(
        "exports a weight twice as large",
        "weights_come_back",
        Doubling,
        *AS_REFERENCE,
        "a_published_folder_comes_back",
    ),
    _model(
        "reads its config.json without one key",
        "config_goes_both_ways",
        Forgetful,
        "a_published_folder_comes_back",
    ),
    _model(
        "has a weight that it does not use",
        "every_weight_gets_a_gradient",
        Idle,
        "gradients_equal_the_reference",
        "a_published_folder_comes_back",
    ),
    _model(
        "attends across the boundaries of samples",
        "packed_is_alone",
        Looking,
        *AS_REFERENCE,
    ),
    _model("names nothing that can be recomputed", "recomputing_changes_nothing", Unwrapped),
    _model("refuses a filler", "no_samples_are_no_trouble", Proud),
    _model("divides its loss by the number of ranks", "two_ranks_are_one", Averaging),
    _model(
        "takes the gate's rows for the up projection's",
        "equals_the_reference",
        Swapped,
        "gradients_equal_the_reference",
    ),
    _model("has the right loss and another gradient", "gradients_equal_the_reference", Tilted),
    _model(
        "publishes a weight under a name of its own",
        "a_published_folder_comes_back",
        Renaming,
        *AS_REFERENCE,
    ),
    _transform(
        "renames a weight",
        "base_weights_keep_their_names",
        rename,
        "every_parameter_is_mapped",
        "the_export_keeps_its_keys",
    ),
    _transform("makes a weight on the CPU", "stays_on_meta", add_real),
    _transform("adds a weight that no map names", "every_parameter_is_mapped", add_unmapped),
    _transform("hides a weight from the export", "the_export_keeps_its_keys", hide_norm),
    _transform("cuts the graph to the loss", "the_changed_model_trains", cut_graph),
    _transform("changes models built later", "leaves_other_models_alone", patch_everywhere),
]
