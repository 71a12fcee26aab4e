"""Speed and memory of mixture-of-experts layers and models, beside transformers; markdown tables.

    export PYTHONPATH=core:plugins
    python tests/benchmarks/bench_moe.py layer           # one sparse layer, forward and backward
    python tests/benchmarks/bench_moe.py model           # whole runs, as their users would start them
    python tests/benchmarks/bench_moe.py gpu             # shapes M1 and M2 on a CUDA device

layer: hidden 512, 64 experts, top 8, width 256, 2,048 tokens, float32, router included. Times are of
pairs in one process, in turns, the median ratio of pairs; peaks are of processes of their own (VmHWM
less RSS before). transformers runs with experts_implementation="grouped_mm".

model: as bench_end_to_end.py, with a sparse model: Pegboard through core/run.py, transformers'
Trainer with grouped_mm experts, padded (8 samples) and packed (8 samples in one row).

gpu: TFLOP/s of the grouped products (forward, dgrad, wgrad), and tokens/s and MFU of training steps
in bfloat16, with the router's own routing and with a balanced one that is forced, said so in the
table. MFU counts the parameters a token passes and causal attention, no recomputation, against the
dense peak given by --peak-tflops.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bench_end_to_end as runs  # type: ignore[import-not-found, unused-ignore]

ROOT = Path(__file__).resolve().parents[2]
LAYER = {"hidden": 512, "experts": 64, "top_k": 8, "width": 256, "tokens": 2048}
MODEL: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "moe_intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
}
VARIANTS = ("pegboard", "padded", "packed")
LABELS = {
    "pegboard": "Pegboard, packs of 2048",
    "padded": "transformers Trainer, grouped_mm, padded, batch 8",
    "packed": "transformers Trainer, grouped_mm, packed, batch 8",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("layer", "model", "gpu"))
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=3, help="processes per variant")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--peak-tflops", type=float, default=989.4, help="dense bf16, of one device"
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--peak-of", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what == "gpu":
        bench_gpu(options.peak_tflops)
    elif options.peak_of:
        print(json.dumps(peak_of(options.peak_of, options.dtype, options.threads)))
    elif options.measure:
        measure_peer(options.only[0], options.vocab, options.measure)
    elif options.what == "layer":
        bench_layer(options.pairs, options.dtype, options.threads)
    else:
        bench_model(options)


def stamp(threads: int, load_before: float) -> str:
    return (
        f"\n{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, {threads} threads of "
        f"{os.cpu_count()} CPUs, load {load_before:.1f} before and {os.getloadavg()[0]:.1f} after; "
        f"{runs.versions()}"
    )


# One layer ----------------------------------------------------------------------------------------


def make_layers(dtype_name: str) -> dict[str, Callable[[], None]]:
    """Forward and backward of the same layer, ours and transformers', by name."""
    import torch
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    from pegboard_plugins.blocks.experts import Experts
    from pegboard_plugins.blocks.router import SoftmaxRouter
    from pegboard_plugins.blocks.sparse_feed_forward import SparseFeedForward

    dtype = getattr(torch, dtype_name)
    hidden, experts, top_k = LAYER["hidden"], LAYER["experts"], LAYER["top_k"]
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=hidden,
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=LAYER["width"],
        norm_topk_prob=True,
    )
    config._experts_implementation = "grouped_mm"
    theirs = Qwen3MoeSparseMoeBlock(config)
    ours = SparseFeedForward(
        SoftmaxRouter(hidden, experts, top_k, norm_topk_prob=True),
        Experts(hidden, LAYER["width"], experts),
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.02)
        named = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            parameter.copy_(named[name])
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    states = torch.randn(LAYER["tokens"], hidden).to(dtype)
    leaves = {name: states.clone().requires_grad_() for name in ("ours", "theirs")}
    push = torch.randn_like(states)

    def run_ours() -> None:
        out, _ = ours(leaves["ours"])
        torch.autograd.backward(out, push)
        clear(ours, leaves["ours"])

    def run_theirs() -> None:
        out = theirs(leaves["theirs"][None])[0]
        torch.autograd.backward(out, push)
        clear(theirs, leaves["theirs"])

    def clear(module: Any, leaf: Any) -> None:
        leaf.grad = None
        for parameter in module.parameters():
            parameter.grad = None

    with torch.no_grad():
        expected = theirs(states[None])[0]
        difference = float((ours(states)[0] - expected).norm() / expected.norm())
    # In bfloat16 transformers' router rounds its logits, and some tokens choose otherwise.
    assert difference <= (1e-5 if dtype == torch.float32 else 5e-2), f"not the same: {difference}"
    return {"ours": run_ours, "theirs": run_theirs}


