"""A record format of a plugin file is used by the config that names it, and by no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pegboard.errors import ConfigError, DataError
from pegboard.plugin_manager import load_plugins
from pegboard.run_config import load_run_config

TINY = Path(__file__).resolve().parents[3] / "configs" / "tiny" / "qwen3.json"

PLUGIN = '''
"""Quizzes."""
import pegboard


class QuizFormat(pegboard.RecordFormatComponent):
    """Records with a `quiz` of question and answer."""

    def build(self):
        return Quiz()


class Quiz:
    def accepts(self, record):
        return isinstance(record, dict) and "quiz" in record

    def read(self, record):
        question, answer = record["quiz"]
        return pegboard.RecordChat(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        )


@pegboard.hookimpl
def register_record_formats(register):
    register(QuizFormat)
'''


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tmp_path_factory.mktemp("plugin") / "quizzes_with_a_format.py"
    file.write_text(PLUGIN)
    return load_plugins([file], third_party=False)


def tokenize_fn(plugins: Any, tmp_path: Path, **fields: Any) -> Any:
    (tmp_path / "quiz.jsonl").write_text('{"quiz": ["q", "a"]}\n')
    entry = {
        "dataset": {"class_name": "JsonlDataset", "anno_path": str(tmp_path / "quiz.jsonl")},
        "tokenize_fn": {"class_name": "ChatTokenizeFn", "max_length": 64, **fields},
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"extends": str(TINY), "datasets": [entry]}))
    run = load_run_config(path, (), plugins.registry).run
    return run.datasets[0].tokenize_fn.build(run.tokenizer.build(), run.model)


def test_a_format_of_a_plugin_is_used_where_a_config_names_it(plugins: Any, tmp_path: Path) -> None:
    tokenize = tokenize_fn(plugins, tmp_path, record_format={"class_name": "QuizFormat"})
    (example,) = tokenize({"quiz": ["q", "a"]})
    assert bytes(example.input_ids[example.loss_mask][:1].astype("uint8")) == b"a"


def test_what_is_only_installed_changes_nothing(plugins: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="^record: found the keys 'quiz', which fits no"):
        tokenize_fn(plugins, tmp_path)({"quiz": ["q", "a"]})


def test_it_can_stand_among_the_formats_to_tell_apart(plugins: Any, tmp_path: Path) -> None:
    formats = [{"class_name": "QuizFormat"}, {"class_name": "PlainTextFormat", "text": "body"}]
    auto = {"class_name": "AutoFormat", "formats": formats}
    tokenize = tokenize_fn(plugins, tmp_path, record_format=auto)
    assert len(tokenize({"quiz": ["q", "a"]})) == len(tokenize({"body": "t"})) == 1
    other = tokenize_fn(plugins, tmp_path)
    assert tokenize.fingerprint() != other.fingerprint()


def test_a_format_that_is_not_there_is_a_config_error_with_the_near_miss(
    plugins: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'ShareGPTFormat'"):
        tokenize_fn(plugins, tmp_path, record_format={"class_name": "sharegpt"})


def test_the_built_in_formats_can_be_named() -> None:
    names = load_plugins(third_party=False).registry.names("record_format")
    assert {"AutoFormat", "OpenAIFormat", "ShareGPTFormat", "AlpacaFormat"} <= set(names)
