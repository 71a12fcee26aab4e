"""The torchrun entry of a checkout: `torchrun --nproc-per-node 8 core/run.py configs/x.json`.

It runs the source beside it, installed or not; `pegboard` and `torchrun -m pegboard` run what is
installed. NOTE: nothing importable belongs here: spawned workers import this file again as
`__mp_main__`.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "core"), str(ROOT / "plugins")]

from pegboard.cli import main

if __name__ == "__main__":
    sys.exit(main())
