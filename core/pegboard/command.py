"""A command of the command line: its name, its one-line help, its arguments, and what it does.

The core has train, check, plugins and schema; every other command comes from a plugin, through
`register_commands`. A command is light: what is heavy is imported in `run`.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pegboard.errors import ConfigError, PluginError

if TYPE_CHECKING:
    from pegboard.plugin_manager import LoadedPlugins
    from pegboard.run_config import LoadedConfig

__all__ = [
    "CORE_COMMANDS",
    "Command",
    "add_config_arguments",
    "add_plugin_arguments",
    "check_command",
    "find_config",
    "load_config",
    "print_text",
]

CORE_COMMANDS = ("train", "check", "plugins", "schema")


class Command:
    """Base of every command that a plugin offers.

    A subclass has a docstring (its first line is the help), a `name`, and a `run`. The core adds
    `--plugin`, `--block`, `--no-third-party` and `--trace-hooks` to the arguments of each.

    >>> import argparse
    >>> from pegboard import Command
    >>> class Hello(Command):
    ...     "Greet whoever is named."
    ...     name = "hello"
    ...     def add_arguments(self, parser):
    ...         parser.add_argument("who")
    ...     def run(self, arguments, plugins):
    ...         print("Hello,", arguments.who)
    ...         return 0
    >>> Hello().run(argparse.Namespace(who="you"), plugins=None)
    Hello, you
    0
    >>> Hello.summary()
    'Greet whoever is named.'
    """

    name: ClassVar[str] = ""
    """The word on the command line: lower case, with `-` between words."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add what the command takes; `add_config_arguments` where it takes a run config."""
        del parser

    def run(self, arguments: argparse.Namespace, plugins: LoadedPlugins) -> int:
        """Do it; returns the exit code.

        Raises:
            PegboardError: printed as one message without a traceback, exit code 2.
        """
        raise NotImplementedError

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(cls) or "").split("\n", 1)[0].strip()


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG, `--set` and what a person may allow, as `train` takes them; `load_config` reads them."""
    parser.add_argument("config", metavar="CONFIG", help="a run config, JSON")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="override, such as optimizer.lr=1e-5 or savers[0].every_steps=9; repeatable",
    )
    parser.add_argument(
        "--allow-media-outside-root",
        action="store_true",
        help="let paths of pictures in records lead out of their dataset's media_root",
    )


def add_plugin_arguments(parser: argparse.ArgumentParser) -> None:
    """What plugins to load; the core adds these arguments to every command."""
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE.py",
        help="load a one-file plugin, which runs its code; repeatable",
    )
    parser.add_argument(
        "--block",
        action="append",
        default=[],
        metavar="NAME",
        help="leave a plugin out; repeatable",
    )
    parser.add_argument(
        "--no-third-party",
        action="store_true",
        help="load built-in plugins and --plugin files only",
    )
    parser.add_argument(
        "--trace-hooks",
        action="store_true",
        help="print each plugin's import and hook calls to stderr: what it offers, and the time taken",
    )


def load_config(arguments: argparse.Namespace, plugins: LoadedPlugins) -> LoadedConfig:
    """The valid config that the arguments name.

    Raises:
        ConfigError: no such file, or every problem of it.
    """
    from pegboard.plugin_policy import check_imported
    from pegboard.run_config import load_run_config

    path = find_config(arguments)
    loaded = load_run_config(path, tuple(arguments.set), plugins.registry)
    check_imported(plugins, loaded.run.plugins.allow, path)
    if getattr(arguments, "allow_media_outside_root", False):
        evaluated = loaded.run.eval.datasets if loaded.run.eval else ()
        for entry in (*loaded.run.datasets, *evaluated):
            entry.dataset.media_outside_root = True
    return loaded


def find_config(arguments: argparse.Namespace) -> Path:
    """The config file that the arguments name; ConfigError if there is none."""
    path = Path(arguments.config)
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such file (relative to {Path.cwd()}); give the path of a run config"
        )
    return path


def print_text(text: str) -> None:
    """Print a long text; a reader that stops early (`| head`) is no error, nor is a name that stdout can't hold."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        # Python flushes stdout once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_command(cls: type[Any]) -> None:
    """Check what a class must offer before it becomes a command.

    Raises:
        PluginError: the first rule it breaks, and what to write instead.
    """
    if not isinstance(cls, type):
        raise PluginError(
            f"register takes a class, not {cls!r}; write register({type(cls).__name__})"
        )
    who = f"command '{cls.__name__}'"
    if not issubclass(cls, Command) or cls is Command:
        raise PluginError(f"{who} is not derived from Command; write class {cls.__name__}(Command)")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", cls.name):
        raise PluginError(
            f"{who}: name is {cls.name!r}, expected a word in lower case such as 'my-command'"
        )
    if cls.name in CORE_COMMANDS:
        raise PluginError(f"{who}: '{cls.name}' is a command of the core; take another name")
    if not (cls.__doc__ or "").strip():
        raise PluginError(f"{who} has no docstring; its first line is what --help prints")
    if cls.run is Command.run:
        raise PluginError(f"{who} has no run(); define it as Command does")
    parser = argparse.ArgumentParser(prog=cls.name)  # with -h, as the command line makes it
    add_plugin_arguments(parser)
    try:
        cls().add_arguments(parser)
    except argparse.ArgumentError as error:
        raise PluginError(f"{who}: {error}") from error
