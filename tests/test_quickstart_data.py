"""The quick start's data and the documentation are what they say they are.

The data is small, valid and without repeats; every hook is documented; links lead somewhere; JSON in the
documentation parses, Python in it compiles, and the two complete plugins of the guides work.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pegboard.contracts import Dataset

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "configs" / "data" / "quickstart_chat.jsonl"
CONFIG = ROOT / "configs" / "quickstart.json"
ASK = ROOT / "docs" / "examples" / "quickstart" / "ask.py"
PAGES = sorted([ROOT / "README.md", ROOT / "configs/data/README.md", *ROOT.glob("docs/**/*.md")])
MAX_CONVERSATION_BYTES = 200

page_of = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


# The data


def conversations() -> list[list[dict[str, str]]]:
    records = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    assert all(set(record) == {"messages"} for record in records)
    return [record["messages"] for record in records]


def test_there_are_at_least_150_conversations() -> None:
    assert len(conversations()) >= 150


def test_every_conversation_is_one_question_and_one_answer() -> None:
    for messages in conversations():
        assert [message["role"] for message in messages] == ["user", "assistant"]
        for message in messages:
            assert set(message) == {"role", "content"}
            assert message["content"] and message["content"] == message["content"].strip()
        assert messages[0]["content"].endswith("?")


def test_no_question_comes_twice() -> None:
    asked = [" ".join(re.findall(r"\w+", user["content"].lower())) for user, _ in conversations()]
    assert len(set(asked)) == len(asked)


def test_every_conversation_is_at_most_200_bytes() -> None:
    for messages in conversations():
        text = "".join(message["content"] for message in messages)
        assert len(text.encode()) <= MAX_CONVERSATION_BYTES, text


def test_the_data_says_its_licence() -> None:
    assert "CC0" in (DATA.parent / "README.md").read_text(encoding="utf-8")


def test_the_quick_start_trains_on_this_data_and_no_download() -> None:
    config = json.loads(CONFIG.read_text(encoding="utf-8"))
    assert [entry["dataset"]["anno_path"] for entry in config["datasets"]] == [
        str(DATA.relative_to(ROOT))
    ]
    assert config["tokenizer"] == {"class_name": "ByteTokenizer"}
    assert "load_from" not in config


def test_the_number_of_questions_that_the_pages_tell_is_right() -> None:
    count = len(conversations())
    told = [(page, page.read_text(encoding="utf-8")) for page in [*PAGES, CONFIG]]
    numbers = [
        (path, int(number))
        for path, text in told
        for number in re.findall(r"learns (\d+) (?:short )?questions", text)
    ]
    assert numbers
    assert [(path, number) for path, number in numbers if number != count] == []


# Asking


def load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_export(folder: Path, age_s: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    os.utime(folder / "config.json", (1_000_000 - age_s, 1_000_000 - age_s))
    return folder


def test_the_newest_export_is_asked(tmp_path: Path) -> None:
    ask = load_file(ASK)
    make_export(tmp_path / "step_10", age_s=50)
    newest = make_export(tmp_path / "step_9", age_s=5)
    make_export(tmp_path / ".step_20.writing", age_s=0)
    (tmp_path / "no_weights").mkdir()
    (tmp_path / "no_weights" / "config.json").write_text("{}")
    assert ask.newest_export(tmp_path) == newest


def test_a_folder_that_is_itself_an_export_is_found(tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", age_s=0)
    assert load_file(ASK).newest_export(export) == export


def test_asking_without_an_export_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load_file(ASK).main([str(tmp_path / "nothing")]) == 2
    assert "core/run.py configs/quickstart.json" in capsys.readouterr().err


def test_five_different_questions_of_the_data_are_asked() -> None:
    asked = load_file(ASK).questions(DATA, 5)
    assert len(set(asked)) == 5
    assert set(asked) <= {(user["content"], reply["content"]) for user, reply in conversations()}


# The pages


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as a code host spells them."""
    text = re.sub(
        r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_pages_that_the_index_promises_are_looked_at() -> None:
    names = {str(page.relative_to(ROOT)) for page in PAGES}
    assert {"README.md", "docs/index.md", "docs/hooks.md", "docs/quickstart.md"} <= names


@page_of
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    text = re.sub(
        r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        aim = (page.parent / file).resolve() if file else page
        if not aim.exists() or (anchor and anchor not in headings(aim)):
            wrong.append(target)
    assert wrong == []


def test_every_page_can_be_reached_from_the_index() -> None:
    # The pages of hooks by way of their list.
    text = "".join(
        (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("index.md", "hooks.md")
    )
    linked = {target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)}
    pages = {str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/**/*.md")}
    assert pages - {"index.md"} <= linked


@page_of
def test_every_json_block_parses(page: Path) -> None:
    for block in blocks(page, "json"):
        json.loads(block)


@page_of
def test_every_python_block_but_a_bare_signature_compiles(page: Path) -> None:
    for block in blocks(page, "python"):
        source = block if block.rstrip().count("\n") else block.rstrip() + ": ..."
        compile(source, str(page), "exec")


# The plugins of the guides


@pytest.fixture
def guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to follow a guide in, beside the configs."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def write_guide(folder: Path, page: str, config: str, plugin: str) -> dict[str, Any]:
    """Save the plugin and the config that a page shows; the config."""
    path = ROOT / page
    (source,) = [block for block in blocks(path, "python") if "@pegboard.hookimpl" in block]
    (text,) = [block for block in blocks(path, "json") if "extends" in json.loads(block)]
    (folder / plugin).write_text(source, encoding="utf-8")
    (folder / config).write_text(text, encoding="utf-8")
    parsed: dict[str, Any] = json.loads(text)
    return parsed


GUIDES = [
    ("README.md", "squares.json", "squares.py", "SquaresDataset"),
]


@pytest.mark.parametrize(("page", "config", "plugin", "name"), GUIDES)
def test_the_dataset_of_a_guide_gives_conversations(
    guide: Path, page: str, config: str, plugin: str, name: str
) -> None:
    entry = write_guide(guide, page, config, plugin)["datasets"][0]["dataset"]
    assert entry.pop("class_name") == name
    label = entry.pop("name")
    component = getattr(load_file(guide / plugin), name)
    dataset: Dataset = component(component.Config(**entry)).build(label)
    assert len(dataset) >= 2
    places = {dataset.key(index) for index in range(len(dataset))}
    assert len(places) == len(dataset)
    for index in range(len(dataset)):
        roles = [message["role"] for message in dataset[index]["messages"]]
        assert roles == ["user", "assistant"]
    assert dataset.fingerprint() == component(component.Config(**entry)).build(label).fingerprint()


@pytest.mark.parametrize(("page", "config", "plugin", "name"), GUIDES)
def test_the_config_of_a_guide_passes_check(
    guide: Path,
    page: str,
    config: str,
    plugin: str,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from pegboard.cli import main

    write_guide(guide, page, config, plugin)
    code = main(["check", config, "--plugin", plugin, "--no-third-party"])
    assert code == 0, capsys.readouterr().err
    without = main(["check", config, "--no-third-party"])
    assert without == 2
    assert name in capsys.readouterr().err


def test_the_quick_start_config_passes_check(
    guide: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pegboard.cli import main

    del guide
    assert main(["check", "configs/quickstart.json", "--no-third-party"]) == 0, capsys.readouterr()
