"""CPU time of `pegboard --help`, `plugins`, `check` and `schema` beside 500 installed distributions.

`python tests/benchmarks/bench_startup.py [--distributions 500] [--plugins 10] [--repeats 15]` makes a
folder of so many synthetic distributions (metadata, files list, console scripts) and plugins (a module
with one part of eight fields each), and starts each command in fresh processes, the commands taking
turns. Reported is user plus system time of the process as the system counts it, interpreter
included, and the time of a bare `python -c pass` beside it. Bytecode is cached, as after an install. Exit code 1 if
a median is over 0.6 s or a command imports torch or transformers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 0.6
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "--help": ["-m", "pegboard", "--help"],
    "plugins": ["-m", "pegboard", "plugins"],
    "check": ["-m", "pegboard", "check", str(ROOT / "configs" / "quickstart.json")],
    "schema": ["-m", "pegboard", "schema"],
}
PLUGIN = '''
"""A plugin with one part."""
from typing import Literal
from pydantic import Field
import pegboard


class Loss{number}(pegboard.LossComponent):
    """A synthetic loss."""

    class Config(pegboard.ComponentConfig):
{fields}

    config: Config

    def build(self):
        return None


@pegboard.hookimpl
def register_losses(register):
    register(Loss{number})
'''
FIELD = '        field_{index}: {kind} = Field(default={default}, description="A field.")'
KINDS = [("int", "1"), ("float", "0.5"), ("str | None", "None"), ('Literal["a", "b"]', '"a"')]


def make_site(site: Path, num_distributions: int, num_plugins: int) -> Path:
    """A site-packages folder of distributions, the last ones of them plugins."""
    site.mkdir(parents=True)
    for number in range(num_distributions):
        plugin = number >= num_distributions - num_plugins
        name = f"peg-synthetic-{number}" if plugin else f"synthetic-{number}"
        module = name.replace("-", "_")
        info = site / f"{module}-1.{number}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.{number}\nSummary: Synthetic.\n"
            + "".join(f"Requires-Dist: dependency-{n}>=1\n" for n in range(12))
            + "\n"
            + "A description.\n" * 100
        )
        (info / "RECORD").write_text("".join(f"{module}/{n}.py,sha256=x,1\n" for n in range(60)))
        (info / "WHEEL").write_text("Wheel-Version: 1.0\n")
        if plugin:
            (info / "entry_points.txt").write_text(f"[pegboard]\nplugin = {module}\n")
            fields = "\n".join(
                FIELD.format(index=i, kind=KINDS[i % 4][0], default=KINDS[i % 4][1])
                for i in range(8)
            )
            (site / f"{module}.py").write_text(PLUGIN.format(number=number, fields=fields))
        elif number % 4 == 0:
            (info / "entry_points.txt").write_text(
                f"[console_scripts]\n{name} = {module}.cli:main\n[other.group]\na = {module}\n"
            )
    return site


def environment(site: Path) -> dict[str, str]:
    paths = [str(ROOT / "core"), str(ROOT / "plugins"), str(site)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def cpu_seconds(words: list[str], site: Path) -> float:
    """User and system time of one process."""
    process = subprocess.Popen(
        [sys.executable, *words],
        env=environment(site),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"{' '.join(words)}: status {status}: {error.decode()}")
    process.returncode = 0
    return usage.ru_utime + usage.ru_stime


def heavy_imports(words: list[str], site: Path) -> list[str]:
    """Which of torch and transformers a command imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *words],
        env=environment(site),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    names = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    return sorted(names & {"torch", "transformers"})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--distributions", type=int, default=500)
    parser.add_argument("--plugins", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        site = make_site(Path(folder) / "site", options.distributions, options.plugins)
        for words in COMMANDS.values():
            cpu_seconds(words, site)  # writes bytecode
        seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
        for _ in range(options.repeats):
            for name, words in COMMANDS.items():
                seconds[name].append(cpu_seconds(words, site))
        print(f"{options.distributions} distributions, {options.plugins} plugins among them")
        print(f"{options.repeats} rounds, load {os.getloadavg()[0]:.1f}")
        print("| command | CPU s, median | smallest | largest |\n|---|---|---|---|")
        for name, found in seconds.items():
            median = statistics.median(found)
            failed |= median > LIMIT_S
            print(f"| `{name}` | {median:.3f} | {min(found):.3f} | {max(found):.3f} |")
        for name, words in list(COMMANDS.items())[1:]:
            if heavy := heavy_imports(words, site):
                failed = True
                print(f"{name} imports {', '.join(heavy)}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
