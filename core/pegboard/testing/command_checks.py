"""What a command promises: it registers, explains itself, stays light, and fails in one message.

Options: `arguments`, words of a run that works; `refused`, words of a run that ends in an error of
the user's, such as a file that isn't there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

from pegboard.command import add_plugin_arguments, check_command
from pegboard.errors import PegboardError, PluginError
from pegboard.testing.case import Case, Check

__all__ = ["CHECKS", "OPTIONS"]

OPTIONS = frozenset({"arguments", "refused"})

_LIGHT = """
import argparse, sys
from pegboard.testing.ranks import load_class
command = load_class({module!r}, {file!r}, {name!r})
command().add_arguments(argparse.ArgumentParser())
print(*sorted({{"torch", "transformers", "jsonschema", "loguru"}} & sys.modules.keys()))
"""


def _parser(case: Case) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=case.component.name, exit_on_error=False)
    add_plugin_arguments(parser)
    case.component().add_arguments(parser)
    return parser


def _registers(case: Case) -> None:
    try:
        check_command(case.component)
    except PluginError as error:
        raise AssertionError(f"it can't be registered: {error}") from error


def _says_what_it_does(case: Case) -> None:
    first = case.component.summary()
    assert first.endswith("."), f"the docstring's first line is no sentence: {first!r}"
    assert len(first) <= 120, f"the docstring's first line has {len(first)} characters, over 120"


def _explains_every_argument(case: Case) -> None:
    bare = [action.dest for action in _parser(case)._actions if not action.help]
    assert not bare, f"arguments without help=: {', '.join(bare)}"


def _help_is_light(case: Case) -> None:
    cls = case.component
    code = _LIGHT.format(
        module=cls.__module__, file=sys.modules[cls.__module__].__file__, name=cls.__qualname__
    )
    code = f"import sys\nsys.path[:0] = {[path for path in sys.path if path]!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"a new process can't make its arguments:\n{done.stderr}"
    heavy = done.stdout.strip()
    assert not heavy, f"imported before `run`: {heavy}; every `pegboard --help` would wait for it"


def _a_run_gives_an_exit_code(case: Case) -> None:
    import pytest

    if "arguments" not in case.options:
        pytest.skip("no option `arguments`")
    code = _run(case, case.options["arguments"])
    assert type(code) is int, f"run() gives {code!r}, not an exit code"


def _an_error_of_the_user_is_one_message(case: Case) -> None:
    import pytest

    if "refused" not in case.options:
        pytest.skip("no option `refused`")
    words = case.options["refused"]
    try:
        code = _run(case, words)
    except PegboardError as error:
        assert str(error).strip(), "an error without a word"
        return
    except Exception as error:  # noqa: BLE001 (that it may be anything is what is tested)
        raise AssertionError(f"{words} raised {error!r}, expected a PegboardError") from error
    raise AssertionError(f"{words} gave exit code {code}, expected a PegboardError")


def _run(case: Case, words: Sequence[str]) -> object:
    from pegboard.plugin_manager import load_plugins

    arguments = _parser(case).parse_args(list(words))
    return case.component().run(arguments, load_plugins(third_party=False))


CHECKS = (
    Check("registers", _registers),
    Check("says_what_it_does", _says_what_it_does),
    Check("explains_every_argument", _explains_every_argument),
    Check("help_is_light", _help_is_light),
    Check("a_run_gives_an_exit_code", _a_run_gives_an_exit_code),
    Check("an_error_of_the_user_is_one_message", _an_error_of_the_user_is_one_message),
)
