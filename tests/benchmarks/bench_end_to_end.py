"""Speed and memory of whole runs: Pegboard, TRL's SFTTrainer, transformers' Trainer; a markdown table.

    python tests/benchmarks/bench_end_to_end.py --rounds 3

Needs `pip install ".[bench]"` and Linux. All train the same small Qwen3 from scratch in float32 on
the same synthetic chats, as their users would: Pegboard through core/run.py with a JSON config and
a one-file plugin, TRL with packing (bfd), transformers with padded batches of eight samples.

Every measurement is a process of its own; variants are interleaved and the median is shown. Tokens
are real ones (no padding). The first step is left out; a step lasts from the end of the one before
to its own end, so data loading and logging count. Peak is VmHWM, reset by writing 5 to
/proc/self/clear_refs once model and optimizer stand, minus RSS at that point. CPU time is what to
compare on a busy machine. Samples are the same, but not which of them share a step.
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
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["Meter", "load_samples", "main"]

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = ("pegboard", "trl", "transformers")
LABELS = {
    "pegboard": "Pegboard, packs of 2048",
    "trl": "TRL SFTTrainer, packing bfd, 2048",
    "transformers": "transformers Trainer, padded, batch 8",
}
MODEL: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": True,
}
MAX_LENGTH = 2048
MEAN_LENGTH = 250
LEARNING_RATE = 1e-4
PLUGIN = '''
"""Samples that are tokenized already, and a meter."""

from bench_end_to_end import Meter, load_samples
from pydantic import Field

import pegboard


class Samples:
    def __init__(self, name, path):
        self.name, self.path, self.samples = name, path, load_samples(path)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        input_ids, loss_mask = self.samples[index]
        return {"input_ids": input_ids, "loss_mask": loss_mask}

    def key(self, index):
        return pegboard.SampleKey(self.name, self.path, index + 1)

    def fingerprint(self):
        return None


class SamplesDataset(pegboard.DatasetComponent):
    """Samples of a .npz file."""

    class Config(pegboard.ComponentConfig):
        path: str = Field(description="The file.")

    config: Config

    def build(self, name):
        return Samples(name, self.config.path)


class AsTheyAre:
    def __init__(self, max_length):
        self.max_length = max_length

    def __call__(self, record):
        return [pegboard.Example(**record)]

    def take_counts(self):
        return {}

    def fingerprint(self):
        return "as they are"


class AsTheyAreTokenizeFn(pegboard.TokenizeFnComponent):
    """Takes ids and mask as they are."""

    class Config(pegboard.ComponentConfig):
        max_length: int = Field(description="Longest sample.")

    config: Config

    def build(self, tokenizer, model):
        return AsTheyAre(self.config.max_length)


class MeteredSchedule(pegboard.LRScheduleComponent):
    """A constant rate; built last before the first step, which is when the meter starts."""

    def build(self, total_steps):
        METER.start()
        return lambda step, base_lr: base_lr


class MeterTracker(pegboard.TrackerComponent):
    """Writes what the meter saw."""

    class Config(pegboard.ComponentConfig):
        path: str = Field(description="Where to.")

    config: Config

    def build(self, run_dir):
        return self

    def log(self, step, metrics):
        METER.step_ended(metrics["tokens"], metrics["loss"])

    def close(self):
        METER.write(self.config.path)


METER = Meter()


@pegboard.hookimpl
def register_datasets(register):
    register(SamplesDataset)


@pegboard.hookimpl
def register_tokenize_fns(register):
    register(AsTheyAreTokenizeFn)


@pegboard.hookimpl
def register_lr_schedules(register):
    register(MeteredSchedule)


@pegboard.hookimpl
def register_trackers(register):
    register(MeterTracker)
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=3, help="processes per variant")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument(
        "--sigma", type=float, default=1.0, help="spread of the lengths: more costs padding more"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure_peer(options.only[0], options.measure)
        return
    results: dict[str, list[dict[str, float]]] = {variant: [] for variant in options.only}
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        write_samples(Path(name) / "samples.npz", options.samples, options.sigma)
        for number in range(options.rounds):
            for variant in options.only:
                folder = Path(name) / f"{variant}_{number}"
                folder.mkdir()
                results[variant].append(run_process(variant, folder, options.threads))
    print_table(results)
    print(
        f"\n{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}, median of {options.rounds}, "
        f"{options.samples} samples of sigma {options.sigma}, {options.threads} threads of {os.cpu_count()} CPUs, "
        f"load {load_before:.1f} before and {os.getloadavg()[0]:.1f} after; {versions()}"
    )


def print_table(results: dict[str, list[dict[str, float]]]) -> None:
    print("| | tokens/s | tokens/CPU s | peak MiB | wall x | CPU x | memory x | steps | loss |")
    print("|---|---|---|---|---|---|---|---|---|")
    medians = {
        variant: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for variant, runs in results.items()
    }
    ours = medians.get("pegboard")
    for variant, median in medians.items():
        ratios = ["-"] * 3
        if ours:
            ratios = [
                f"{ours['tokens_per_s'] / median['tokens_per_s']:.2f}x",
                f"{ours['tokens_per_cpu_s'] / median['tokens_per_cpu_s']:.2f}x",
                f"{ours['peak_mib'] / median['peak_mib']:.2f}x",
            ]
        print(
            f"| {LABELS[variant]} | {median['tokens_per_s']:.0f} "
            f"| {median['tokens_per_cpu_s']:.0f} | {median['peak_mib']:.0f} "
            f"| {' | '.join(ratios)} | {median['steps']:.0f} | {median['last_loss']:.2f} |",
            flush=True,
        )
    if ours:
        print("\nRatios are Pegboard's figure divided by the row's.")


def versions() -> str:
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in ("torch", "transformers", "trl"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def run_process(variant: str, folder: Path, threads: int) -> dict[str, float]:
    """One measurement: `tokens_per_s`, `tokens_per_cpu_s`, `peak_mib`, `steps`, `last_loss`."""
    result = folder / "meter.json"
    if variant == "pegboard":
        command = pegboard_command(folder, result)
    else:
        command = [sys.executable, __file__, "--only", variant, "--measure", str(result)]
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(ROOT / "core"), str(ROOT / "plugins"), str(here)])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{variant} failed:\n{done.stdout[-2000:]}\n{done.stderr[-5000:]}")
    measured: dict[str, float] = json.loads(result.read_text())
    if variant == "pegboard":
        check_against_metrics(measured, folder / "run" / "metrics.jsonl")
    return measured


def pegboard_command(folder: Path, result: Path) -> list[str]:
    """Write plugin and config to `folder`; the command that trains with them."""
    plugin = folder / "measured_samples.py"
    plugin.write_text(PLUGIN, encoding="utf-8")
    config = {
        "work_dir": str(folder),
        "run_name": "run",
        "tokenizer": {"class_name": "ByteTokenizer"},
        "model": {"class_name": "Qwen3", **MODEL},
        "datasets": [
            {
                "dataset": {
                    "class_name": "SamplesDataset",
                    "path": str(folder.parent / "samples.npz"),
                },
                "tokenize_fn": {"class_name": "AsTheyAreTokenizeFn", "max_length": MAX_LENGTH},
            }
        ],
        "dataloader": {"pack_max_length": MAX_LENGTH},
        "optimizer": {"class_name": "AdamW", "lr": LEARNING_RATE},
        "lr_schedule": {"class_name": "MeteredSchedule"},
        "trackers": [{"class_name": "MeterTracker", "path": str(result)}],
        "epoch_num": 1,
        "precision": {"compute_dtype": "float32"},
        "savers": [],
    }
    file = folder / "config.json"
    file.write_text(json.dumps(config, indent=1), encoding="utf-8")
    run = str(ROOT / "core" / "run.py")
    return [sys.executable, run, "train", str(file), "--plugin", str(plugin)]


def check_against_metrics(measured: dict[str, float], file: Path) -> None:
    """The run's own metrics.jsonl must tell the same tokens, in no more time than the meter saw."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()][1:]
    tokens, seconds = (sum(line[key] for line in lines) for key in ("tokens", "step_s"))
    if tokens != measured["tokens"] or seconds > measured["wall_s"] * 1.01:
        raise SystemExit(f"{file}: {tokens} tokens in {seconds} s, the meter saw {measured}")


