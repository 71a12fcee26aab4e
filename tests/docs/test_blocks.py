"""Every block of every page is true: Python runs, JSON is valid, commands parse and name what is there.

A page may leave a block out, with its reason: `<!-- not run: reason -->` on the line before it.
"""

from __future__ import annotations

import csv
import doctest
import functools
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from fenced_blocks import ROOT, Block, all_pages, blocks_of
from page_folder import PROGRAMS, commands_of, pegboard_words, write_files

import pegboard
from pegboard import cli
from pegboard.component import COMPONENT_KINDS
from pegboard.config_schema import run_config_schema
from pegboard.plugin_manager import load_plugins

BLOCKS = [block for page in all_pages() for block in blocks_of(page)]
GUIDES = [
    page for page in all_pages() if any(block.file.endswith(".py") for block in blocks_of(page))
]
PLACEHOLDERS = {"config.json", "CONFIG", "FOLDER", "FILE"}
"""The reader's own."""
OWN_COMMANDS = {"train", "check", "plugins", "schema", "cache", "new", "prepare", "preview"}


def these(*languages: str) -> pytest.MarkDecorator:
    chosen = [one for one in BLOCKS if one.language in languages and not one.not_run]
    return pytest.mark.parametrize("block", chosen, ids=lambda block: block.place)


def pages_with(language: str) -> list[Path]:
    return [page for page in all_pages() if any(b.language == language for b in blocks_of(page))]


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(autouse=True)
def _clean_imports(tmp_path: Path) -> Iterator[None]:
    """What a page's files add to the process goes with their test."""
    yield
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(f"{tmp_path}{os.sep}"):
            del sys.modules[name]


@functools.cache
def builtin_schema() -> dict[str, Any]:
    return run_config_schema(load_plugins(third_party=False).registry)


