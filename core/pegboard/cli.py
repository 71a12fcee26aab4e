"""The command line: train, check, plugins, schema, and the commands of plugins.

The composition root: plugins are loaded once here and handed on. A config is validated whole before
anything heavy is imported, and everything is imported where it is used, so that `train --help`
costs what argparse costs. Exit codes: 0 done, 2 an error of the user's (one message, no traceback),
130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import json
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pegboard.command import (
    CORE_COMMANDS,
    add_config_arguments,
    add_plugin_arguments,
    find_config,
    load_config,
    print_text,
)
from pegboard.errors import ConfigError, PegboardError, PluginError
from pegboard.launch_errors import is_speaker, show_error, write_error_file

if TYPE_CHECKING:
    from pegboard.plugin_manager import LoadedPlugins

__all__ = ["main"]

# What the person at the machine can put right; any other OSError keeps its traceback.
_DISK_ERRORS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. `X.json` alone means `train X.json`."""
    words = _with_command(list(sys.argv[1:] if argv is None else argv))
    try:
        try:
            arguments = _parse(words)
        except SystemExit as stop:  # argparse has printed its help or its error
            return stop.code if isinstance(stop.code, int) else 2
        command: Callable[[argparse.Namespace], int] = arguments.run
        return command(arguments)
    except PegboardError as error:
        show_error(str(error))
        return 2
    except KeyboardInterrupt:
        if is_speaker():
            print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            show_error(f"{error.filename or 'writing a file'}: {error.strerror}")
            return 2
        write_error_file(f"{type(error).__name__}: {error}", traceback.format_exc())
        raise


def _with_command(words: list[str]) -> list[str]:
    if not words:
        return ["--help"]
    first = words[0]
    if first in ("-h", "--help", "--version"):
        return words
    if first.startswith("-") or Path(first).suffix == ".json":
        return ["train", *words]
    return words  # a command of the core, of a plugin, or of nobody: argparse says so


def _parse(words: list[str]) -> argparse.Namespace:
    """Plugins are asked for their commands only where the word is not one of the core's."""
    if words[0] in _COMMANDS or words[0] == "--version":
        return _parser().parse_args(words)
    options = argparse.ArgumentParser(prog="pegboard", add_help=False, allow_abbrev=False)
    add_plugin_arguments(options)
    options.add_argument("--set", action="append", default=[])
    wants_help = words[0] in ("-h", "--help")
    arguments, rest = options.parse_known_args(words)
    # Which word is the config only the command knows, and it may be a plugin's that must not load.
    from pegboard.plugin_policy import read_allowed_of_words

    allow = read_allowed_of_words(rest, arguments.set)
    plugins = _load_plugins(arguments, warn=not wants_help, allow=allow)
    if not wants_help:
        plugins.registry.check_command_name(words[0])
    return _parser(plugins).parse_args(words)


def _parser(plugins: LoadedPlugins | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pegboard",
        description="A trainer that is mostly plugins; `pegboard X.json` means `train X.json`.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="print the version")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (run, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        command.set_defaults(run=run)
        if name in ("train", "check"):
            add_config_arguments(command)
        if name == "train":
            command.add_argument(
                "--resume",
                action="store_true",
                help="go on from the newest checkpoint of the work_dir",
            )
            command.add_argument(
                "--trust-remote-code",
                action="store_true",
                help="let a tokenizer run code from its folder",
            )
        if name == "plugins":
            command.add_argument("--json", action="store_true", help="print JSON")
            which = command.add_mutually_exclusive_group()
            which.add_argument(
                "--hook", metavar="NAME", help="only who implements a hook, in call order"
            )
            which.add_argument(
                "--conflicts", action="store_true", help="only names that several plugins offer"
            )
        add_plugin_arguments(command)
    if plugins is not None:
        _add_plugin_commands(commands, plugins)
    return parser


def _add_plugin_commands(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], plugins: LoadedPlugins
) -> None:
    for cls in plugins.registry.commands():
        offered, summary = cls(), cls.summary()
        parser = commands.add_parser(
            offered.name,
            help=summary.replace("%", "%%"),
            description=summary,
            allow_abbrev=False,
        )
        add_plugin_arguments(parser)
        offered.add_arguments(parser)
        parser.set_defaults(run=partial(offered.run, plugins=plugins))


