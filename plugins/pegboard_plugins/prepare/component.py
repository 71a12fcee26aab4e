"""`pegboard prepare` as the command line names it; what is heavy is imported by `run`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pegboard import Command
from pegboard.command import add_config_arguments, load_config

if TYPE_CHECKING:
    from pegboard.plugin_manager import LoadedPlugins

__all__ = ["PrepareCommand"]


class PrepareCommand(Command):
    """Tokenize the data of a run ahead of it, so that training only maps the result."""

    name = "prepare"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_config_arguments(parser)
        parser.add_argument(
            "--workers", type=int, default=None, metavar="N", help="processes that tokenize"
        )
        parser.add_argument(
            "--trust-remote-code",
            action="store_true",
            help="let a tokenizer run code from its folder",
        )

    def run(self, arguments: argparse.Namespace, plugins: LoadedPlugins) -> int:
        from pathlib import Path

        from pegboard.preparation import prepare_sources

        run = load_config(arguments, plugins).run
        tokenizer = run.tokenizer.build(trust_remote_code=arguments.trust_remote_code)
        workers = arguments.workers
        for entries in (run.datasets, run.eval.datasets if run.eval else ()):
            prepare_sources(
                entries,
                work_dir=Path(run.work_dir),
                tokenizer=tokenizer,
                model=run.model,
                num_workers=run.dataloader.num_workers if workers is None else workers,
            )
        return 0
