"""`pegboard prepare` and `pegboard cache` as the command line names them; `run` imports the rest."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pegboard import Command
from pegboard.command import add_config_arguments, load_config

if TYPE_CHECKING:
    from pegboard.plugin_manager import LoadedPlugins

__all__ = ["CacheCommand", "PrepareCommand"]


class PrepareCommand(Command):
    """Index, check and tokenize the data of a run and plan its packs; training then maps the result."""

    name = "prepare"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_config_arguments(parser)
        parser.add_argument(
            "--limit",
            type=_positive,
            metavar="N",
            help="take only the first N records of each dataset, to try a config",
        )
        parser.add_argument(
            "--workers",
            type=_not_negative,
            metavar="N",
            help="processes that tokenize; default: one per core; 0: none, this one does",
        )
        parser.add_argument(
            "--fresh",
            action="store_true",
            help="tokenize anew what is prepared already: for pictures or films that have changed",
        )
        parser.add_argument(
            "--trust-remote-code",
            action="store_true",
            help="let a tokenizer run code from its folder",
        )

    def run(self, arguments: argparse.Namespace, plugins: LoadedPlugins) -> int:
        run = load_config(arguments, plugins).run
        from .prepare_run import prepare_run

        prepare_run(
            run,
            limit=arguments.limit,
            num_workers=arguments.workers,
            trust_remote_code=arguments.trust_remote_code,
            fresh=arguments.fresh,
        )
        return 0


class CacheCommand(Command):
    """List, verify or prune what runs keep: tokenized data, plans, unpacked files."""

    name = "cache"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "action",
            choices=["list", "verify", "prune"],
            help="list what is there; read all of it against its checksums; delete what is damaged, "
            "abandoned, outdated or unused",
        )
        parser.add_argument(
            "folder",
            metavar="FOLDER",
            help="a cache folder, a folder of unpacked files, or a run config: its cache_dir (else "
            "work_dir/.token_store), and where its compressed files are unpacked",
        )
        parser.add_argument(
            "--days",
            type=float,
            default=30.0,
            metavar="N",
            help="prune: delete what no run opened for so many days (default 30)",
        )
        parser.add_argument(
            "--dry-run", action="store_true", help="prune: say what would be deleted"
        )

    def run(self, arguments: argparse.Namespace, plugins: LoadedPlugins) -> int:
        del plugins
        from .cache import find_caches, list_caches, prune_caches, verify_caches

        folders = find_caches(arguments.folder)
        if arguments.action == "list":
            return list_caches(folders)
        if arguments.action == "verify":
            return verify_caches(folders)
        return prune_caches(folders, days=arguments.days, dry_run=arguments.dry_run)


def _positive(text: str) -> int:
    return _at_least(1, text)


def _not_negative(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} up, found {text!r}")
    return int(text)