def measure_peer(variant: str, result: Path) -> None:
    """Train with transformers or TRL and write what the meter saw."""
    import torch
    import transformers

    class Metering(transformers.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            meter.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # The n-th batch that was made is that of step n, also where one is made ahead.
            meter.step_ended(tokens_of_batches[len(meter.ends)])

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            meter.last_loss = float(kwargs["logs"].get("loss", meter.last_loss))

    def counted(collate: Any) -> Any:
        def collate_and_count(examples: Any) -> Any:
            batch = collate(examples)
            mask = batch.get("attention_mask")
            tokens = batch["input_ids"].numel() if mask is None else int(mask.sum())
            tokens_of_batches.append(tokens)
            return batch

        return collate_and_count

    meter, tokens_of_batches = Meter(), list[int]()
    torch.manual_seed(0)
    transformers.set_seed(0)
    samples = load_samples(result.parent.parent / "samples.npz")
    config = transformers.Qwen3Config(**MODEL, max_position_embeddings=MAX_LENGTH, use_cache=False)
    model = transformers.Qwen3ForCausalLM(config)
    shared: dict[str, Any] = {
        "output_dir": str(result.parent / "out"),
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
    }
    make = make_trl_trainer if variant == "trl" else make_padded_trainer
    trainer = make(model, samples, shared)
    trainer.data_collator = counted(trainer.data_collator)
    trainer.add_callback(Metering())
    trainer.train()
    meter.write(result)


def make_padded_trainer(model: Any, samples: Sequence[Any], shared: dict[str, Any]) -> Any:
    import torch
    import transformers
    from torch.nn.utils.rnn import pad_sequence

    def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        ids = [torch.tensor(example["input_ids"]) for example in examples]
        labels = [torch.tensor(example["labels"]) for example in examples]
        return {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        }

    arguments = transformers.TrainingArguments(per_device_train_batch_size=8, **shared)
    dataset: Any = [
        {"input_ids": ids.astype("int64"), "labels": labels_of(ids, mask)} for ids, mask in samples
    ]
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=dataset, data_collator=collate
    )


