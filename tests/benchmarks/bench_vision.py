"""Speed and memory of the vision tower, beside transformers' InternVL tower; a markdown table.

    python tests/benchmarks/bench_vision.py

Tower of 6 layers, hidden 384, 6 heads, tiles of 224 pixels (257 rows), float32, the same weights in both.
CPU seconds of `time.process_time`, medians of interleaved rounds in one process; ratios within a round.
"Kept" is what forward saves for backward, parameters apart, counted by saved_tensors_hooks.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

TILES, SIZE = 4, 224
CONFIG: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
}
NORMS: dict[str, dict[str, Any]] = {
    "LayerNorm": {"norm_type": "layer_norm", "attention_bias": True, "use_qk_norm": False},
    "RMSNorm": {"norm_type": "rms_norm", "attention_bias": False, "use_qk_norm": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]
    for norm, fields in NORMS.items():
        print(f"\n| tower with {norm}, {TILES} tiles | CPU s | x transformers | kept MiB |")
        print("|---|---|---|---|")
        runs, kept = make_runs(fields)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            run()
        for number in range(options.rounds):
            names = list(runs)
            for name in names if number % 2 else names[::-1]:
                start = time.process_time()
                runs[name]()
                times[name].append(time.process_time() - start)
        for name, seconds in times.items():
            peer = "transformers, frozen" if "frozen" in name else "transformers, trains"
            ratio = statistics.median(a / b for a, b in zip(seconds, times[peer], strict=True))
            print(
                f"| {name} | {statistics.median(seconds):.4f} | {ratio:.2f} "
                f"| {kept[name] / 2**20:.1f} |"
            )
    print(
        f"\n{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, {options.threads} thread(s) of "
        f"{os.cpu_count()} CPUs, load {load:.1f} before and {os.getloadavg()[0]:.1f} after; "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )


def make_runs(fields: dict[str, Any]) -> tuple[dict[str, Callable[[], None]], dict[str, int]]:
    """What is timed, by name, and the bytes that one forward of each keeps."""
    import torch
    from transformers import InternVLVisionConfig
    from transformers.models.internvl.modeling_internvl import InternVLVisionModel

    from pegboard.weight_export import iter_published
    from pegboard.weight_map import WeightMap
    from pegboard_plugins.blocks.vision import VisionTower
    from pegboard_plugins.blocks.vision_config import VisionConfig

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"image_size": SIZE, "patch_size": 14}
    theirs_config = InternVLVisionConfig(**CONFIG, **fields, **sizes)
    theirs_config._attn_implementation = "sdpa"
    theirs = InternVLVisionModel(theirs_config)
    config = VisionConfig.model_validate({**CONFIG, **fields, **sizes})
    ours = {ratio: VisionTower(config, recompute_ratio=ratio) for ratio in (0.0, 1.0)}
    with torch.no_grad():
        for tower in ours.values():
            for parameter in tower.parameters():
                parameter.normal_(0, 0.02)
        ours[1.0].load_state_dict(ours[0.0].state_dict())
        entries = WeightMap(tuple(ours[0.0].weight_entries("", "")))
        named = {name: p.detach() for name, p in ours[0.0].named_parameters()}
        theirs.load_state_dict(dict(iter_published(named, entries, lambda tensor: tensor)))
        pixels = torch.randn(TILES, 3, SIZE, SIZE)
        none, one = pixels[:0], pixels[:1]
        difference = (ours[0.0](pixels) - theirs(pixels).last_hidden_state).abs().max()
    assert float(difference) < 1e-4, f"not the same tower: {difference}"

    def training(module: Any, forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            torch.autograd.backward(forward().square().sum())
            for parameter in module.parameters():
                parameter.grad = None

        return run

    def frozen(forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                forward()

        return run

    def their_forward() -> torch.Tensor:
        rows: torch.Tensor = theirs(pixels).last_hidden_state
        return rows

    forwards: dict[str, tuple[Any, Callable[[], torch.Tensor], bool]] = {
        "transformers, trains": (theirs, their_forward, True),
        "transformers, frozen": (theirs, their_forward, False),
        "Pegboard, trains": (ours[0.0], lambda: ours[0.0](pixels), True),
        "Pegboard, trains, recomputing": (ours[1.0], lambda: ours[1.0](pixels), True),
        "Pegboard, frozen": (ours[0.0], lambda: ours[0.0](pixels), False),
        "no picture: on no tiles, trains": (ours[0.0], lambda: ours[0.0](none), True),
        "no picture: on no tiles, frozen": (ours[0.0], lambda: ours[0.0](none), False),
        "no picture: on a made-up tile, trains": (ours[0.0], lambda: ours[0.0](one), True),
    }
    runs, kept = {}, {}
    for name, (module, forward, trains) in forwards.items():
        runs[name] = training(module, forward) if trains else frozen(forward)
        kept[name] = bytes_kept(module, forward) if trains else 0
    return runs, kept


def bytes_kept(module: Any, forward: Callable[[], Any]) -> int:
    """Bytes of activations that a forward keeps for backward, each storage once."""
    import torch

    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, tuple[Any, int]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    total = sum(size for _, size in kept.values())
    del out
    return total


if __name__ == "__main__":
    main()
