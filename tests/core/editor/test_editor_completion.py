"""An editor that knows the schema completes the classes and fields of installed parts, and says what they are.

The editor is VS Code's own JSON service, run by node; npm fetches it once into pytest's cache.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from config_mistakes import BASE, MISTAKES, with_mistake
from third_party import install_lantern_parts, written_schema

HERE = Path(__file__).resolve().parent

Editor = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Editor:
    """Asks questions of one kind about texts, beside the schema of a person who has lantern-parts."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not installed")
    cache = getattr(request.config, "cache", None)  # none with -p no:cacheprovider
    folder = cache.mkdir("editor") if cache else tmp_path_factory.mktemp("editor")
    package = (HERE / "package.json").read_text()
    installed = folder / "node_modules" / "installed_from.json"
    if not installed.is_file() or installed.read_text() != package:
        (folder / "package.json").write_text(package)
        done = subprocess.run(
            [npm, "install", "--no-package-lock", "--no-audit", "--no-fund", "--silent"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            pytest.skip(f"npm can't install the JSON service: {done.stderr.strip()[:200]}")
        installed.write_text(package)
    shutil.copy(HERE / "ask_editor.mjs", folder)
    site = tmp_path_factory.mktemp("site")
    install_lantern_parts(site)
    schema = written_schema(site)

    def ask(what: str, *texts: str) -> list[Any]:
        questions = [{"ask": what, "text": text} for text in texts]
        done = subprocess.run(
            [node, "ask_editor.mjs"],
            cwd=folder,
            input=json.dumps({"schema": schema, "questions": questions}),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        answers: list[Any] = json.loads(done.stdout)
        return answers

    return ask


def labels(items: list[dict[str, str]]) -> set[str]:
    return {item["label"].strip('"') for item in items}


def test_class_names_of_a_section_are_offered_with_their_summaries(editor: Editor) -> None:
    datasets, losses, savers = editor(
        "completions",
        '{"datasets": [{"dataset": {"class_name": "|"}}]}',
        '{"loss": {"class_name": |}}',
        '{"savers": [{"class_name": "HFSaver"}, {"class_name": "|"}]}',
    )
    assert labels(datasets) == {"JsonlDataset", "VLMJsonlDataset", "LanternDataset"}
    assert labels(losses) >= {"ChunkedCrossEntropy", "GlowLoss"}
    assert "JsonlDataset" not in labels(losses)
    assert labels(savers) >= {"CheckpointSaver", "HFSaver"}
    about = {item["label"].strip('"'): item["about"] for item in datasets}
    assert about["LanternDataset"] == "Signals that a keeper wrote down."


def test_an_empty_part_is_offered_its_class_first(editor: Editor) -> None:
    (offered,) = editor("completions", '{"loss": {|}}')
    assert labels(offered) == {"class_name"}


def test_fields_of_the_chosen_class_are_offered_and_no_others(editor: Editor) -> None:
    lantern, glow, qwen, lora = editor(
        "completions",
        '{"datasets": [{"dataset": {"class_name": "LanternDataset", "logbook": "x", |}}]}',
        '{"loss": {"class_name": "GlowLoss", "|"}}',
        '{"model": {"class_name": "InternS1", "text_config": {"class_name": "Qwen3", |}}}',
        '{"transforms": [{"class_name": "LoRA", |}]}',
    )
    assert labels(lantern) >= {"colour", "nights", "name", "sample_ratio", "on_bad_record"}
    assert not labels(lantern) & {"class_name", "logbook", "anno_path", "media_root"}
    assert labels(glow) >= {"dusk"}
    assert not labels(glow) & {"colour", "chunk_size"}
    assert labels(qwen) >= {"hidden_size", "num_hidden_layers", "preset"}
    assert labels(lora) >= {"rank", "alpha"}
    about = {item["label"]: item["about"] for item in lantern}
    assert about["nights"] == "Nights to read, from the last one back."


def test_values_of_a_choice_are_offered(editor: Editor) -> None:
    colours, modes, presets = editor(
        "completions",
        '{"datasets": [{"dataset": {"class_name": "LanternDataset", "colour": "|"}}]}',
        '{"activation_checkpointing": {"mode": "|"}}',
        '{"model": {"preset": "|"}}',
    )
    assert labels(colours) == {"red", "green"}
    assert labels(modes) == {"none", "full", "ratio"}
    assert labels(presets) >= {"qwen3-8b", "intern-s1-mini"}


def test_sections_of_a_run_are_offered(editor: Editor) -> None:
    (offered,) = editor("completions", '{"work_dir": "x", |}')
    assert labels(offered) >= {"model", "datasets", "dataloader", "savers", "extends", "$schema"}
    assert "work_dir" not in labels(offered)


def test_hovering_says_what_a_field_and_a_class_are(editor: Editor) -> None:
    nights, seed, loss, rank = (
        shown.replace("\\", "")  # Markdown, with its dots escaped
        for shown in editor(
            "hover",
            '{"datasets": [{"dataset": {"class_name": "LanternDataset", "nig|hts": 2}}]}',
            '{"se|ed": 2}',
            '{"loss": {"class_name": "Glow|Loss"}}',
            '{"transforms": [{"class_name": "LoRA", "ra|nk": 3}]}',
        )
    )
    assert "Nights to read, from the last one back." in nights
    assert "order of samples" in seed
    assert "Forgives what is seen at dusk." in loss
    assert "Rank of every change" in rank


def test_a_right_config_is_not_underlined_and_each_mistake_is(editor: Editor) -> None:
    wrong = [json.dumps(with_mistake(place, value), indent=1) for _, place, value in MISTAKES]
    right, *found = editor("problems", json.dumps(BASE, indent=1), *wrong)
    assert right == []
    assert [item[0] for item, problems in zip(MISTAKES, found, strict=True) if not problems] == []


def test_a_misspelt_class_is_underlined_where_it_stands(editor: Editor) -> None:
    text = json.dumps(with_mistake("datasets.1.dataset.class_name", "LanternsDataset"), indent=1)
    (found,) = editor("problems", text)
    (line,) = [n for n, one in enumerate(text.splitlines(), 1) if "LanternsDataset" in one]
    assert [problem["line"] for problem in found] == [line]
    assert '"LanternDataset"' in found[0]["message"]
