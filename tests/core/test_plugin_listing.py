"""`pegboard plugins` says who implements a hook, which names are contested, and what hooks cost."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pegboard.cli import main
from pegboard.registry import HOOKS

Install = Callable[..., Path]
QUICKSTART = str(Path(__file__).resolve().parents[2] / "configs" / "quickstart.json")
SOUND = '''
import pegboard

class PegLoss(pegboard.LossComponent):
    """A loss."""
    def build(self):
        return None

@pegboard.hookimpl
def register_losses(register):
    register(PegLoss)
'''
MODEL = '''
import pegboard

class PegModel(pegboard.ModelComponent):
    """A model."""
    hf_model_types = ("qwen3",)
    presets = {"qwen3-0.6b": {}}
    def build(self):
        return None

@pegboard.hookimpl
def register_models(register):
    register(PegModel)
'''


def test_a_hook_is_listed_in_call_order_with_distribution_version_and_line(
    install: Install, site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = site / "peg_a.py"
    last.write_text(SOUND)
    second = install("peg-z", SOUND, version="3.1")
    install("peg-broken", SOUND + "    1 / 0\n")
    words = ["plugins", "--hook", "register_losses", "--plugin", str(last)]
    assert main([*words, "--json"]) == 0
    first, *rest = json.loads(capsys.readouterr().out)
    assert (first["plugin"], first["origin"]) == ("losses", "built-in")
    assert "ChunkedCrossEntropy" in first["offered"]
    assert rest == [
        {
            "plugin": "peg-z",
            "origin": "distribution peg-z",
            "version": "3.1",
            "place": f"{second}:9",
            "offered": ["PegLoss"],
        },
        {
            "plugin": "peg_a",
            "origin": f"file {last}",
            "version": "",
            "place": f"{last}:9",
            "offered": ["PegLoss"],
        },
    ]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert [line.split()[0] for line in captured.out.splitlines()] == ["losses", "peg-z", "peg_a"]
    assert re.search(rf"distribution peg-z 3\.1 +{re.escape(str(second))}:9 ", captured.out)
    assert "peg-broken" in captured.err


@pytest.mark.parametrize("hook", HOOKS.values())
def test_every_hook_can_be_listed(hook: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "--no-third-party", "--hook", hook]) == 0
    assert capsys.readouterr().out.strip()


def test_a_hook_that_is_not_there_is_told_with_the_near_miss(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plugins", "--no-third-party", "--hook", "register_dataset"]) == 2
    assert "there is no hook of that name. Did you mean 'register_datasets'?" in (
        capsys.readouterr().err
    )


def test_contested_names_are_listed_with_all_who_offer_them(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = install("peg-one", SOUND), install("peg-two", SOUND)
    model = install("peg-model", MODEL)
    assert main(["plugins", "--conflicts", "--json"]) == 0
    found = {
        (entry["kind"], entry["name"]): [(o["plugin"], o["place"]) for o in entry["offers"]]
        for entry in json.loads(capsys.readouterr().out)
    }
    assert found["loss", "PegLoss"] == [("peg-one", f"{one}:4"), ("peg-two", f"{two}:4")]
    assert found["model_type", "qwen3"][-1] == found["preset", "qwen3-0.6b"][-1]
    assert ("peg-model", f"{model}:4") in found["preset", "qwen3-0.6b"]
    assert len(found) == 3
    assert main(["plugins", "--conflicts"]) == 0
    text = capsys.readouterr().out
    assert "loss 'PegLoss':\n  peg-one  distribution peg-one 1.2  PegLoss" in text
    assert text.endswith("or leave one out with --block NAME\n")


def test_without_conflicts_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "--no-third-party", "--conflicts"]) == 0
    assert capsys.readouterr().out == "no name is offered by several plugins\n"
    assert main(["plugins", "--no-third-party", "--conflicts", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_the_trace_has_each_import_and_hook_call_with_what_it_offered_and_its_time(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    file = install("peg-traced", "import time; time.sleep(0.05)" + SOUND)
    install("peg-untraced", SOUND + "    raise RuntimeError\n")
    assert main(["check", QUICKSTART, "--trace-hooks"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("ok: ")
    lines = [row for row in captured.err.splitlines() if row.startswith("trace: ")]
    assert [row.split()[1:3] for row in lines if "traced" in row.split()[2]] == [
        ["import", "peg-traced"],
        ["register_losses", "peg-traced"],
        ["import", "peg-untraced"],
        ["register_losses", "peg-untraced"],
    ]
    [imported] = [row for row in lines if row.startswith("trace: import  peg-traced")]
    assert float(imported.split()[-2]) >= 50
    [called] = [row for row in lines if row.startswith("trace: register_losses  peg-traced")]
    assert re.search(rf"  {re.escape(str(file))}:9  PegLoss  \d+\.\d ms$", called)
    [failed] = [row for row in lines if row.startswith("trace: register_losses  peg-untraced")]
    assert "PegLoss  raised RuntimeError" in failed


def test_without_the_flag_nothing_is_traced(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", QUICKSTART]) == 0
    assert "trace:" not in capsys.readouterr().err