def test_every_fence_is_a_block_of_a_known_language() -> None:
    known = {
        "",
        "sh",
        "console",
        "text",
        "python",
        "pycon",
        "json",
        "jsonl",
        "toml",
        "csv",
        "yaml",
        "sql",
    }
    for page in all_pages():
        fences = re.findall(r"^ *```", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert len(fences) == 2 * len(blocks_of(page)), f"{page}: a fence without its pair"
    assert {block.place: block.language for block in BLOCKS if block.language not in known} == {}


def test_a_block_that_is_left_out_says_why() -> None:
    left_out = [block for block in BLOCKS if block.not_run]
    assert all(len(block.not_run) > 15 for block in left_out)
    assert len(left_out) < len(BLOCKS) / 20


@pytest.mark.parametrize("page", pages_with("python"), ids=page_id)
def test_python_runs_in_the_order_of_its_page(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in write_files(page, tmp_path):
        monkeypatch.delitem(sys.modules, Path(name).stem, raising=False)
    monkeypatch.setattr(sys, "argv", ["block.py"])
    module = types.ModuleType(f"blocks_of_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks_of(page):
        if block.language == "python" and not block.not_run:
            text = block.text
            if re.fullmatch(r"def \w+\(.*\) -> \w+\n", text):
                text = text.rstrip() + ": ...\n"  # a signature
            future = "from __future__ import annotations\n" if text.endswith(": ...\n") else ""
            code = compile("\n" * (block.line - bool(future)) + future + text, str(page), "exec")
            exec(code, module.__dict__)  # noqa: S102


@these("pycon")
def test_an_interactive_session_goes_as_it_is_shown(block: Block) -> None:
    names = {name: getattr(pegboard, name) for name in pegboard.__all__}  # as api.md says
    test = doctest.DocTestParser().get_doctest(block.text, names, block.place, str(block.page), 0)
    said: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    result = runner.run(test, out=said.append)
    assert result.failed == 0, "".join(said)


@these("json")
def test_json_is_a_config_a_part_of_one_or_a_record(block: Block, tmp_path: Path) -> None:
    value = json.loads(block.text)
    if isinstance(value, dict) and "datasets" in value:
        return  # a whole config: the tests of the editor's schema read it
    schema = builtin_schema()
    fields = schema["properties"]
    if isinstance(value, dict) and value.keys() <= fields.keys():
        fragment = {**schema, "if": True, "then": True}
        jsonschema.Draft7Validator(fragment).validate(value)
    elif isinstance(value, dict) and "class_name" in value:
        kinds = [
            kind
            for kind in COMPONENT_KINDS
            if value["class_name"] in (schema["definitions"][f"kind.{kind}"]["properties"]
                                       ["class_name"] or {"enum": ()})["enum"]
        ]  # fmt: skip
        assert kinds, f"{block.place}: no part is named {value['class_name']}"
        part = {"$ref": f"#/definitions/kind.{kinds[0]}", "definitions": schema["definitions"]}
        jsonschema.Draft7Validator(part).validate(value)
    else:
        entries = value if isinstance(value, list) else [value]
        for entry in entries:
            sections = {"dataset", "tokenize_fn"} & set(entry)
            assert sections or block.file or is_record(entry), block.place
            for kind in sections:
                part = {
                    "$ref": f"#/definitions/kind.{kind}",
                    "definitions": schema["definitions"],
                }
                jsonschema.Draft7Validator(part).validate(entry[kind])


def is_record(value: Any) -> bool:
    """Whether a form of record that ships accepts it."""
    registry = load_plugins(third_party=False).registry
    formats = [registry.find("record_format", name) for name in registry.names("record_format")]
    built: list[Any] = [cls(cls.Config()) for cls in formats]
    return any(one.build().accepts(value) for one in built)


@these("toml", "csv", "yaml", "jsonl")
def test_other_data_parses(block: Block) -> None:
    if block.language == "toml":
        assert tomllib.loads(block.text)
    elif block.language == "yaml":
        assert yaml.safe_load(block.text)
    elif block.language == "jsonl":
        assert all(json.loads(line) for line in block.text.splitlines())
    else:
        assert len({len(row) for row in csv.reader(block.text.splitlines())}) == 1


@these("", "sh", "console")
def test_commands_parse_and_name_files_that_are_there(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = set(write_files(block.page, tmp_path))
    made = {
        words[words.index(">") + 1]
        for other in blocks_of(block.page)
        for words in commands_of(other)
        if ">" in words
    }
    commands = commands_of(block)
    assert commands or block.language == "", f"{block.place}: no command; call it `text`"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in own:
        monkeypatch.delitem(sys.modules, Path(name).stem, raising=False)
    for command in commands:
        assert command[0] in PROGRAMS, f"{block.place}: {command[0]}"
        words = pegboard_words(command)
        if words is not None:
            words = words[: next((n for n, w in enumerate(words) if w in (">", "|")), None)]
            if "examples" in block.page.parts and words[0] not in OWN_COMMANDS:
                continue  # a command of the package, which its own tests run
            parse(["config.json" if word == "CONFIG" else word for word in words])
        elif command[0] == "python" and not command[1].startswith("-"):
            words = command[1:]
        elif command[0] == "make":
            rules = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert re.search(rf"^{command[1]}:", rules, flags=re.MULTILINE), command
        for word in words or ():
            if word.endswith((".json", ".py")) and not word.startswith("-"):
                there = (ROOT / word).is_file() or word in own | made | PLACEHOLDERS
                assert there, f"{block.place}: no file {word}"


def parse(words: list[str]) -> None:
    """As the command line does, with the plugins that the words name."""
    files = [Path(words[n + 1]) for n, word in enumerate(words) if word == "--plugin"]
    plugins = load_plugins(extra_files=files, third_party=False)
    assert plugins.warnings == ()
    try:
        cli._parser(plugins).parse_args(cli._with_command(words))
    except SystemExit as stop:
        pytest.fail(f"pegboard {' '.join(words)}: exit code {stop.code}")


@pytest.mark.slow
@pytest.mark.parametrize("page", GUIDES, ids=page_id)
def test_a_guide_goes_from_an_empty_folder_to_a_finished_run(page: Path, tmp_path: Path) -> None:
    write_files(page, tmp_path)
    commands = [words for block in blocks_of(page) for words in commands_of(block)]
    own = {block.file for block in blocks_of(page) if block.file}
    typed = [words for words in commands if own & set(words)]
    assert typed, f"{page}: no command uses its files"
    printed = {block.printed_by: block.text for block in blocks_of(page) if block.printed_by}
    assert set(printed) <= {shlex.join(words) for words in typed}, f"{page}: never typed: {printed}"
    for command in typed:
        words = pegboard_words(command)
        start = ["-m", "pegboard", *words] if words is not None else []
        if words is None and command[0] in ("pytest", "python"):
            start = ["-m", "pytest", *command[1:]] if command[0] == "pytest" else command[1:]
        if ">" in start or not start:
            continue
        short = ["--set", "total_steps=3"] if page.name == "README.md" else []
        done = subprocess.run(
            [sys.executable, *start, *short],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        assert done.stdout == printed.get(shlex.join(command), done.stdout)
    assert list(tmp_path.glob("work_dirs/*/metrics.jsonl"))


def environment() -> dict[str, str]:
    roots = os.pathsep.join([str(ROOT / "core"), str(ROOT / "plugins")])
    return {**os.environ, "PYTHONPATH": roots, "OMP_NUM_THREADS": "1"}
