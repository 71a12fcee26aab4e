"""Draw the pictures of the vision quick start: one to three shapes of one colour, and what they are.

    python docs/examples/quickstart_vlm/draw.py [FOLDER]

FOLDER (default: work_dirs/quickstart_vlm_data) gets `pictures/`, `train.jsonl` (3,000 records) and
`held_out.jsonl` (40). The same seed draws the same pictures; no held-out picture is trained on. A
folder that is complete is left as it is.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
from pathlib import Path

from PIL import Image, ImageDraw

__all__ = ["COLOURS", "SHAPES", "describe", "draw_all", "draw_picture", "main"]

NUM_TRAIN = 3000
NUM_HELD_OUT = 40
SIDE = 48
CELLS = 3
QUESTION = "What is this?"
COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (37, 99, 235),
    "yellow": (240, 196, 25),
    "purple": (147, 51, 194),
    "black": (24, 24, 27),
}
SHAPES = ("circle", "square", "triangle", "cross")
NUMBERS = ("one", "two", "three")


def main(argv: list[str] | None = None) -> int:
    """Draw whatever is missing; return the exit code."""
    parser = argparse.ArgumentParser(description="Draw the vision quick start's pictures.")
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path("work_dirs/quickstart_vlm_data"),
        help="where to (default: %(default)s)",
    )
    folder: Path = parser.parse_args(argv).folder
    if (folder / "held_out.jsonl").is_file():
        print(f"{folder}: drawn already")
        return 0
    draw_all(folder, num_train=NUM_TRAIN, num_held_out=NUM_HELD_OUT)
    print(f"{folder}: {NUM_TRAIN + NUM_HELD_OUT} pictures drawn")
    return 0


def draw_all(folder: Path, *, num_train: int, num_held_out: int, seed: int = 0) -> None:
    """Write pictures and records; held_out.jsonl comes last, so that it marks a complete folder."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "pictures").mkdir(parents=True)
    rng = random.Random(seed)
    number = 0
    for name, count in (("train", num_train), ("held_out", num_held_out)):
        lines = []
        for _ in range(count):
            path = f"pictures/{number:05}.png"
            answer = draw_picture(folder / path, rng)
            lines.append(json.dumps(_record(path, answer)))
            number += 1
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw_picture(path: Path, rng: random.Random) -> str:
    """Draw one picture; returns what it shows."""
    shape, colour = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
    count = rng.randint(1, len(NUMBERS))
    scale = 4  # drawn large and shrunk, so that edges are smooth
    ground = tuple(rng.randint(225, 255) for _ in range(3))
    image = Image.new("RGB", (SIDE * scale, SIDE * scale), ground)
    pen = ImageDraw.Draw(image)
    for x, y, radius in _places(count, rng):
        _draw_shape(pen, shape, x * scale, y * scale, radius * scale, COLOURS[colour])
    image.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(path)
    return describe(count, colour, shape)


def describe(count: int, colour: str, shape: str) -> str:
    """Such as `two red circles`."""
    plural = "" if count == 1 else "es" if shape.endswith("ss") else "s"
    return f"{NUMBERS[count - 1]} {colour} {shape}{plural}"


def _record(path: str, answer: str) -> dict[str, object]:
    picture = {"type": "image_url", "image_url": {"url": path, "image_wh": [SIDE, SIDE]}}
    content = [picture, {"type": "text", "text": QUESTION}]
    return {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": answer},
        ]
    }


def _places(count: int, rng: random.Random) -> list[tuple[float, float, float]]:
    """(x, y, radius) of shapes, each somewhere in its own cell of a grid."""
    cell = SIDE // CELLS
    places = []
    for number in rng.sample(range(CELLS * CELLS), count):
        radius = rng.uniform(0.38, 0.44) * cell
        x, y = (
            cell * (place + 0.5) + rng.uniform(-1, 1) * (cell / 2 - 1.1 * radius)
            for place in divmod(number, CELLS)
        )
        places.append((x, y, radius))
    return places


def _draw_shape(
    pen: ImageDraw.ImageDraw,
    shape: str,
    x: float,
    y: float,
    radius: float,
    colour: tuple[int, int, int],
) -> None:
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif shape == "square":
        half = radius * 0.92
        pen.rectangle((x - half, y - half, x + half, y + half), fill=colour)
    elif shape == "triangle":
        corners = [
            (x + 1.1 * radius * math.sin(turn), y - 1.1 * radius * math.cos(turn))
            for turn in (0.0, 2 * math.pi / 3, 4 * math.pi / 3)
        ]
        pen.polygon(corners, fill=colour)
    else:
        arm = radius * 0.26
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)


if __name__ == "__main__":
    sys.exit(main())
