"""A command comes from a plugin, is checked when it registers, and runs like the core's own."""

from __future__ import annotations

import argparse
import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from pegboard import Command
from pegboard.cli import main
from pegboard.command import check_command, print_text
from pegboard.errors import PluginError
from pegboard.plugin_manager import load_plugins

COUNTING = '''
import pegboard

class CountCommand(pegboard.Command):
    """Count to a number, in 100% of cases."""

    name = "count-to"

    def add_arguments(self, parser):
        parser.add_argument("number", type=int)

    def run(self, arguments, plugins):
        if arguments.number > 3:
            raise pegboard.DataError("too far")
        print(*range(arguments.number), len(plugins.plugins) > 0)
        return 7

@pegboard.hookimpl
def register_commands(register):
    register(CountCommand)
'''


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = tmp_path / "peg_counting.py"
    file.write_text(COUNTING)
    yield file
    sys.modules.pop("peg_counting", None)


def test_a_command_of_a_plugin_runs_with_its_arguments_and_gives_the_exit_code(
    counting: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["count-to", "3", "--no-third-party", "--plugin", str(counting)]) == 7
    assert capsys.readouterr().out == "0 1 2 True\n"
    assert main(["count-to", "9", "--no-third-party", "--plugin", str(counting)]) == 2
    assert capsys.readouterr().err == "too far\n"
    assert main(["count-to", "x", "--no-third-party", "--plugin", str(counting)]) == 2
    assert "invalid int value" in capsys.readouterr().err


def test_a_command_is_listed_by_plugins_and_in_the_help_and_gone_without_its_plugin(
    counting: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plugins", "--no-third-party", "--plugin", str(counting)]) == 0
    [line] = [row for row in capsys.readouterr().out.splitlines() if " count-to " in row]
    assert line.split(maxsplit=3)[0] == "command" and "in 100% of cases" in line
    assert main(["--help", "--plugin", str(counting)]) == 0
    assert "Count to a number, in 100% of cases." in capsys.readouterr().out
    assert main(["count-to", "3", "--no-third-party"]) == 2
    assert "invalid choice: 'count-to'" in capsys.readouterr().err


def test_a_command_whose_arguments_clash_with_help_stops_no_other(
    counting: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counting.write_text(COUNTING.replace('"number"', '"-h", "--height"'))
    assert main(["--help", "--no-third-party", "--plugin", str(counting)]) == 0
    out = capsys.readouterr().out
    assert "preview" in out and "count-to" not in out


def test_a_command_that_two_plugins_offer_is_an_error_only_when_it_is_used(
    counting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "peg_counting_too.py"
    other.write_text(COUNTING)
    options = ["--no-third-party", "--plugin", str(counting), "--plugin", str(other)]
    assert main(["plugins", *options]) == 0
    capsys.readouterr()
    assert main(["count-to", "3", *options]) == 2
    assert "offered by 'peg_counting', 'peg_counting_too'" in capsys.readouterr().err
    sys.modules.pop("peg_counting_too", None)


class _Sound(Command):
    """Does nothing."""

    name = "sound"

    def run(self, arguments: argparse.Namespace, plugins: Any) -> int:
        return 0


def test_a_sound_command_passes() -> None:
    check_command(_Sound)


def _clash(self: Command, parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plugin")


def _clash_with_help(self: Command, parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-h", "--height")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": ""}, "expected a word in lower case"),
        ({"name": "Sound"}, "expected a word in lower case"),
        ({"name": "train"}, "is a command of the core"),
        ({"__doc__": None}, "has no docstring"),
        ({"run": Command.run}, "has no run"),
        ({"add_arguments": _clash}, "conflicting option string"),
        ({"add_arguments": _clash_with_help}, "-h/--height: conflicting option string: -h"),
    ],
)
def test_an_unsound_command_is_refused_with_what_to_write(
    changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(PluginError, match=says):
        check_command(type("Unsound", (_Sound,), {"__doc__": "Does nothing.", **changes}))


def test_what_is_no_command_is_refused() -> None:
    with pytest.raises(PluginError, match="not derived from Command"):
        check_command(dict)
    with pytest.raises(PluginError, match=r"write register\(_Sound\)"):
        check_command(_Sound())  # type: ignore[arg-type]


def test_the_built_in_commands_register_through_the_hook() -> None:
    names = [cls.name for cls in load_plugins(third_party=False).registry.commands()]
    assert "prepare" in names and names == sorted(names)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_text_with_a_name_that_stdout_cannot_hold_is_printed_all_the_same(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding=encoding))
    print_text("file " + os.fsdecode(b"b\xff.jsonl"))
    assert raw.getvalue() == b"file b\\udcff.jsonl\n"
