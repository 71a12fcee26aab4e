"""Let the vision quick start's model say what 40 held-out pictures show, and write a page of it.

The export is opened with transformers alone: Intern-S1's tower, projector and text model are those
of its InternVL classes, under the same tensor names.

    python docs/examples/quickstart_vlm/answer.py [FOLDER] [--data DATA] [--page PAGE]

FOLDER is an export, or a folder of exports (default: work_dirs/quickstart_vlm). Exit code 0 if at
least 30 of the 40 answers are right, 1 if fewer are, 2 if there is no export.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

__all__ = ["Answer", "main", "newest_export", "page"]

NEEDED = 0.75
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Answer(NamedTuple):
    """What the model said of one picture."""

    picture: Path
    question: str
    expected: str
    found: str

    @property
    def right(self) -> bool:
        return self.found == self.expected


def main(argv: list[str] | None = None) -> int:
    """Answer, print, write the page; returns the exit code."""
    parser = argparse.ArgumentParser(description="Let the model answer on held-out pictures.")
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path("work_dirs/quickstart_vlm"),
        help="an export, or a folder that holds exports (default: %(default)s)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("work_dirs/quickstart_vlm_data"),
        help="what draw.py wrote (default: %(default)s)",
    )
    parser.add_argument(
        "--page",
        type=Path,
        default=Path("work_dirs/quickstart_vlm/answers.html"),
        help="where the page goes (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    export = newest_export(arguments.folder)
    if export is None:
        print(
            f"{arguments.folder}: no export found (config.json beside *.safetensors); train "
            "first: python core/run.py configs/quickstart_vlm.json",
            file=sys.stderr,
        )
        return 2
    answers = _answer_all(export, arguments.data)
    num_right = sum(answer.right for answer in answers)
    for answer in answers:
        verdict = "right" if answer.right else f"wrong, expected {answer.expected!r}"
        print(f"{answer.picture.name}: {answer.found}   [{verdict}]")
    print(f"{num_right} of {len(answers)} right")
    arguments.page.parent.mkdir(parents=True, exist_ok=True)
    arguments.page.write_text(page(answers), encoding="utf-8")
    print(f"page: {arguments.page}")
    return 0 if num_right >= NEEDED * len(answers) else 1


def newest_export(folder: Path) -> Path | None:
    """The newest folder at or under `folder` with a config.json and weights; None if there is none.

    Names that start with a dot (something still being written) don't count.
    """
    exports = [
        config.parent
        for config in folder.rglob("config.json")
        if any(config.parent.glob("*.safetensors"))
        and not any(part.startswith(".") for part in config.relative_to(folder).parts)
    ]
    return max(exports, key=lambda export: (export / "config.json").stat().st_mtime, default=None)


def page(answers: list[Answer]) -> str:
    """One HTML file with every picture inside it, its answer, and what it should have been."""
    cards = "\n".join(_card(answer) for answer in answers)
    num_right = sum(answer.right for answer in answers)
    return _PAGE.format(right=num_right, total=len(answers), cards=cards)


def _card(answer: Answer) -> str:
    coded = base64.b64encode(answer.picture.read_bytes()).decode("ascii")
    found, expected = html.escape(answer.found or "(nothing)"), html.escape(answer.expected)
    note = "" if answer.right else f"<small>it is {expected}</small>"
    return (
        f'<figure class="{"right" if answer.right else "wrong"}">'
        f'<img src="data:image/png;base64,{coded}" alt="{expected}" width="144" height="144">'
        f"<figcaption>{found}{note}</figcaption></figure>"
    )


def _answer_all(export: Path, data: Path) -> list[Answer]:
    """Greedy answers on all held-out pictures, in one batch: all prompts are equally long."""
    import torch
    from transformers import AutoTokenizer, InternVLConfig, InternVLForConditionalGeneration

    said = json.loads((export / "config.json").read_text(encoding="utf-8"))
    said["model_type"] = "internvl"
    said["vision_config"]["model_type"] = "internvl_vision"
    config: Any = InternVLConfig.from_dict(said)
    load: Any = InternVLForConditionalGeneration.from_pretrained
    model = load(export, config=config, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(export)
    print(f"model: {export}")

    records = [
        json.loads(line)["messages"]
        for line in (data / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    pictures = [data / user["content"][0]["image_url"]["url"] for user, _ in records]
    questions = [user["content"][1]["text"] for user, _ in records]
    side = config.vision_config.image_size[0]
    pixels = np.stack([_pixels(path, side) for path in pictures])
    prompts = [_prompt(tokenizer, question, config.image_seq_length) for question in questions]
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False) for text in prompts])
    replies = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.from_numpy(pixels),
        do_sample=False,
        max_new_tokens=32,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    found = [
        str(tokenizer.decode(reply[ids.shape[1] :], skip_special_tokens=True)).strip()
        for reply in replies
    ]
    expected = [assistant["content"] for _, assistant in records]
    return [Answer(*row) for row in zip(pictures, questions, expected, found, strict=True)]


def _prompt(tokenizer: Any, question: str, tokens_per_tile: int) -> str:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"<IMG_CONTEXT>\n{question}"}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,  # trained without thoughts: the prompt ends with an empty think block
    )
    tile = f"<img>{'<IMG_CONTEXT>' * tokens_per_tile}</img>"
    return str(text.replace("<IMG_CONTEXT>", tile))


def _pixels(path: Path, side: int) -> np.ndarray:
    """(3, side, side) float32; a picture as small as a tile is one tile."""
    picture = Image.open(path).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    values = np.asarray(picture, dtype=np.float32) / 255
    normalised = (values - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return normalised.transpose(2, 0, 1)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What the pictures show: {right} of {total} right</title>
<style>
  :root {{ color-scheme: light dark; --ink: #1c1f26; --soft: #667085; --ground: #f6f7f9;
    --card: #fff; --line: #e3e6eb; --right: #157f3c; --wrong: #c2281d; }}
  @media (prefers-color-scheme: dark) {{ :root {{ --ink: #e8eaee; --soft: #98a2b3;
    --ground: #14161b; --card: #1e2129; --line: #30343e; --right: #4ac278; --wrong: #ff8577; }} }}
  body {{ margin: 0 auto; max-width: 1120px; padding: 40px 24px 64px; color: var(--ink);
    background: var(--ground); font: 16px/1.45 system-ui, sans-serif; }}
  h1 {{ margin: 0 0 4px; font-size: 28px; font-weight: 650; letter-spacing: -0.01em; }}
  p {{ margin: 0 0 28px; color: var(--soft); }}
  main {{ display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(168px, 1fr)); }}
  figure {{ margin: 0; padding: 12px; background: var(--card); border: 1px solid var(--line);
    border-radius: 12px; border-bottom: 4px solid var(--right); }}
  figure.wrong {{ border-bottom-color: var(--wrong); }}
  img {{ display: block; margin: 0 auto 10px; border-radius: 8px; max-width: 100%; height: auto; }}
  figcaption {{ text-align: center; font-weight: 550; }}
  figcaption::before {{ content: "\\2713\\00a0"; color: var(--right); }}
  .wrong figcaption::before {{ content: "\\2717\\00a0"; color: var(--wrong); }}
  small {{ display: block; color: var(--wrong); font-weight: 450; }}
</style>
</head>
<body>
<h1>{right} of {total} right</h1>
<p>Pictures the model never trained on, and what it says of each.</p>
<main>
{cards}
</main>
</body>
</html>
"""


if __name__ == "__main__":
    sys.exit(main())
