"""Memory and time of the two losses and of logits for every position; prints a markdown table.

    python tests/benchmarks/bench_chunked_loss.py --case memory_fp32 --repeats 3

Every measurement is a process of its own; variants are interleaved and the median is shown. Peak
is VmHWM, reset by writing 5 to /proc/self/clear_refs, minus RSS at that point: what forward and
backward need beyond their inputs (Linux only). Half of the positions have a label.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[2]


class Case(NamedTuple):
    tokens: int
    vocab_size: int
    hidden_size: int
    dtype: str


CASES = {
    "small": Case(256, 4096, 64, "float32"),
    "memory_fp32": Case(4096, 151936, 64, "float32"),
    "memory_bf16": Case(4096, 151936, 1024, "bfloat16"),
    "time_fp32": Case(1024, 32768, 1024, "float32"),
    "time_bf16": Case(1024, 32768, 1024, "bfloat16"),
}
VARIANTS = ("all_positions", "CrossEntropy", "ChunkedCrossEntropy")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=["small"])
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--chunk-size", type=int, help="rows per chunk; auto without")
    parser.add_argument("--repeats", type=int, default=3, help="processes per case and variant")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measured = measure(CASES[options.case[0]], options.variant[0], options.chunk_size)
        print(json.dumps(measured))
        return
    print("| case | variant | loss | peak MiB | wall s | CPU s | wall ratio | CPU ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for case in options.case:
        print_case(case, options)


def print_case(case: str, options: argparse.Namespace) -> None:
    results: dict[str, list[dict[str, float]]] = {variant: [] for variant in options.variant}
    for _ in range(options.repeats):
        for variant in options.variant:
            results[variant].append(run_process(case, variant, options.chunk_size))
    base: dict[str, float] = {}
    for variant, runs in results.items():
        median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        if variant == "all_positions":
            base = median
        ratios = [f"{median[key] / base[key]:.2f}" if base else "-" for key in ("wall", "cpu")]
        print(
            f"| {case} | {variant} | {median['loss']:.5f} | {median['peak']:.0f} "
            f"| {median['wall']:.3f} | {median['cpu']:.2f} | {' | '.join(ratios)} |",
            flush=True,
        )


def run_process(case: str, variant: str, chunk_size: int | None) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", "--case", case, "--variant", variant]
    if chunk_size is not None:
        command += ["--chunk-size", str(chunk_size)]
    path = os.pathsep.join([str(ROOT / "core"), str(ROOT / "plugins")])
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def measure(case: Case, variant: str, chunk_size: int | None) -> dict[str, float]:
    import torch
    import torch.nn.functional as F

    from pegboard import Head, Targets

    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    hidden_TD = torch.randn(case.tokens, case.hidden_size).to(dtype).requires_grad_()
    weight_VD = (torch.randn(case.vocab_size, case.hidden_size) / case.hidden_size**0.5).to(dtype)
    weight_VD.requires_grad_()
    labels_T = torch.randint(case.vocab_size, (case.tokens,))
    positions_K = torch.randperm(case.tokens)[: case.tokens // 2].sort().values
    num_labels = positions_K.numel()
    targets = Targets(
        positions_K,
        labels_T[positions_K],
        torch.ones(num_labels),
        torch.zeros_like(positions_K),
        1 / num_labels,
    )
    head = Head(weight_VD, None, lambda rows: F.linear(rows, weight_VD))
    if variant == "all_positions":
        ignored_T = torch.full_like(labels_T, -100).index_copy(
            0, positions_K, labels_T[positions_K]
        )

        def forward() -> Any:
            return F.cross_entropy(F.linear(hidden_TD, weight_VD).float(), ignored_T)
    else:
        loss_fn = make_loss(variant, chunk_size)

        def forward() -> Any:
            return loss_fn(hidden_TD, head, targets).loss

    # Thread pools and kernels start on a tiny product, not inside the measurement.
    warm = torch.ones(64, 64, dtype=dtype, requires_grad=True)
    torch.mm(warm, warm).float().sum().backward()
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_mib("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    loss = forward()
    torch.autograd.backward(loss)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"loss": loss.item(), "peak": memory_mib("VmHWM") - before, "wall": wall, "cpu": cpu}


def make_loss(variant: str, chunk_size: int | None) -> Any:
    from pegboard_plugins.losses.component import ChunkedCrossEntropy, CrossEntropy

    if variant == "CrossEntropy":
        return CrossEntropy(CrossEntropy.Config()).build()
    config = ChunkedCrossEntropy.Config(chunk_size="auto" if chunk_size is None else chunk_size)
    return ChunkedCrossEntropy(config).build()


def memory_mib(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


if __name__ == "__main__":
    main()
