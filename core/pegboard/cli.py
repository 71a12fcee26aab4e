"""The command line: train, check, plugins, schema.

The composition root: plugins are loaded once here and handed on. A config is validated whole before
anything heavy is imported, and everything is imported where it is used, so that `--help` costs what
argparse costs. Exit codes: 0 done, 2 an error of the user's (one message, no traceback), 130
interrupted.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pegboard.errors import ConfigError, PegboardError, PluginError
from pegboard.launch_errors import is_speaker, show_error, write_error_file

if TYPE_CHECKING:
    from pegboard.plugin_manager import LoadedPlugins
    from pegboard.run_config import LoadedConfig

__all__ = ["main"]

# What the person at the machine can put right; any other OSError keeps its traceback.
_DISK_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. `X.json` alone means `train X.json`."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = _parser().parse_args(_with_command(words))
    except SystemExit as stop:  # argparse has printed its help or its error
        return stop.code if isinstance(stop.code, int) else 2
    command: Callable[[argparse.Namespace], int] = arguments.run
    try:
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
    if first in _COMMANDS or first in ("-h", "--help", "--version"):
        return words
    if first.startswith("-") or Path(first).suffix == ".json":
        return ["train", *words]
    return words  # argparse says which commands there are


def _parser() -> argparse.ArgumentParser:
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
            command.add_argument("config", metavar="CONFIG", help="a run config, JSON")
            command.add_argument(
                "--set",
                action="append",
                default=[],
                metavar="PATH=VALUE",
                help="override, such as optimizer.lr=1e-5 or savers[0].every_steps=9; repeatable",
            )
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
        command.add_argument(
            "--plugin",
            action="append",
            default=[],
            metavar="FILE.py",
            help="load a one-file plugin, which runs its code; repeatable",
        )
        command.add_argument(
            "--block",
            action="append",
            default=[],
            metavar="NAME",
            help="leave a plugin out; repeatable",
        )
        command.add_argument(
            "--no-third-party",
            action="store_true",
            help="load built-in plugins and --plugin files only",
        )
    return parser


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
    plugins = _load_plugins(arguments)
    loaded = _load_config(arguments, plugins)
    from pegboard.trainer import train  # torch, only after everything is valid

    train(loaded, plugins, resume=arguments.resume, trust_remote_code=arguments.trust_remote_code)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    run = _load_config(arguments, _load_plugins(arguments)).run
    datasets = ", ".join(type(source.dataset).__name__ for source in run.datasets)
    print(f"ok: {arguments.config}: model {type(run.model).__name__}, datasets [{datasets}]")
    return 0


def _plugins(arguments: argparse.Namespace) -> int:
    plugins = _load_plugins(arguments, warn=False)
    if arguments.json:
        _print(json.dumps(plugins.describe(), indent=2))
        return 0
    rows = [
        (entry.kind, entry.class_name, entry.plugin, entry.summary)
        for entry in plugins.registry.entries()
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    lines = []
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        lines.append("  ".join((*cells, row[3])).rstrip())
    for record in plugins.plugins:
        if record.status != "loaded":
            reason = f": {record.reason}" if record.reason else ""
            lines.append(f"{record.status}: {record.name} ({record.origin}){reason}")
    _print("\n".join(lines))
    for warning in plugins.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    from pegboard.config_schema import run_config_schema

    _print(json.dumps(run_config_schema(_load_plugins(arguments).registry), indent=2))
    return 0


def _print(text: str) -> None:
    """Print a long text; a reader that stops early (`| head`) is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes stdout once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _load_plugins(arguments: argparse.Namespace, *, warn: bool = True) -> LoadedPlugins:
    from pegboard.plugin_manager import load_plugins

    plugins = load_plugins(
        extra_files=arguments.plugin,
        block=arguments.block,
        third_party=not arguments.no_third_party,
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


def _load_config(arguments: argparse.Namespace, plugins: LoadedPlugins) -> LoadedConfig:
    from pegboard.run_config import load_run_config

    path = Path(arguments.config)
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such file (relative to {Path.cwd()}); give the path of a run config"
        )
    return load_run_config(path, tuple(arguments.set), plugins.registry)


_COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int], str]] = {
    "train": (_train, "Validate a run config, then train it."),
    "check": (_check, "Validate a run config without loading torch."),
    "plugins": (_plugins, "List every part that a config can name."),
    "schema": (_schema, "Print the JSON Schema of run configs over the installed parts."),
}
