"""The claim: the vision quick start draws the same pictures every time, its config fits them, and its page is whole."""

from __future__ import annotations

import importlib.util
import json
import random
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "docs" / "examples" / "quickstart_vlm"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"vlm_{name}", EXAMPLE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


draw, answer = _load("draw"), _load("answer")


def test_the_same_seed_draws_the_same_pictures(tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw.draw_all(tmp_path / name, num_train=6, num_held_out=3)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 11
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()


def test_no_held_out_picture_is_trained_on(tmp_path: Path) -> None:
    draw.draw_all(tmp_path, num_train=40, num_held_out=20)
    pictures = [path.read_bytes() for path in sorted((tmp_path / "pictures").iterdir())]
    assert not set(pictures[:40]) & set(pictures[40:])


def test_every_number_colour_and_shape_is_drawn_about_as_often(tmp_path: Path) -> None:
    rng = random.Random(1)
    words: Counter[str] = Counter()
    for _ in range(300):
        words.update(draw.draw_picture(tmp_path / "x.png", rng).split())
    assert min(words[number] for number in draw.NUMBERS) > 70
    assert min(words[colour] for colour in draw.COLOURS) > 25


def test_plurals_are_words() -> None:
    assert draw.describe(1, "red", "cross") == "one red cross"
    assert draw.describe(2, "red", "cross") == "two red crosses"
    assert draw.describe(3, "blue", "square") == "three blue squares"


def test_the_config_trains_on_what_is_drawn() -> None:
    config = json.loads((ROOT / "configs" / "quickstart_vlm.json").read_text(encoding="utf-8"))
    vision = config["model"]["vision_config"]
    assert vision["image_size"] == draw.SIDE and "load_from" not in config
    pictures, text = (entry["dataset"] for entry in config["datasets"])
    assert pictures["anno_path"].startswith(pictures["media_root"])
    assert text["anno_path"] == "configs/data/quickstart_chat.jsonl"
    assert draw.NUM_TRAIN >= 3000 and draw.NUM_HELD_OUT == 40
    assert f"{config['work_dir']}/{config['run_name']}" == "work_dirs/quickstart_vlm"


def test_the_page_holds_every_picture_and_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    said = draw.draw_picture(path, random.Random(0))
    answers = [answer.Answer(path, "?", said, said), answer.Answer(path, "?", said, "<b>")]
    page = answer.page(answers)
    assert page.count("data:image/png;base64,") == 2 and "1 of 2 right" in page
    assert "&lt;b&gt;" in page and "<b>" not in page
    assert len(re.findall('class="wrong"', page)) == 1


def test_without_an_export_it_says_how_to_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer.main([str(tmp_path)]) == 2
    assert "core/run.py configs/quickstart_vlm.json" in capsys.readouterr().err
