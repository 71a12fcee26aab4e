"""`pegboard new` as the command line names it; `run` imports the rest."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pegboard import Command
from pegboard.registry import HOOKS

if TYPE_CHECKING:
    from pegboard.plugin_manager import LoadedPlugins

__all__ = ["NewCommand"]


class NewCommand(Command):
    """Write a package for a part of your own: code, contract tests, README and CI."""

    name = "new"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("what", choices=["plugin"], help="what to write: a package of a plugin")
        parser.add_argument(
            "package",
            metavar="NAME",
            help="name of the distribution, and of its folder, such as pegboard-rivers",
        )
        parser.add_argument(
            "--kind",
            required=True,
            metavar="KIND",
            help=f"what the plugin offers: {', '.join(HOOKS)}",
        )
        parser.add_argument(
            "--folder",
            default=".",
            metavar="FOLDER",
            help="where the package's folder is made; default: the current folder",
        )

    def run(self, arguments: argparse.Namespace, plugins: LoadedPlugins) -> int:
        """Write the package and say what to do next.

        Raises:
            ConfigError: the name, the kind or the folder won't do; nothing is then written.
        """
        from .names import check_part_name, names_for
        from .package import write_package

        check_part_name(names_for(arguments.package, arguments.kind), plugins.registry)
        print(write_package(arguments.package, arguments.kind, arguments.folder))
        return 0