def make_trl_trainer(model: Any, samples: Sequence[Any], shared: dict[str, Any]) -> Any:
    import tokenizers
    import transformers

    # By name: the type checker runs where these two are not installed.
    datasets, trl = import_module("datasets"), import_module("trl")
    # SFTTrainer wants a tokenizer, for its end and padding tokens only.
    words = tokenizers.models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), pad_token="<pad>", eos_token="<eos>"
    )
    rows = [
        {"input_ids": ids.tolist(), "completion_mask": mask.astype("int64").tolist()}
        for ids, mask in samples
    ]
    arguments = trl.SFTConfig(
        per_device_train_batch_size=1,
        packing=True,
        packing_strategy="bfd",
        max_length=MAX_LENGTH,
        completion_only_loss=True,
        gradient_checkpointing=False,  # the others keep their activations too
        **shared,
    )
    return trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def labels_of(ids: Any, mask: Any) -> Any:
    labels = ids.astype("int64")
    labels[~mask] = -100
    return labels


def write_samples(path: Path, count: int, sigma: float) -> None:
    """Random tokens, lengths lognormal up to MAX_LENGTH, about half of each a masked prompt."""
    import numpy as np

    rng = np.random.default_rng(0)
    drawn = rng.lognormal(np.log(MEAN_LENGTH) - sigma**2 / 2, sigma, count)
    lengths = np.clip(drawn.astype(np.int64), 16, MAX_LENGTH)
    prompts = (lengths * rng.uniform(0.3, 0.7, count)).astype(np.int64)
    ids = rng.integers(2, MODEL["vocab_size"], int(lengths.sum()), dtype=np.int32)
    np.savez(path, lengths=lengths, prompts=prompts, ids=ids)


def load_samples(path: str | Path) -> list[tuple[Any, Any]]:
    """(input_ids int32, loss_mask bool) of each sample."""
    import numpy as np

    with np.load(path) as file:
        lengths, prompts, ids = file["lengths"], file["prompts"], file["ids"]
    samples = []
    for part, prompt in zip(np.split(ids, np.cumsum(lengths)[:-1]), prompts, strict=True):
        samples.append((part.copy(), np.arange(len(part)) >= prompt))
    return samples


class Meter:
    """Clocks and memory of this process, from step to step."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float, float]] = []
        """(wall clock, CPU clock, tokens) at the end of each step."""
        self.last_loss = float("nan")
        self._rss_mib = 0.0

    def start(self) -> None:
        """Call when model and optimizer stand, before the first step."""
        Path("/proc/self/clear_refs").write_text("5")
        self._rss_mib = memory_mib("VmRSS")

    def step_ended(self, tokens: float, loss: float | None = None) -> None:
        """Call at the end of each step with its real tokens."""
        self.ends.append((time.perf_counter(), time.process_time(), tokens))
        self.last_loss = self.last_loss if loss is None else loss

    def write(self, path: str | Path) -> None:
        """Write the figures as JSON."""
        (wall, cpu, _), (wall_end, cpu_end, _) = self.ends[0], self.ends[-1]
        tokens = sum(tokens for _, _, tokens in self.ends[1:])
        figures = {
            "tokens": tokens,
            "wall_s": wall_end - wall,
            "tokens_per_s": tokens / (wall_end - wall),
            "tokens_per_cpu_s": tokens / (cpu_end - cpu),
            "peak_mib": memory_mib("VmHWM") - self._rss_mib,
            "steps": len(self.ends),
            "last_loss": self.last_loss,
        }
        Path(path).write_text(json.dumps(figures), encoding="utf-8")


def memory_mib(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


if __name__ == "__main__":
    main()
