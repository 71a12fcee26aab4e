"""Train each config named on the command line in one process group, with the parts for pictures (a script).

`+config.json` goes on with that run instead of starting it.
"""

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
        loaded = load_run_config(config.removeprefix("+"), (), plugins.registry)
        train(loaded, plugins, resume=config.startswith("+"))
    leave_ranks()
