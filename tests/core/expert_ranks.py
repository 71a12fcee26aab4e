"""A small mixture of experts, and scenes of ranks that share its experts; no tests in here.

Run under torchrun (`expert_ranks.py FOLDER SCENE`) it plays a scene and rank 0 writes what came of it to
FOLDER/results.json.

T tokens, D hidden, F feed-forward, E experts, K experts per token, V vocabulary, N rows sorted by expert.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from pegboard import weight_loading
from pegboard.contracts import Batch, BuiltModel, Head, LossOutput, ModelOutput, ShardUnit, Targets
from pegboard.expert_dispatch import AllToAllDispatcher
from pegboard.initialization import init_module_weights, plain_name
from pegboard.parallel import (
    Ranks,
    _gathered_elements,
    apply_activation_checkpointing,
    clip_gradients,
    gradient_norm,
    join_ranks,
    leave_ranks,
    set_gradient_sync,
    shard_model,
)
from pegboard.savers import SaveRequest
from pegboard.train_state import load_train_state, save_train_state
from pegboard.weight_map import Entry, Piece, WeightMap, renamed
from pegboard_plugins.savers.component import HFSaver

VOCAB, HIDDEN, INNER, EXPERTS, TOP, LAYERS = 32, 16, 12, 8, 2, 2
SEQUENCES, STEPS, MAX_NORM = 16, 5, 0.05
Params = dict[str, Tensor]


class Experts(nn.Module):
    """The reference kernel: one expert after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_EFD = nn.Parameter(torch.empty(EXPERTS, 2 * INNER, HIDDEN))
        self.down_EDF = nn.Parameter(torch.empty(EXPERTS, HIDDEN, INNER))
        self.dispatcher: Any = None

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        flat = ids_TK.flatten()
        order = flat.argsort(stable=True)
        rows_ND = x_TD[order // TOP]
        counts = F.one_hot(flat, EXPERTS).sum(0)
        journey = None
        if self.dispatcher is not None:
            rows_ND, counts, journey = self.dispatcher.dispatch(rows_ND, counts)
        gate_up, down = _local(self.gate_up_EFD), _local(self.down_EDF)
        out = []
        for expert, part in enumerate(rows_ND.split(counts.tolist())):
            gate, up = (part @ gate_up[expert].T).chunk(2, dim=-1)
            out.append((F.silu(gate) * up) @ down[expert].T)
        out_ND = torch.cat(out)
        if journey is not None:
            out_ND = self.dispatcher.combine(out_ND, journey)
        out_TKD = out_ND[order.argsort()].view(len(x_TD), TOP, HIDDEN)
        return (out_TKD * weights_TK[..., None]).sum(1)


class Layer(nn.Module):
    """Mixes neighbours, then experts."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = Experts()

    def forward(self, x_TD: Tensor, bias_TE: Tensor) -> Tensor:
        x_TD = x_TD + self.mix(x_TD.tanh())
        scores_TE = self.router(x_TD).softmax(-1)
        ids_TK = (scores_TE.detach() + bias_TE).topk(TOP, dim=-1).indices
        weights_TK = scores_TE.gather(1, ids_TK)
        out_TD: Tensor = x_TD + self.experts(x_TD, ids_TK, weights_TK)
        return out_TD


class Mixture(nn.Module):
    """`routing_VE` is added to the scores by which experts are chosen."""

    def __init__(self, routing_VE: Tensor) -> None:
        super().__init__()
        self.initializer_range = 0.3
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.routing_VE = [routing_VE]

    def forward(self, batch: Batch, loss: Any) -> ModelOutput:
        x_TD = self.embed_tokens(batch.input_ids_T)
        bias_TE = self.routing_VE[0].to(x_TD.dtype)[batch.input_ids_T]
        for layer in self.layers:
            x_TD = layer(x_TD, bias_TE)
        out = loss(x_TD, Head(self.lm_head.weight, None, self.lm_head), batch.targets)
        return ModelOutput(out.loss, out.token_losses_K, {})


class SumLoss:
    """Plain cross entropy, scaled."""

    def __call__(self, hidden_TD: Tensor, head: Head, targets: Targets) -> LossOutput:
        logits_KV = head.logits(hidden_TD[targets.positions_K])
        losses_K = F.cross_entropy(logits_KV, targets.labels_K, reduction="none")
        return LossOutput(losses_K.sum() * targets.scale, losses_K.detach())


def build(routing: str = "free", dtype: torch.dtype = torch.float64) -> BuiltModel:
    """On meta."""
    torch.set_default_dtype(dtype)
    with torch.device("meta"):
        module = Mixture(routing_bias(routing))
    torch.set_default_dtype(torch.float32)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    entries, units, axis = [], [], {}
    for name, shape in shapes.items():
        if ".experts." not in name:
            entries.append(renamed(name, name, shape))
            continue
        axis[name] = 0
        parts = ("gate_proj", "up_proj") if "gate_up" in name else ("down_proj",)
        rows = shape[1] // len(parts)
        prefix = name.rpartition(".")[0]
        pieces = [
            Piece(
                f"{prefix}.{expert}.{part}.weight",
                ours=((expert, expert + 1), (index * rows, (index + 1) * rows)),
                squeeze=True,
            )
            for expert in range(EXPERTS)
            for index, part in enumerate(parts)
        ]
        entries.append(Entry(name, shape, tuple(pieces)))
    for index in range(LAYERS):
        units.append(ShardUnit(f"layers.{index}.experts", mesh="expert"))
        units.append(ShardUnit(f"layers.{index}"))
    return BuiltModel(
        module=module,
        weight_map=WeightMap(tuple(entries)),
        shard_units=tuple(units),
        hf_config={"model_type": "qwen3_moe"},
        checkpoint_units=tuple(f"layers.{index}" for index in range(LAYERS)),
        expert_axis=axis,
    )


def routing_bias(routing: str) -> Tensor:
    """(V, E): what is added to the scores, which lie in (0, 1)."""
    bias = torch.zeros(VOCAB, EXPERTS, device="cpu")
    if routing == "unbalanced":  # half of all rows to two experts of the first rank
        bias[::2, :2] = 10.0
    elif routing == "empty":  # expert 3 gets nothing, nor do the experts of the last rank
        bias[:, [3, 6, 7]] = -10.0
    elif routing == "elsewhere":  # the class of an id says where to: never to the rank that has it
        for kind in range(4):
            bias[kind * 8 : (kind + 1) * 8, 2 * ((kind + 1) % 4) :][:, :2] = 10.0
    return bias


def sequences(step: int) -> list[Tensor]:
    """The step's samples, the same on all ranks; number s has ids of class s % 4 only."""
    generator = torch.Generator().manual_seed(step)
    return [
        torch.randint(8, (3 + (5 * number + step) % 7,), generator=generator) + 8 * (number % 4)
        for number in range(SEQUENCES)
    ]


def micro_batch(step: int, index: int, number: int) -> Batch:
    """Micro-batch `index` of the `number` that a step is cut into; it may be empty."""
    every = sequences(step)
    ids = every[index::number] or [torch.zeros(1, dtype=torch.int64)]
    total = sum(len(one) - 1 for one in every)
    lengths = torch.tensor([0, *map(len, ids)])
    keep = torch.cat([torch.arange(len(one)) < len(one) - 1 for one in ids]).nonzero().flatten()
    ids_T = torch.cat(ids)
    targets = Targets(
        keep, ids_T[keep + 1], torch.ones(len(keep)), torch.zeros_like(keep), 1.0 / total
    )
    return Batch(
        input_ids_T=ids_T,
        position_ids_T=torch.cat([torch.arange(len(one)) for one in ids]),
        cu_seqlens=lengths.cumsum(0).int(),
        max_seqlen=int(lengths.max()),
        targets=targets,
        num_tokens=len(ids_T),
    )


@dataclass(eq=False)
class Run:
    """A model and its optimizer on some ranks."""

    built: BuiltModel
    ranks: Ranks
    optimizer: torch.optim.Optimizer
    sharded: bool

    @classmethod
    def start(
        cls,
        ranks: Ranks,
        *,
        routing: str = "free",
        dtype: torch.dtype = torch.float64,
        sharded: bool = True,
        recompute: bool = False,
        seed: int = 3,
    ) -> Run:
        built = build(routing, dtype)
        if recompute:
            apply_activation_checkpointing(built, "full")
        if sharded:
            shard_model(built, ranks, dtype, dtype)
        built.module.to_empty(device="cpu")
        init_module_weights(built.module, seed)
        groups: dict[bool, list[nn.Parameter]] = {}
        for name, parameter in built.module.named_parameters():
            groups.setdefault(name in built.expert_axis, []).append(parameter)
        optimizer = torch.optim.AdamW(
            [{"params": params} for params in groups.values()],
            lr=1e-2,
            eps=1e-5,
            weight_decay=0.1,
            fused=True,
        )
        return cls(built, ranks, optimizer, sharded)

    def step(self, step: int, accumulation: int = 1, *, once: bool = True) -> tuple[float, float]:
        """(loss, gradient norm before clipping)."""
        module, world = self.built.module, self.ranks.world_size
        loss = torch.zeros((), dtype=torch.float64)
        for index in range(accumulation):
            if self.sharded:
                set_gradient_sync(module, not once or index == accumulation - 1)
            batch = micro_batch(step, index * world + self.ranks.rank, accumulation * world)
            output = module(batch, SumLoss())
            output.loss.backward()
            loss += output.loss.detach().double()
        parameters = list(module.parameters())
        norm = gradient_norm(parameters, self.ranks)
        if self.sharded:
            clip_gradients(parameters, norm, MAX_NORM)
        else:  # torch's own, on whole tensors, is what the others are held to
            nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if world > 1:
            dist.all_reduce(loss)
        return float(loss), float(norm)

    def whole(self) -> Params:
        """Parameters and optimizer state, whole."""
        state: Params = {}
        for name, parameter in self.built.module.named_parameters():
            tensors = {"param": parameter, **self.optimizer.state.get(parameter, {})}
            for key, tensor in tensors.items():
                full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                state[f"{key}.{plain_name(name)}"] = full.detach().clone()
        return state

    def export(self, folder: Path, *, computed: bool = False) -> Path:
        """Several small files; `computed`: what is published is computed from some parameters."""
        built = self.built
        if computed:
            entries = tuple(
                replace(entry, also=(entry.ours,), merge=torch.add)
                if entry.ours.endswith(("0.mix.weight", "1.router.weight", "1.experts.down_EDF"))
                else entry
                for entry in built.weight_map.entries
            )
            built = replace(built, weight_map=WeightMap(entries))
        request = SaveRequest(
            step=1,
            is_last=True,
            run_dir=folder,
            model=built,
            module=built.module,
            optimizer=self.optimizer,
            tokenizer=NoTokenizer(),  # type: ignore[arg-type]
            loaded_dtype=None,
            source_folder=None,
            train_state={},
        )
        saver = HFSaver(HFSaver.Config(dtype="float32", max_shard_size_gb=4e-6)).build()
        written = saver.save(request)
        assert written is not None
        return written


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class NoTokenizer:
    """Writes nothing."""

    eos_token_ids = (0,)
    pad_token_id = 0
    chat_template = None

    def save(self, folder: str) -> None:
        del folder


def alone() -> Ranks:
    """A world of one that is never asked for its mesh."""
    return Ranks(0, 1, torch.device("cpu"), None)  # type: ignore[arg-type]


def difference(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Largest difference of any weight."""
    assert left.keys() == right.keys()
    return max(
        float((left[name] - right[name]).abs().max()) for name in left if name.startswith("param.")
    )


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


MESHES = {"ep1": (1, 1), "ep2": (1, 2), "ep4": (1, 4), "ep2_x2": (2, 2), "ep1_x2": (2, 1)}
ROUTINGS = ("free", "unbalanced", "empty", "elsewhere")


def invariance(folder: Path, cases: Sequence[tuple[str, str, int, str, bool]]) -> dict[str, Any]:
    """Losses, norms and weights of every (mesh, routing, accumulation, dtype, recompute)."""
    device = torch.device("cpu")
    references: dict[tuple[str, str], tuple[list[tuple[float, float]], Params]] = {}
    results: dict[str, Any] = {}
    for mesh, routing, accumulation, dtype_name, recompute in cases:
        dtype = getattr(torch, dtype_name)
        if (routing, dtype_name) not in references:
            plain = Run.start(alone(), routing=routing, dtype=dtype, sharded=False)
            numbers = [plain.step(step) for step in range(STEPS)]
            references[routing, dtype_name] = numbers, plain.whole()
        expected, weights = references[routing, dtype_name]
        run = Run.start(
            join_ranks(device, *MESHES[mesh]), routing=routing, dtype=dtype, recompute=recompute
        )
        once = accumulation != 4
        found = [run.step(step, accumulation, once=once) for step in range(STEPS)]
        pairs = list(zip(found, expected, strict=True))
        results[f"{mesh} {routing} {accumulation} {dtype_name} {recompute}"] = {
            "loss": max(abs(f[0] / e[0] - 1) for f, e in pairs),
            "norm": max(abs(f[1] / e[1] - 1) for f, e in pairs),
            "weights": difference(run.whole(), weights),
            "clipped": min(f[1] for f in found) > MAX_NORM,
        }
    return results


def some_cases() -> list[tuple[str, str, int, str, bool]]:
    """A few of each kind."""
    return [
        ("ep1", "free", 1, "float64", False),
        ("ep2", "free", 4, "float64", False),
        ("ep4", "unbalanced", 1, "float64", True),
        ("ep2_x2", "empty", 2, "float64", False),
        ("ep4", "elsewhere", 2, "float64", False),
        ("ep2", "elsewhere", 1, "float32", True),
    ]


def all_cases() -> list[tuple[str, str, int, str, bool]]:
    """Everything with everything."""
    product = itertools.product(MESHES, ROUTINGS, (1, 2, 4), ("float32", "float64"))
    return [(*case, (index % 2) == 1) for index, case in enumerate(product)]


def fewer_journeys(results: dict[str, Any]) -> None:
    """How often routes are planned and rows exchanged with and without recomputing."""
    calls = {"plans": 0}
    plan = AllToAllDispatcher._plan

    def counted(self: AllToAllDispatcher, counts_E: Tensor) -> Any:
        calls["plans"] += 1
        return plan(self, counts_E)

    AllToAllDispatcher._plan = counted  # type: ignore[method-assign]
    states = []
    for recompute in (False, True, True):
        calls["plans"] = 0
        run = Run.start(join_ranks(torch.device("cpu"), 1, 2), recompute=recompute)
        for step in range(2):
            run.step(step)
        results[f"plans {recompute}"] = calls["plans"]
        states.append(run.whole())
    AllToAllDispatcher._plan = plan  # type: ignore[method-assign]
    results["recomputed is the same"] = same(states[0], states[1])
    results["again is the same"] = same(states[1], states[2])


def checkpoints(folder: Path, results: dict[str, Any]) -> None:
    """Save at EP 4; resume, go on and export under every other layout."""
    device = torch.device("cpu")
    saved = Run.start(join_ranks(device, 1, 4), seed=11)
    for step in range(3):
        saved.step(step)
    save_train_state(folder / "ep4", saved.built.module, saved.optimizer, {"step": 3})
    state = saved.whole()
    if dist.get_rank() == 0:
        torch.save(state, folder / "state.pt")
    saved.export(folder / "export_of_ep4")
    for step in (3, 4):
        saved.step(step)
    for name, sizes in MESHES.items():
        run = Run.start(join_ranks(device, *sizes), seed=12)
        load_train_state(folder / "ep4", run.built.module, run.optimizer)
        results[f"{name} resumed the same"] = same(run.whole(), state)
        run.export(folder / f"export_of_{name}")
        run.export(folder / f"computed_by_{name}", computed=True)
        for step in (3, 4):
            run.step(step, 2)
        results[f"{name} went on"] = difference(run.whole(), saved.whole())
        save_train_state(folder / f"again_{name}", run.built.module, run.optimizer, {})
        back = Run.start(join_ranks(device, 1, 4), seed=13)
        load_train_state(folder / f"again_{name}", back.built.module, back.optimizer)
        results[f"{name} and back"] = same(back.whole(), run.whole())


def loading(folder: Path, results: dict[str, Any]) -> None:
    """Load an export at EP 2 and EP 1; say which tensors each rank read."""
    read: list[str] = []
    opened = weight_loading._open

    class Recorder:
        def __init__(self, path: Path) -> None:
            self.file = opened(path)

        def __enter__(self) -> Recorder:
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def keys(self) -> Any:
            return self.file.keys()

        def get_slice(self, name: str) -> Any:
            read.append(name)
            return self.file.get_slice(name)

    weight_loading._open = Recorder
    wholes = []
    for name in ("ep1", "ep2", "ep2_x2"):
        run = Run.start(join_ranks(torch.device("cpu"), *MESHES[name]), seed=14)
        report = weight_loading.load_published_weights(
            run.built.module, run.built.weight_map, folder / "export_of_ep4" / "export"
        )
        every: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        counts = {n: read.count(n) for n in set(read)}
        # Once for the header's shapes and dtype; a second time to read.
        dist.all_gather_object(every, sorted(n for n, times in counts.items() if times > 1))
        results[f"{name} read"] = every
        results[f"{name} tensors"] = report.num_tensors
        wholes.append(run.whole())
        read.clear()
    weight_loading._open = opened
    results["loaded the same"] = same(wholes[0], wholes[1]) and same(wholes[0], wholes[2])


def memory(results: dict[str, Any]) -> None:
    """Bytes of parameters and optimizer state on each rank, dense and expert."""
    for name in ("ep1", "ep2"):
        run = Run.start(join_ranks(torch.device("cpu"), *MESHES[name]))
        run.step(0)
        held = {"dense": 0, "expert": 0, "dense whole": 0, "expert whole": 0}
        for key, parameter in run.built.module.named_parameters():
            kind = "expert" if key in run.built.expert_axis else "dense"
            for tensor in (parameter, *run.optimizer.state[parameter].values()):
                if isinstance(tensor, DTensor):
                    held[kind] += tensor.to_local().untyped_storage().nbytes()
                    held[f"{kind} whole"] += tensor.nbytes
        every: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(every, held)
        results[name] = every
        # What a step that reduces once holds whole: all that is dense, of experts its own.
        results[f"{name} gathered"] = {
            key: _gathered_elements(parameter) / parameter.numel()
            for key, parameter in run.built.module.named_parameters()
        }


def uneven(results: dict[str, Any]) -> None:
    """Three experts on each of two ranks cannot be; two shards of one expert can: one is empty."""
    global EXPERTS
    before = EXPERTS
    for experts in (2, 6):
        EXPERTS = experts
        run = Run.start(join_ranks(torch.device("cpu"), 1, 2))
        plain = Run.start(alone(), sharded=False)
        pairs = [(run.step(step), plain.step(step)) for step in range(2)]
        results[f"{experts} experts"] = {
            "norm": max(abs(f[1] / e[1] - 1) for f, e in pairs),
            "weights": difference(run.whole(), plain.whole()),
        }
        folder = Path(sys.argv[1])
        save_train_state(folder / f"uneven_{experts}", run.built.module, run.optimizer, {})
        other = Run.start(join_ranks(torch.device("cpu"), 1, 1), seed=5)
        load_train_state(folder / f"uneven_{experts}", other.built.module, other.optimizer)
        results[f"{experts} experts resumed the same"] = same(other.whole(), run.whole())
    EXPERTS = before


def main(folder: Path, scene: str) -> None:
    """Play a scene on the ranks that torchrun started."""
    join_ranks(torch.device("cpu"))
    results: dict[str, Any] = {}
    if scene == "all":
        results["invariance"] = invariance(folder, all_cases())
    elif scene == "some":
        results["invariance"] = invariance(folder, some_cases())
        fewer_journeys(results)
        checkpoints(folder, results)
        loading(folder, results)
        uneven(results)
    elif scene == "memory":
        memory(results)
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    leave_ranks()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