class _ShowVersion(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib import metadata

        try:
            print(f"pegboard {metadata.version('pegboard')}")
        except metadata.PackageNotFoundError:
            print("pegboard (a checkout that is not installed)")
        parser.exit()


def _train(arguments: argparse.Namespace) -> int:
    plugins = _load_allowed(arguments)
    try:
        loaded = load_config(arguments, plugins)
    except ConfigError as error:
        if arguments.resume:
            raise ConfigError("\n".join([str(error), *_gone(arguments, str(error))])) from error
        raise
    from pegboard.run_folder import log_to_screen
    from pegboard.trainer import train  # torch, only after everything is valid

    log_to_screen()  # data is prepared before there is a run folder
    train(loaded, plugins, resume=arguments.resume, trust_remote_code=arguments.trust_remote_code)
    return 0


def _gone(arguments: argparse.Namespace, report: str) -> list[str]:
    """Which of the names that a config misses the run had when it began."""
    from pegboard.json_source import load_layers
    from pegboard.plugin_identity import newest_run, offered_then

    run_dir = newest_run(load_layers(arguments.config, arguments.set).data)
    return offered_then(run_dir, report) if run_dir is not None else []


def _check(arguments: argparse.Namespace) -> int:
    run = load_config(arguments, _load_allowed(arguments)).run
    datasets = ", ".join(type(source.dataset).__name__ for source in run.datasets)
    print(f"ok: {arguments.config}: model {type(run.model).__name__}, datasets [{datasets}]")
    return 0


def _plugins(arguments: argparse.Namespace) -> int:
    plugins = _load_plugins(arguments, warn=False)
    from pegboard.plugin_listing import list_conflicts, list_hook, list_parts

    if arguments.hook is not None:
        values, lines = list_hook(plugins, arguments.hook)
    elif arguments.conflicts:
        values, lines = list_conflicts(plugins)
    else:
        values, lines = list_parts(plugins)
    print_text(json.dumps(values, indent=2) if arguments.json else "\n".join(lines))
    for warning in plugins.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    from pegboard.config_schema import run_config_schema

    print_text(json.dumps(run_config_schema(_load_plugins(arguments).registry), indent=2))
    return 0


def _load_allowed(arguments: argparse.Namespace) -> LoadedPlugins:
    """The plugins that the config which the arguments name allows."""
    from pegboard.plugin_policy import read_allowed

    return _load_plugins(arguments, allow=read_allowed(find_config(arguments), arguments.set))


def _load_plugins(
    arguments: argparse.Namespace, *, warn: bool = True, allow: Collection[str] | None = None
) -> LoadedPlugins:
    from pegboard.plugin_manager import load_plugins

    plugins = load_plugins(
        extra_files=arguments.plugin,
        block=arguments.block,
        third_party=not arguments.no_third_party,
        allow=allow,
        trace=arguments.trace_hooks,
    )
    if not warn:
        return plugins
    for record in plugins.plugins:
        # Asked for by name, so the run isn't what was meant without it.
        if record.status == "broken" and record.origin.startswith("file "):
            raise PluginError(f"--plugin {record.origin.removeprefix('file ')}: {record.reason}")
    if is_speaker():
        for warning in plugins.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    return plugins


_COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int], str]] = {
    "train": (_train, "Validate a run config, then train it."),
    "check": (_check, "Validate a run config without loading torch."),
    "plugins": (_plugins, "List every part that a config can name."),
    "schema": (_schema, "Print the JSON Schema of run configs over the installed parts."),
}
assert tuple(_COMMANDS) == CORE_COMMANDS