def bench_layer(pairs: int, dtype: str, threads: int) -> None:
    import torch

    load = os.getloadavg()[0]
    peaks = {name: peak_in_process(name, dtype, threads) for name in ("ours", "theirs")}
    torch.set_num_threads(threads)
    layers = make_layers(dtype)
    for run in layers.values():
        run()
    times: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
    for number in range(pairs):
        for name in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
            wall, cpu = time.perf_counter(), time.process_time()
            layers[name]()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    print(
        f"| one layer, {dtype}, forward and backward | wall s | CPU s | peak MiB |\n|---|---|---|---|"
    )
    for name, label in (("ours", "Pegboard"), ("theirs", "transformers, grouped_mm")):
        wall, cpu = (statistics.median(one[i] for one in times[name]) for i in (0, 1))
        print(f"| {label} | {wall:.3f} | {cpu:.3f} | {peaks[name]:.0f} |")
    both = list(zip(times["ours"], times["theirs"], strict=True))
    ratios = [statistics.median(a[i] / b[i] for a, b in both) for i in (0, 1)]
    print(
        f"| ratio, median of {pairs} pairs | {ratios[0]:.2f} | {ratios[1]:.2f} "
        f"| {peaks['ours'] / peaks['theirs']:.2f} |"
    )
    print(stamp(threads, load))


def peak_in_process(name: str, dtype: str, threads: int) -> float:
    command = [sys.executable, __file__, "layer", "--peak-of", name, "--dtype", dtype]
    command += ["--threads", str(threads)]
    done = subprocess.run(
        command, env=environment(threads), capture_output=True, text=True, check=True
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def peak_of(name: str, dtype: str, threads: int) -> float:
    import torch

    torch.set_num_threads(threads)
    run = make_layers(dtype)[name]
    run()
    Path("/proc/self/clear_refs").write_text("5")
    before = runs.memory_mib("VmRSS")
    for _ in range(3):
        run()
    return float(runs.memory_mib("VmHWM") - before)


def environment(threads: int) -> dict[str, str]:
    here = Path(__file__).resolve().parent
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "core"), str(ROOT / "plugins"), str(here)]),
        "OMP_WAIT_POLICY": "PASSIVE",
        # Fixed: left to itself, glibc keeps freed blocks, and peaks differ from run to run.
        "MALLOC_MMAP_THRESHOLD_": str(2**20),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


# Whole runs ---------------------------------------------------------------------------------------


def bench_model(options: argparse.Namespace) -> None:
    load = os.getloadavg()[0]
    results: dict[str, list[dict[str, float]]] = {variant: [] for variant in options.only}
    with tempfile.TemporaryDirectory() as name:
        runs.write_samples(Path(name) / "samples.npz", options.samples, 1.0)
        for number in range(options.rounds):
            for variant in options.only:
                folder = Path(name) / f"{variant}_{number}"
                folder.mkdir()
                results[variant].append(run_process(variant, folder, options))
    print(
        "| | tokens/s | tokens/CPU s | peak MiB | loss | wall x | CPU x |\n|---|---|---|---|---|---|---|"
    )
    medians = {
        variant: {key: statistics.median(one[key] for one in found) for key in found[0]}
        for variant, found in results.items()
    }
    ours = medians.get("pegboard")
    for variant, median in medians.items():
        ratios = [
            f"{ours[key] / median[key]:.2f}x" if ours else "-"
            for key in ("tokens_per_s", "tokens_per_cpu_s")
        ]
        print(
            f"| {LABELS[variant]} | {median['tokens_per_s']:.0f} | {median['tokens_per_cpu_s']:.0f} "
            f"| {median['peak_mib']:.0f} | {median['last_loss']:.2f} | {' | '.join(ratios)} |"
        )
    print(f"\nvocabulary {options.vocab}, {options.samples} samples, median of {options.rounds}")
    print(stamp(options.threads, load))


