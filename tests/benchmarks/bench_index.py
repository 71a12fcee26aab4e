"""Index a large jsonl for random access, and read records of it at random.

`python tests/benchmarks/bench_index.py [--gib 1.0] [--folder /tmp] [--rounds 5]` writes a file of chat
records (about 1.9 kB each), then, in fresh processes and interleaved rounds: ours, the standard
library's way (read lines, note offsets) and, where installed, datasets. Wall and CPU seconds are
medians; private memory is what the process holds beyond mapped files, at its highest.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "core"), str(ROOT / "plugins")]

NUM_READ = 20_000

PROBE = """
import json, os, random, resource, sys, threading, time

def private_kib():
    fields = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))

path, variant, num_read = sys.argv[1], sys.argv[2], int(sys.argv[3])
if variant == "ours":
    from pegboard_plugins.records.line_index import LineIndex
elif variant == "datasets":
    import datasets
    datasets.disable_progress_bars()
base = private_kib()
peak, stop = [base], threading.Event()
def watch():
    while not stop.wait(0.002):
        peak[0] = max(peak[0], private_kib())
thread = threading.Thread(target=watch)
thread.start()
wall, cpu = time.perf_counter(), time.process_time()
if variant == "ours":
    index = LineIndex(path)
    number, read = len(index), index.read_record
elif variant == "lines":
    offsets = [0]
    with open(path, "rb") as file:
        for line in file:
            offsets.append(offsets[-1] + len(line))
    number = len(offsets) - 1
    opened = open(path, "rb")
    def read(i):
        opened.seek(offsets[i])
        return json.loads(opened.read(offsets[i + 1] - offsets[i]))
else:
    import tempfile
    cache = tempfile.TemporaryDirectory(dir=os.path.dirname(path))
    table = datasets.load_dataset("json", data_files=path, split="train", cache_dir=cache.name)
    number, read = len(table), table.__getitem__
index_s, index_cpu_s = time.perf_counter() - wall, time.process_time() - cpu
private = max(peak[0], private_kib()) - base
places = random.Random(0).choices(range(number), k=num_read)
wall, cpu = time.perf_counter(), time.process_time()
for place in places:
    record = read(place)
read_s, read_cpu_s = time.perf_counter() - wall, time.process_time() - cpu
stop.set(); thread.join()
print(json.dumps([number, index_s, index_cpu_s, private / 1024, read_s, read_cpu_s]))
"""


def write_file(path: Path, num_bytes: int) -> int:
    """Chat records of 0.2 to 4 kB; returns their number."""
    draw = random.Random(7)
    words = [f"{chr(97 + i % 26)}{i:x}" for i in range(5000)]
    lines = []
    for _ in range(2000):
        messages = [
            {"role": role, "content": " ".join(draw.choices(words, k=draw.randint(5, 330)))}
            for role in ("user", "assistant")
        ]
        lines.append(
            json.dumps({"messages": messages, "id": draw.getrandbits(60)}).encode() + b"\n"
        )
    block = b"".join(lines)
    times = -(-num_bytes // len(block))
    with path.open("wb") as file:
        for _ in range(times):
            file.write(block)
    return times * len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=1e9 / 2**30)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variants", default="ours,lines,datasets")
    arguments = parser.parse_args()
    variants = arguments.variants.split(",")
    if (
        "datasets" in variants
        and subprocess.run(
            [sys.executable, "-c", "import datasets"], capture_output=True, check=False
        ).returncode
    ):
        variants.remove("datasets")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "data.jsonl"
        number = write_file(path, int(arguments.gib * 2**30))
        print(f"{path.stat().st_size / 1e9:.2f} GB, {number:,} lines")
        rows: dict[str, list[list[float]]] = {name: [] for name in variants}
        for _ in range(arguments.rounds):
            for name in variants:
                done = subprocess.run(
                    [sys.executable, "-c", PROBE, str(path), name, str(NUM_READ)],
                    env={"PYTHONPATH": f"{ROOT / 'core'}:{ROOT / 'plugins'}", "HOME": folder},
                    capture_output=True,
                    text=True,
                    check=True,
                )
                row = json.loads(done.stdout)
                assert row[0] == number
                rows[name].append(row[1:])
        print("variant    index s  (cpu s)  private MiB  20,000 records s  (cpu s)")
        for name, results in rows.items():
            medians = [statistics.median(column) for column in zip(*results, strict=True)]
            print("{:9} {:8.3f} {:8.3f} {:12.1f} {:17.3f} {:8.3f}".format(name, *medians))


if __name__ == "__main__":
    main()
