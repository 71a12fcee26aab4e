"""Train each config named on the command line, one after another, in this process (a script, not a test)."""

from __future__ import annotations

import sys

from pegboard.plugin_manager import load_plugins
from pegboard.run_config import load_run_config
from pegboard.trainer import train

if __name__ == "__main__":
    for config in sys.argv[1:]:
        plugins = load_plugins()
        train(load_run_config(config, (), plugins.registry), plugins)
