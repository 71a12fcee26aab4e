"""The claim: on the public API alone one can say a mixture-of-experts model with an expert axis, a model with a
frozen vision tower over any text model, a dataset over a database, a loss with two terms, and an adapter that
changes a model before sharding; and the weight map carries each of them in both directions."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import pegboard
from pegboard import (
    Batch,
    BuiltModel,
    Head,
    LossOutput,
    ModelOutput,
    SampleKey,
    ShardUnit,
    Targets,
)
from pegboard.plugin_manager import load_plugins
from pegboard.weight_export import iter_published
from pegboard.weight_loading import load_published_weights
from pegboard.weight_map import Entry, Piece, WeightMap, renamed


class SumLoss:
    """Plain cross entropy, scaled."""

    def __call__(self, hidden_TD: Tensor, head: Head, targets: Targets) -> LossOutput:
        logits_KV = head.logits(hidden_TD[targets.positions_K])
        losses_K = F.cross_entropy(logits_KV, targets.labels_K, reduction="none")
        return LossOutput((losses_K * targets.weights_K).sum() * targets.scale, losses_K.detach())

    def step_counts(self, batch: Batch) -> Mapping[str, float]:
        return {"targets": float(batch.targets.weights_K.sum())}


class TwoTermLoss(SumLoss):
    """Cross entropy, and the squared log partition function: two sums under one count."""

    def __call__(self, hidden_TD: Tensor, head: Head, targets: Targets) -> LossOutput:
        first = super().__call__(hidden_TD, head, targets)
        logits_KV = head.logits(hidden_TD[targets.positions_K])
        squares_K = logits_KV.logsumexp(-1).square() * targets.weights_K
        return first._replace(loss=first.loss + 1e-2 * squares_K.sum() * targets.scale)


def make_batch(lengths: list[int], seed: int, vocab: int = 11) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    ids = torch.randint(vocab, (total,), generator=generator)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.cat([torch.arange(n) for n in lengths])
    keep = torch.cat([torch.arange(n) < n - 1 for n in lengths]).nonzero().flatten()
    targets = Targets(keep, ids[keep + 1], torch.ones(len(keep)), torch.zeros_like(keep), 1.0)
    return Batch(
        input_ids_T=ids,
        position_ids_T=positions,
        cu_seqlens=starts.int(),
        max_seqlen=max(lengths),
        targets=targets,
        num_tokens=total,
        keys=tuple(SampleKey("s", "f", i) for i in range(len(lengths))),
    )


# A mixture-of-experts model -------------------------------------------------------------------------------

EXPERTS, HIDDEN, INNER, VOCAB = 4, 8, 6, 11


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_EFD = nn.Parameter(torch.empty(EXPERTS, 2 * INNER, HIDDEN))
        self.down_EDF = nn.Parameter(torch.empty(EXPERTS, HIDDEN, INNER))

    def forward(self, x_TD: Tensor, expert_T: Tensor) -> Tensor:
        out_TD = torch.zeros_like(x_TD)
        for expert in range(EXPERTS):
            rows = (expert_T == expert).nonzero().flatten()
            gate, up = (x_TD[rows] @ self.gate_up_EFD[expert].T).chunk(2, dim=-1)
            out_TD = out_TD.index_add(0, rows, (F.silu(gate) * up) @ self.down_EDF[expert].T)
        return out_TD


class MoEModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = Experts()
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def embed(self, input_ids_T: Tensor) -> Tensor:
        hidden: Tensor = self.embed_tokens(input_ids_T)
        return hidden

    def run_layers(self, hidden_TD: Tensor, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        logits_TE = self.router(hidden_TD)
        weight_T, expert_T = logits_TE.softmax(-1).max(-1)
        out_TD = hidden_TD + weight_T[:, None] * self.experts(hidden_TD, expert_T)
        z_loss = logits_TE.logsumexp(-1).square().sum() * batch.scales["tokens"]
        return out_TD, {"z_loss": 0.1 * z_loss}

    def compute_loss(self, hidden_TD: Tensor, targets: Targets, loss: Any) -> LossOutput:
        out: LossOutput = loss(hidden_TD, Head(self.lm_head.weight, None, self.lm_head), targets)
        return out

    def forward(self, batch: Batch, loss: Any) -> ModelOutput:
        hidden_TD, aux = self.run_layers(self.embed(batch.input_ids_T), batch)
        out = self.compute_loss(hidden_TD, batch.targets, loss)
        return ModelOutput(
            out.loss + sum(aux.values()),
            out.token_losses_K,
            {n: v.detach() for n, v in aux.items()},
        )


def build_moe() -> BuiltModel:
    module = MoEModel()
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    gate_up, down = [], []
    for expert in range(EXPERTS):
        one = (expert, expert + 1)
        prefix = f"experts.{expert}."
        gate_up += [
            Piece(prefix + "gate_proj.weight", ours=(one, (0, INNER)), squeeze=True),
            Piece(prefix + "up_proj.weight", ours=(one, (INNER, 2 * INNER)), squeeze=True),
        ]
        down.append(Piece(prefix + "down_proj.weight", ours=(one,), squeeze=True))
    entries = (
        renamed("embed_tokens.weight", "model.embed_tokens.weight", shapes["embed_tokens.weight"]),
        renamed("router.weight", "gate.weight", shapes["router.weight"]),
        Entry("experts.gate_up_EFD", shapes["experts.gate_up_EFD"], tuple(gate_up)),
        Entry("experts.down_EDF", shapes["experts.down_EDF"], tuple(down)),
        renamed("lm_head.weight", "lm_head.weight", shapes["lm_head.weight"]),
    )
    return BuiltModel(
        module=module,
        weight_map=WeightMap(entries),
        shard_units=(
            ShardUnit("experts", mesh="expert"),
            ShardUnit("router", param_dtype="float32"),
        ),
        hf_config={"model_type": "sketch_moe", "hidden_size": HIDDEN, "vocab_size": VOCAB},
        expert_axis={"experts.gate_up_EFD": 0, "experts.down_EDF": 0},
        step_counts=lambda batch: {"tokens": float(batch.num_tokens)},
    )


def fill(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    return module


def published(built: BuiltModel) -> dict[str, Tensor]:
    named = {name: p.detach() for name, p in built.module.named_parameters()}
    return {n: t.clone() for n, t in iter_published(named, built.weight_map, lambda t: t)}


def test_experts_stacked_in_memory_are_published_one_by_one_and_come_back(tmp_path: Path) -> None:
    built = build_moe()
    fill(built.module)
    assert not built.weight_map.unmapped(name for name, _ in built.module.named_parameters())
    tensors = published(built)
    assert tensors["experts.2.up_proj.weight"].shape == (INNER, HIDDEN)
    assert tensors.keys() == built.weight_map.published_shapes().keys()
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "model.safetensors")
    again = build_moe()
    load_published_weights(again.module, again.weight_map, tmp_path)
    for one, two in zip(built.module.parameters(), again.module.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_loss_of_the_models_own_is_a_mean_over_the_step_however_it_is_cut() -> None:
    built = build_moe()
    module = fill(built.module)
    loss = TwoTermLoss()

    def step(batches: list[Batch]) -> tuple[float, float, Tensor]:
        module.zero_grad()
        counts: dict[str, float] = {}
        assert built.step_counts is not None
        for batch in batches:
            for name, value in {**loss.step_counts(batch), **built.step_counts(batch)}.items():
                counts[name] = counts.get(name, 0.0) + value
        scales = {name: 1 / value for name, value in counts.items()}
        outputs = [module(batch.with_scales(scales), loss) for batch in batches]
        for output in outputs:
            output.loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        z_loss = sum(float(output.metrics["z_loss"]) for output in outputs)
        return sum(float(o.loss.detach()) for o in outputs), z_loss, gradient

    whole = step([make_batch([5, 3, 7, 2], 1)])
    first, second = make_batch([5, 3], 1), make_batch([7, 2], 1)
    ids = make_batch([5, 3, 7, 2], 1).input_ids_T
    cut = []
    for part, rows in ((first, ids[:8]), (second, ids[8:])):
        targets = part.targets._replace(labels_K=rows[part.targets.positions_K + 1])
        cut.append(replace(part, input_ids_T=rows, targets=targets))
    halves = step(cut)
    assert halves[0] == pytest.approx(whole[0], rel=1e-6)
    assert halves[1] == pytest.approx(whole[1], rel=1e-6)
    torch.testing.assert_close(halves[2], whole[2], rtol=1e-5, atol=1e-7)


# A model with a vision tower ------------------------------------------------------------------------------

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
}
IMAGE_ID = 10


class VisionLanguageModel(nn.Module):
    def __init__(self, text: nn.Module, width: int) -> None:
        super().__init__()
        self.vision_tower = nn.Linear(3, 5)
        self.projector = nn.Linear(5, width)
        self.language_model = text

    def forward(self, batch: Batch, loss: Any) -> ModelOutput:
        text: Any = self.language_model
        hidden_TD = text.embed(batch.input_ids_T)
        features = self.projector(self.vision_tower(batch.media["pixel_values"]))
        rows = batch.extras["image_rows"]
        hidden_TD = hidden_TD.index_copy(0, rows, features)
        hidden_TD, _ = text.run_layers(hidden_TD, batch)
        out = text.compute_loss(hidden_TD, batch.targets, loss)
        return ModelOutput(out.loss, out.token_losses_K, {})


def build_vision_language(text_component: Any) -> BuiltModel:
    text = text_component.build()
    module = VisionLanguageModel(text.module, text.hf_config["hidden_size"])
    own = [
        renamed(name, f"model.{name}", p.shape)
        for name, p in module.named_parameters()
        if not name.startswith("language_model.")
    ]

    def rename(name: str) -> str:
        head = name.startswith("lm_head.")
        return name if head else "model.language_model." + name.removeprefix("model.")

    return BuiltModel(
        module=module,
        weight_map=WeightMap(tuple(own)) + text.weight_map.prefixed("language_model.", rename),
        shard_units=tuple(u._replace(path="language_model." + u.path) for u in text.shard_units),
        hf_config={"model_type": "sketch_vlm", "text_config": text.hf_config},
        freeze_groups={"vision": ("vision_tower.",), "projector": ("projector.",)},
    )


def text_component(**changes: Any) -> Any:
    component: Any = load_plugins(third_party=False).registry.find("model", "Qwen3")
    return component(component.Config.model_validate_json(json.dumps({**TEXT, **changes})))


@pytest.mark.parametrize("tied", [True, False])
def test_a_vision_tower_feeds_any_text_model_and_can_be_frozen(tied: bool) -> None:
    built = build_vision_language(text_component(tie_word_embeddings=tied))
    freeze: Any = load_plugins(third_party=False).registry.find("transform", "Freeze")
    built = freeze(freeze.Config(groups=("vision",))).build()(built)
    fill(built.module)
    names = [name for name, _ in built.module.named_parameters()]
    assert not built.weight_map.unmapped(names)
    assert ("lm_head.weight" in published(built)) == (not tied)
    assert "model.language_model.layers.1.self_attn.q_proj.weight" in published(built)
    for name, parameter in built.module.named_parameters():
        parameter.requires_grad_(not name.startswith(built.frozen))
    batch = replace(
        make_batch([6, 4], 2),
        media={"pixel_values": torch.ones(2, 3)},
        extras={"image_rows": torch.tensor([1, 7])},
    )
    built.module(batch, SumLoss()).loss.backward()
    grads = {name: p.grad for name, p in built.module.named_parameters()}
    assert grads["vision_tower.weight"] is None
    assert grads["projector.weight"] is not None and grads["projector.weight"].abs().sum() > 0


def test_freezing_a_group_that_the_model_lacks_names_those_it_has() -> None:
    freeze: Any = load_plugins(third_party=False).registry.find("transform", "Freeze")
    change = freeze(freeze.Config(groups=("audio",))).build()
    with pytest.raises(pegboard.ConfigError, match="no group named 'audio'.*projector, vision"):
        change(build_vision_language(text_component()))


# A dataset over a database --------------------------------------------------------------------------------


class Rows:
    """Records of a table; opens the database where it is used, so it pickles."""

    def __init__(self, name: str, path: str) -> None:
        self.name, self.path = name, path

    def _all(self, sql: str, *values: int) -> list[Any]:
        with sqlite3.connect(self.path) as database:
            return database.execute(sql, values).fetchall()

    def __len__(self) -> int:
        return int(self._all("SELECT COUNT(*) FROM chat")[0][0])

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        question, answer = self._all("SELECT q, a FROM chat LIMIT 1 OFFSET ?", index)[0]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {"messages": messages}

    def key(self, index: int) -> SampleKey:
        return SampleKey(self.name, self.path, index + 1)

    def fingerprint(self) -> str | None:
        return None


class TableDataset(pegboard.DatasetComponent):
    """Chats of a SQLite table."""

    class Config(pegboard.ComponentConfig):
        """Fields of TableDataset."""

        path: str = Field(description="Database file.")

    config: Config

    def build(self, name: str) -> Rows:
        return Rows(name, self.config.path)


def test_a_database_is_a_dataset_without_files_or_lines(tmp_path: Path) -> None:
    from pegboard.token_store import build_store

    path = tmp_path / "chats.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE chat (q TEXT, a TEXT)")
        database.executemany("INSERT INTO chat VALUES (?, ?)", [("a", "b"), ("c", "d")])
    registry = load_plugins(third_party=False).registry
    tokenizer_class: Any = registry.find("tokenizer", "ByteTokenizer")
    tokenizer = tokenizer_class(tokenizer_class.Config()).build()
    fn_class: Any = registry.find("tokenize_fn", "ChatTokenizeFn")
    tokenize = fn_class(fn_class.Config(max_length=64)).build(tokenizer, text_component())
    dataset = TableDataset(TableDataset.Config(path=str(path))).build("db")
    store = build_store(
        tmp_path / "store", dataset, tokenize, on_bad_record="error", num_workers=0, name="db"
    )
    assert [store.key(i).line for i in range(len(store))] == [1, 2]
    assert "d" in tokenizer.decode(store[1].input_ids[store[1].loss_mask])


# An adapter -----------------------------------------------------------------------------------------------


class LowRankLinear(nn.Linear):
    """A linear layer that became one with a low-rank change; its own weight keeps its name."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.lora_a), self.lora_b)


