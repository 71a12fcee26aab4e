"""`pegboard preview` as the command line names it; what is heavy is imported by `run`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pegboard import Command, ConfigError
from pegboard.command import add_config_arguments, load_config, print_text

if TYPE_CHECKING:
    from pegboard.plugin_manager import LoadedPlugins

__all__ = ["PreviewCommand"]


class PreviewCommand(Command):
    """Show what a step is fed, token by token, coloured by loss; for CI, fail on a share."""

    name = "preview"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_config_arguments(parser)
        parser.add_argument(
            "--step", type=int, default=1, metavar="N", help="step to show, from 1 (default 1)"
        )
        parser.add_argument("--html", metavar="PATH", help="write one self-contained HTML file too")
        parser.add_argument(
            "--packs",
            type=int,
            metavar="N",
            help="packs of the step to show token by token (default 1, and 8 in HTML)",
        )
        parser.add_argument(
            "--full", action="store_true", help="print packs to their end, not their first lines"
        )
        parser.add_argument(
            "--color",
            choices=("auto", "always", "never"),
            default="auto",
            help="auto colours a terminal, unless NO_COLOR is set",
        )
        parser.add_argument(
            "--fail-if",
            action="append",
            default=[],
            metavar="CONDITION",
            help="exit with 1 if it holds, such as 'supervised<1%%' or 'dropped>0'; also truncated, "
            "padding, bad, fill, mismatch; repeatable",
        )
        parser.add_argument(
            "--trust-remote-code",
            action="store_true",
            help="let a tokenizer run code from its folder",
        )

    def run(self, arguments: argparse.Namespace, plugins: LoadedPlugins) -> int:
        """0: shown, no condition holds; 1: a `--fail-if` condition holds."""
        from .conditions import broken_conditions, parse_condition

        if arguments.step < 1:
            raise ConfigError(f"--step {arguments.step}: steps count from 1")
        if arguments.packs is not None and arguments.packs < 0:
            raise ConfigError(f"--packs {arguments.packs}: expected 0 or more")
        conditions = [parse_condition(text) for text in arguments.fail_if]
        loaded = load_config(arguments, plugins)

        from .gathering import gather_preview
        from .page import render_page
        from .terminal import choose_style, render_terminal

        packs = arguments.packs
        shown = packs if packs is not None else (8 if arguments.html else 1)
        preview = gather_preview(
            loaded.run,
            config_path=arguments.config,
            step=arguments.step,
            num_shown=shown,
            trust_remote_code=arguments.trust_remote_code,
        )
        broken = broken_conditions(conditions, preview.measures)
        style = choose_style(arguments.color, sys.stdout)
        print_text(
            render_terminal(
                preview,
                style,
                num_packs=packs if packs is not None else 1,
                full=arguments.full,
            )
        )
        if arguments.html:
            page = render_page(preview, conditions=arguments.fail_if, broken=broken)
            path = Path(arguments.html)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(page, encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"--html {path}: can't be written ({error.strerror})") from error
            print(f"wrote {path} ({len(page.encode()) / 2**20:.1f} MiB)", file=sys.stderr)
        for line in broken:
            print(f"--fail-if {line}", file=sys.stderr)
        return 1 if broken else 0
