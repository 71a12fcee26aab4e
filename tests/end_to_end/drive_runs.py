"""Train each config named on the command line, one after another, in this process (a script, not a test)."""

from __future__ import annotations

import sys

from pegboard.device import local_device
from pegboard.parallel import join_ranks, leave_ranks
from pegboard.plugin_manager import load_plugins
from pegboard.run_config import load_run_config
from pegboard.trainer import train

if __name__ == "__main__":
    # Once for all runs: torchrun's store can't start a second group of the same name.
    join_ranks(local_device())
    for config in sys.argv[1:]:
        plugins = load_plugins()
        train(load_run_config(config, (), plugins.registry), plugins)
    leave_ranks()