def run_process(variant: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    result = folder / "meter.json"
    if variant == "pegboard":
        command = runs.pegboard_command(folder, result)
        file = folder / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        config["model"] = {"class_name": "Qwen3MoE", **MODEL, "vocab_size": options.vocab}
        file.write_text(json.dumps(config), encoding="utf-8")
    else:
        command = [sys.executable, __file__, "model", "--only", variant]
        command += ["--vocab", str(options.vocab), "--measure", str(result)]
    done = subprocess.run(
        command, env=environment(options.threads), cwd=folder, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"{variant} failed:\n{done.stdout[-2000:]}\n{done.stderr[-5000:]}")
    measured: dict[str, float] = json.loads(result.read_text())
    return measured


def measure_peer(variant: str, vocab: int, result: Path) -> None:
    """Train with transformers and write what the meter saw."""
    import torch
    import transformers

    meter, tokens_of_batches = runs.Meter(), list[int]()

    class Metering(transformers.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            meter.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            meter.step_ended(tokens_of_batches[len(meter.ends)])

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            meter.last_loss = float(kwargs["logs"].get("loss", meter.last_loss))

    def pack(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        ids = [torch.tensor(example["input_ids"]) for example in examples]
        labels = [torch.tensor(example["labels"]) for example in examples]
        for one in labels:
            one[0] = -100  # nothing predicts a sample's first token
        return {
            "input_ids": torch.cat(ids)[None],
            "labels": torch.cat(labels)[None],
            "position_ids": torch.cat([torch.arange(len(one)) for one in ids])[None],
        }

    torch.manual_seed(0)
    samples = runs.load_samples(result.parent.parent / "samples.npz")
    config = transformers.Qwen3MoeConfig(
        **{**MODEL, "vocab_size": vocab},
        max_position_embeddings=runs.MAX_LENGTH,
        use_cache=False,
        output_router_logits=True,  # the balancing loss, as ours
    )
    model = transformers.Qwen3MoeForCausalLM._from_config(
        config, experts_implementation="grouped_mm"
    )
    assert model.config._experts_implementation == "grouped_mm"
    shared: dict[str, Any] = {
        "output_dir": str(result.parent / "out"),
        "num_train_epochs": 1,
        "learning_rate": runs.LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
    }
    trainer = runs.make_padded_trainer(model, samples, shared)
    if variant == "packed":
        trainer.data_collator = pack
    collate = trainer.data_collator

    def collate_and_count(examples: Any) -> Any:
        tokens_of_batches.append(sum(len(example["input_ids"]) for example in examples))
        return collate(examples)

    trainer.data_collator = collate_and_count
    trainer.add_callback(Metering())
    trainer.train()
    meter.write(result)


# CUDA ---------------------------------------------------------------------------------------------

SHAPES: dict[str, dict[str, Any]] = {
    "M1: Qwen3-30B-A3B shape, 4 layers": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
    "M2: hidden 1024, 24 layers, 48 experts": {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 48,
        "num_experts_per_tok": 4,
    },
}
PACK, DOCUMENT = 16384, 2048


def bench_gpu(peak_tflops: float) -> None:
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: nothing measured")
    print(
        "| grouped products, bf16, 16,384 tokens | forward | dgrad | wgrad | (TFLOP/s)\n|---|---|---|---|---|"
    )
    for label, shape in SHAPES.items():
        print(f"| {label} | {' | '.join(f'{v:.0f}' for v in product_tflops(shape))} | |")
    print(
        "\n| training step, bf16, 16,384 tokens of 2,048 each | routing | tokens/s | MFU | peak GiB |"
    )
    print("|---|---|---|---|---|")
    for label, shape in SHAPES.items():
        for forced in (False, True):
            rate, gib = training_rate(shape, forced)
            mfu = rate * flops_per_token(shape) / (peak_tflops * 1e12)
            routing = "forced balanced" if forced else "the router's"
            print(f"| {label} | {routing} | {rate:.0f} | {mfu:.1%} | {gib:.1f} |", flush=True)
    print(
        f"\n{torch.cuda.get_device_name()}, peak taken as {peak_tflops} TFLOP/s; {runs.versions()}"
    )


def product_tflops(shape: dict[str, Any]) -> list[float]:
    """Of forward, dgrad and wgrad of the gate and up product, tokens spread evenly."""
    import torch

    from pegboard_plugins.blocks.grouped_gemm import TORCH_GROUPED_MM

    experts, hidden = shape["num_experts"], shape["hidden_size"]
    wide, rows = 2 * shape["moe_intermediate_size"], PACK * shape["num_experts_per_tok"]
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    x, y = torch.randn(rows, hidden, **options), torch.randn(rows, wide, **options)
    weight = torch.randn(experts, wide, hidden, **options)
    ends = torch.arange(1, experts + 1, device="cuda", dtype=torch.int32) * (rows // experts)
    products: list[Callable[[], Any]] = [
        lambda: TORCH_GROUPED_MM.rows(x, weight.transpose(1, 2), ends),
        lambda: TORCH_GROUPED_MM.rows(y, weight, ends),
        lambda: TORCH_GROUPED_MM.weights(y, x, ends),
    ]
    return [2 * rows * hidden * wide / cuda_seconds(product) / 1e12 for product in products]


def cuda_seconds(call: Callable[[], Any], warmup: int = 5, rounds: int = 10) -> float:
    import torch

    times = []
    for number in range(warmup + rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if number >= warmup:
            times.append(begin.elapsed_time(end) / 1e3)
    return float(statistics.median(times))


def flops_per_token(shape: dict[str, Any]) -> float:
    """Forward and backward: 6 per parameter passed (embedding left out), and causal attention."""
    hidden, heads, head_dim = (
        shape[name] for name in ("hidden_size", "num_attention_heads", "head_dim")
    )
    attention = hidden * head_dim * (2 * heads + 2 * shape["num_key_value_heads"])
    experts = 3 * hidden * shape["moe_intermediate_size"] * shape["num_experts_per_tok"]
    layer = attention + experts + hidden * shape["num_experts"]
    scores = 6 * heads * head_dim * DOCUMENT  # 12 * T, halved: causal
    return float(
        6 * (shape["num_hidden_layers"] * layer + hidden * shape["vocab_size"])
        + shape["num_hidden_layers"] * scores
    )


def training_rate(
    shape: dict[str, Any], forced: bool, device: str = "cuda", pack: int = PACK
) -> tuple[float, float]:
    """(tokens/s, peak GiB) of forward, backward and AdamW on random tokens."""
    import torch
    from torch import Tensor, nn

    from pegboard.contracts import Batch, Targets
    from pegboard.initialization import init_module_weights
    from pegboard_plugins.blocks.router import Routing
    from pegboard_plugins.losses.chunked_cross_entropy import ChunkedCrossEntropyLoss
    from pegboard_plugins.qwen3_moe.component import Qwen3MoE

    class RoundRobin(nn.Module):
        """The wrapped router's weights, on experts that take turns."""

        def __init__(self, router: nn.Module, num_experts: int) -> None:
            super().__init__()
            self.router, self.num_experts = router, num_experts

        def forward(self, hidden_TD: Tensor) -> Routing:
            routing: Routing = self.router(hidden_TD)
            shape = routing.expert_ids_TK.shape
            turns = torch.arange(shape[0] * shape[1], device=hidden_TD.device) % self.num_experts
            return routing._replace(expert_ids_TK=turns.view(shape))

    with torch.device("meta"):
        built = Qwen3MoE(Qwen3MoE.Config(**shape)).build()
    module = built.module.to_empty(device=device)
    init_module_weights(module, seed=0)
    module = module.bfloat16()
    if forced:
        layers: Any = module.get_submodule("model.layers")
        for layer in layers:
            layer.mlp.gate = RoundRobin(layer.mlp.gate, shape["num_experts"])
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    loss = ChunkedCrossEntropyLoss(chunk_size=1024)
    count = pack // DOCUMENT
    ids = torch.randint(0, shape["vocab_size"], (pack,), device=device)
    places = torch.arange(pack, device=device).view(count, DOCUMENT)[:, :-1].reshape(-1)
    batch = Batch(
        input_ids_T=ids,
        position_ids_T=torch.arange(DOCUMENT, device=device).repeat(count),
        cu_seqlens=torch.arange(0, pack + 1, DOCUMENT, device=device, dtype=torch.int32),
        max_seqlen=DOCUMENT,
        targets=Targets(
            places,
            ids[places + 1],
            torch.ones(len(places), device=device),
            torch.zeros_like(places),
            1 / len(places),
        ),
        num_tokens=pack,
        scales={"tokens": 1 / pack},
    )

    def step() -> None:
        module(batch, loss).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if device == "cpu":  # to try this script out where there is no other
        begin = time.perf_counter()
        step()
        return pack / (time.perf_counter() - begin), 0.0
    torch.cuda.reset_peak_memory_stats()
    seconds = cuda_seconds(step)
    peak = torch.cuda.max_memory_allocated() / 2**30

    torch.cuda.empty_cache()
    return pack / seconds, peak


if __name__ == "__main__":
    main()