def low_rank(rank: int) -> Callable[[BuiltModel], BuiltModel]:
    def change(built: BuiltModel) -> BuiltModel:
        entries = {entry.ours: entry for entry in built.weight_map.entries}
        added: list[str] = []
        for path, module in built.module.named_modules():
            if not path.endswith("o_proj"):
                continue
            assert isinstance(module, nn.Linear)
            module.__class__ = LowRankLinear
            adapted: Any = module
            adapted.lora_a = nn.Parameter(torch.empty(rank, module.in_features))
            adapted.lora_b = nn.Parameter(torch.empty(module.out_features, rank))
            factors = (f"{path}.lora_a", f"{path}.lora_b")
            added += factors
            entries[f"{path}.weight"] = replace(
                entries[f"{path}.weight"], also=factors, merge=lambda w, a, b: w + b @ a
            )
        weight_map = replace(
            built.weight_map, entries=tuple(entries.values()), unpublished=tuple(added)
        )
        return replace(built, weight_map=weight_map, frozen=("model.", "lm_head."))

    return change


def test_an_adapter_keeps_base_names_and_is_merged_in_the_export(tmp_path: Path) -> None:
    base = text_component().build()
    fill(base.module)
    tensors = published(base)
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "model.safetensors")

    adapted = low_rank(2)(text_component().build())
    fill(adapted.module, seed=3)
    load_published_weights(adapted.module, adapted.weight_map, tmp_path)
    merged = published(adapted)
    assert merged.keys() == tensors.keys()
    name = "model.layers.1.self_attn.o_proj"
    layer: Any = adapted.module.get_submodule(name)
    expected = tensors[f"{name}.weight"] + layer.lora_b.detach() @ layer.lora_a.detach()
    torch.testing.assert_close(merged[f"{name}.weight"], expected)
    assert torch.equal(
        merged["model.layers.0.mlp.up_proj.weight"], tensors["model.layers.0.mlp.up_proj.weight"]
    )
