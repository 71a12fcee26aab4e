"""Each hook has a page that says what the code does; the pages' examples together are a run that trains."""

from __future__ import annotations

import csv
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pegboard import RecordChat, hookspecs
from pegboard.component import COMPONENT_KINDS
from pegboard.plugin_manager import load_plugins

ROOT = Path(__file__).resolve().parents[1]
INDEX = ROOT / "docs" / "hooks.md"
HOOKS = [name for name in vars(hookspecs) if name.startswith("register_")]


def page(hook: str) -> str:
    return (ROOT / "docs" / "hooks" / f"{hook}.md").read_text(encoding="utf-8")


def example(hook: str) -> str:
    block: str = re.findall(r"```python\n(.*?)```", page(hook), flags=re.DOTALL)[-1]
    return block


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every page's example as a file of its own."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    files = []
    for hook in HOOKS:
        file = tmp_path / f"page_of_{hook}.py"
        file.write_text(example(hook), encoding="utf-8")
        files.append(file)
        monkeypatch.delitem(sys.modules, file.stem, raising=False)
    return files


def test_every_hook_has_a_page_and_every_page_a_hook() -> None:
    pages = {path.stem for path in (ROOT / "docs" / "hooks").iterdir()}
    assert pages == set(HOOKS)


def test_hooks_are_listed_in_call_order() -> None:
    listed = re.findall(
        r"^\| \[`(register_\w+)`\]\(hooks/\1\.md\)", INDEX.read_text(), re.MULTILINE
    )
    assert listed == HOOKS


@pytest.mark.parametrize("hook", HOOKS)
def test_a_page_has_the_signature_the_arguments_the_return_and_an_example(hook: str) -> None:
    text = page(hook)
    assert text.startswith(f"# {hook}\n")
    signature, *examples = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    function = getattr(hookspecs, hook)
    (annotation,) = [p.annotation for p in inspect.signature(function).parameters.values()]
    assert signature.strip() == f"def {hook}(register: {annotation}) -> None"
    for argument in inspect.signature(function).parameters:
        assert f"- `{argument}`:" in text
    assert "- returns nothing" in text
    assert f"@pegboard.hookimpl\ndef {hook}(register)" in examples[-1]


def test_the_list_says_section_and_base_class_as_the_code_does() -> None:
    for kind in COMPONENT_KINDS.values():
        row = f"| [`{kind.hook}`](hooks/{kind.hook}.md) | "
        (line,) = [line for line in INDEX.read_text().splitlines() if line.startswith(row)]
        sections = re.findall(r"`([^`]+)`", line)
        assert kind.base.__name__ in sections
        assert any(part in sections for part in kind.section.split(", "))


def test_each_example_registers_under_its_hook(examples: list[Path]) -> None:
    plugins = load_plugins(extra_files=examples, third_party=False)
    assert plugins.warnings == ()
    offered = {(entry.plugin, entry.kind) for entry in plugins.registry.entries()}
    for kind, entry in COMPONENT_KINDS.items():
        assert (f"page_of_{entry.hook}", kind) in offered


def test_the_record_format_reads_the_records_it_accepts(examples: list[Path]) -> None:
    registry = load_plugins(extra_files=examples, third_party=False).registry
    component: Any = registry.find("record_format", "QuizFormat")
    built = component(component.Config()).build()
    record = {"quiz": ["who?", "me"]}
    assert built.accepts(record) and not built.accepts({"messages": []})
    content = built.read(record)
    assert isinstance(content, RecordChat)
    assert [message["content"] for message in content.messages] == ["who?", "me"]


def test_the_examples_together_are_a_run_that_trains(examples: list[Path], tmp_path: Path) -> None:
    config = {
        "work_dir": str(tmp_path / "runs"),
        "run_name": "run",
        "tokenizer": {"class_name": "Letters", "alphabet": "0123456789+="},
        "model": {"class_name": "Bigram", "vocab_size": 13},
        "transforms": [{"class_name": "FreezeEmbedding"}],
        "datasets": [
            {
                "dataset": {"class_name": "Sums", "name": "sums"},
                "tokenize_fn": {"class_name": "AnswerOnly", "max_length": 16},
            }
        ],
        "dataloader": {
            "pack_max_length": 16,
            "packer": {"class_name": "PairPacker"},
            "collator": {"class_name": "PlainCollator"},
        },
        "loss": {"class_name": "SmoothedCrossEntropy"},
        "optimizer": {"class_name": "PlainSGD", "lr": 5.0},
        "lr_schedule": {"class_name": "HalfWay", "share": 0.5},
        "savers": [{"class_name": "NormSaver"}],
        "trackers": [{"class_name": "CsvTracker"}],
        "callbacks": [{"class_name": "LowestLoss"}],
        "global_batch_size": 10,
        "epoch_num": 4,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    plugins = [word for file in examples for word in ("--plugin", str(file))]

    def pegboard(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "pegboard", *words, "--no-third-party", *plugins],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert pegboard("count", str(path)) == "1\n"
    pegboard("train", str(path))
    run = tmp_path / "runs" / "run"
    with open(run / "loss.csv", newline="") as file:
        losses = [float(loss) for _, loss in csv.reader(file)]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses == [line["loss"] for line in metrics]
    assert losses[-1] < losses[0]
    assert [line["lr"] for line in metrics][:: len(metrics) - 1] == [5.0, 2.5]
    lowest = json.loads((run / "lowest.json").read_text())
    assert lowest == {"loss": min(losses), "step": losses.index(min(losses)) + 1}
    norms = json.loads((run / "norms.json").read_text())
    assert norms["step"] == len(metrics) == 20
    assert norms["norms"].keys() == {"embed_tokens.weight", "lm_head.weight"}
