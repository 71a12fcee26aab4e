"""Train each config named on the command line in one process group, with the parts for pictures (a script)."""

from __future__ import annotations

import sys
from pathlib import Path

from pegboard.device import local_device
from pegboard.parallel import join_ranks, leave_ranks
from pegboard.plugin_manager import load_plugins
from pegboard.run_config import load_run_config
from pegboard.trainer import train

if __name__ == "__main__":
    join_ranks(local_device())
    for config in sys.argv[1:]:
        plugins = load_plugins((Path(__file__).with_name("picture_parts.py"),), third_party=False)
        train(load_run_config(config, (), plugins.registry), plugins)
    leave_ranks()
