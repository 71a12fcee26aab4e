"""The claim: of 1,000 hostile image records none crashes, hangs or reads outside media_root; each is counted."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pegboard import DataError, DroppedSample, ImageTokens, ModelComponent
from pegboard.contracts import TokenizeFn
from pegboard.token_store import build_store
from pegboard_plugins.chat.component import ChatTokenizeFn
from pegboard_plugins.collators.vision import VisionCollator
from pegboard_plugins.intern_s1_chat.component import InternS1TokenizeFn
from pegboard_plugins.jsonl.media_records import MediaJsonlRecords
from pegboard_plugins.tokenizers.byte_tokenizer import make_byte_tokenizer

NUM_RECORDS = 1000
LIMIT_S = 240
_OPENED: list[str] | None = None


class _Model(ModelComponent):
    """What a tokenize function asks of a model."""

    def image_tokens(self) -> ImageTokens:
        return ImageTokens(28, 4, 265)


def _note_opens(event: str, arguments: tuple[Any, ...]) -> None:
    if _OPENED is not None and event == "open" and isinstance(arguments[0], str | bytes):
        _OPENED.append(os.fsdecode(arguments[0]))


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Every path that is opened meanwhile, by anybody in this process."""
    global _OPENED
    sys.addaudithook(_note_opens)  # an audit hook stays; the list ends it
    _OPENED = []
    yield _OPENED
    _OPENED = None


@pytest.fixture
def deadline() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"a hostile record took more than {LIMIT_S} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def _picture(rng: random.Random) -> bytes:
    side = rng.randint(1, 40)
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (side, 30, 3), np.uint8)
    image = Image.fromarray(pixels)
    form = rng.choice(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "ICO", "PPM"])
    if form in ("GIF", "PNG", "TIFF") and rng.random() < 0.4:
        image = image.convert(rng.choice(["P", "L", "1"]))
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def _mutated(content: bytes, rng: random.Random) -> bytes:
    body = bytearray(content)
    for _ in range(rng.choice([1, 1, 3, 20])):
        at = rng.randrange(len(body) + 1)
        kind = rng.randrange(5)
        if kind == 0 and body:
            body[at % len(body)] = rng.randrange(256)
        elif kind == 1:
            del body[at:]
        elif kind == 2:
            del body[at : at + rng.randrange(1, 9)]
        elif kind == 3:
            body[at:at] = rng.randbytes(rng.randrange(1, 9))
        else:
            body[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"])
        if not body:
            break
    return bytes(body)


_PATHS = (
    "../secret.png",
    "../../secret.png",
    "sub/../../secret.png",
    "{outside}/secret.png",
    "/etc/passwd",
    "/dev/zero",
    "/dev/stdin",
    "/proc/self/environ",
    "out.png",
    "outdir/secret.png",
    "pipe.png",
    "sub",
    ".",
    "..",
    "",
    "\0",
    "good.png\0.png",
    "x" * 4000,
    "a/" * 3000,
    "http://127.0.0.1:9/a.png",
    "https://[::1]/a.png",
    "file:///etc/passwd",
    "FILE:/etc/passwd",
    "s3://bucket/a.png",
    "ftp://x/y",
    "..%2fsecret.png",
    "..\\secret.png",
    "~/.bashrc",
    "$HOME/x.png",
    "loop.png",
    "\U0001f600.png",
    "good.png/",
    "good.png/x",
)
_SIZES: tuple[Any, ...] = (
    [0, 0],
    [-1, 5],
    [1e9, 1],
    [10**12, 10**12],
    [2**31 - 1, 1],
    [1, 2**31 - 1],
    ["a", "b"],
    [[3]],
    {"w": 1},
    "12x12",
    [1.0, 2.0],
    [True, True],
    [None, None],
    [],
    float("nan"),
    [7, 9],
)
_VALUES: tuple[Any, ...] = (
    None,
    7,
    [],
    {},
    [1, 2],
    {"url": None},
    {"url": 3},
    {"url": ["a"]},
    True,
)


def _hostile(root: Path, outside: Path, number: int, rng: random.Random) -> Any:
    def chat(part: Any, text: str = "what?") -> Any:
        if isinstance(part, dict) and rng.random() < 0.3:  # listed beside the turns
            kind = "video" if "video_url" in part else "image"
            value = part.get(f"{kind}_url", part.get(kind))
            turns = [
                {"from": "human", "value": f"<{kind}>{text}"},
                {"from": "gpt", "value": "this"},
            ]
            listed = {kind: value} if rng.random() < 0.5 else {f"{kind}s": [value]}
            return {**listed, "conversations": turns}
        content = [part, {"type": "text", "text": text}]
        user = {"role": "user", "content": content}
        return {"messages": [user, {"role": "assistant", "content": "this"}]}

    def image(url: Any, **more: Any) -> Any:
        return {"type": "image_url", "image_url": {"url": url, **more}}

    kind = rng.randrange(8)
    name = f"{number}.{rng.choice(['png', 'jpg', 'gif', 'mp4', ''])}"
    if kind <= 1:  # broken bytes in a file
        (root / name).write_bytes(_mutated(_picture(rng), rng))
        known = {"image_wh": [rng.randint(1, 50), rng.randint(1, 50)]} if rng.random() < 0.3 else {}
        return chat(image(name, **known))
    if kind == 2:  # broken bytes in a data: URL
        coded = base64.b64encode(_mutated(_picture(rng), rng)).decode()
        head = rng.choice(["data:image/png;base64,", "data:;base64,", "data:,", "DATA:x;base64,"])
        url = head + (coded if rng.random() < 0.7 else coded[:-1] + rng.choice("*=-"))
        return chat(image(url))
    if kind == 3:
        return chat(image(rng.choice(_PATHS).replace("{outside}", str(outside))))
    if kind == 4:
        return chat(image("good.png", image_wh=rng.choice(_SIZES)))
    if kind == 5:  # the wrong shape of part
        value = rng.choice(_VALUES)
        part = rng.choice(
            [
                {"type": "image_url", "image_url": value},
                {"type": "image", "image": value},
                {"type": "video_url", "video_url": value},
                {"type": value},
                value,
                {"type": "image"},
            ]
        )
        return chat(part)
    if kind == 6:  # videos
        video = root / "good.mp4"
        whole = video.read_bytes() if video.is_file() else _picture(rng)
        name = name if rng.random() < 0.3 else f"{number}.mp4"
        (root / name).write_bytes(_mutated(whole, rng))
        url = rng.choice([name, name, rng.choice(["good.gif", *_PATHS])])
        url = url.replace("{outside}", str(outside))
        return chat({"type": "video_url", "video_url": {"url": url}})
    marks = "<IMG_CONTEXT>" * rng.randrange(4) + "<VIDEO_CONTEXT>" * rng.randrange(2)
    if rng.random() < 0.3:
        return rng.choice([[], {"messages": None}, {"messages": [1]}, {"messages": {}}, {}])
    return chat(image("good.png"), marks)


def _write_video(path: Path) -> None:
    """A tiny mp4, where PyAV is there to write it."""
    try:
        import av
    except ImportError:
        return
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for number in range(6):
            frame = Image.new("RGB", (32, 32), (number * 40, 90, 0))
            make: Any = av.VideoFrame.from_image
            container.mux(stream.encode(make(frame)))
        container.mux(stream.encode())


def _prepare_root(tmp_path: Path) -> tuple[Path, Path]:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "sub").mkdir(parents=True)
    outside.mkdir()
    secret = Image.new("RGB", (30, 30), (1, 2, 3))
    secret.save(outside / "secret.png")
    secret.save(tmp_path / "secret.png")
    Image.new("RGB", (30, 30), "white").save(root / "good.png")
    frames = [Image.new("RGB", (30, 30), (n, n, n)) for n in (200, 220, 240)]
    frames[0].save(root / "good.gif", save_all=True, append_images=frames[1:])
    _write_video(root / "good.mp4")
    (root / "out.png").symlink_to(outside / "secret.png")
    (root / "outdir").symlink_to(outside)
    (root / "loop.png").symlink_to(root / "loop.png")
    os.mkfifo(root / "pipe.png")
    return root, outside


def _write(root: Path, outside: Path, path: Path) -> int:
    """Hostile records, and a good one after each tenth; returns how many are good."""
    rng = random.Random(20)
    good = {"type": "image_url", "image_url": {"url": "good.png", "image_wh": [30, 30]}}
    lines = []
    num_good = 0
    for number in range(NUM_RECORDS):
        if number % 10 == 9:
            user = {"role": "user", "content": [good, {"type": "text", "text": "good?"}]}
            record: Any = {"messages": [user, {"role": "assistant", "content": "good"}]}
            num_good += 1
        else:
            record = _hostile(root, outside, number, rng)
        lines.append(json.dumps(record))
    path.write_text("\n".join(lines) + "\n")
    return num_good


@pytest.mark.parametrize("check", ["lazy", "decode"])
def test_1000_hostile_records_end_in_samples_or_counted_reasons(
    tmp_path: Path, check: str, opened: list[str], deadline: None
) -> None:
    del deadline
    root, outside = _prepare_root(tmp_path)
    path = tmp_path / "data.jsonl"
    num_good = _write(root, outside, path)
    dataset = MediaJsonlRecords("d", [str(path)], media_root=str(root), check_media=check)
    chat = ChatTokenizeFn(ChatTokenizeFn.Config())
    tokenize = InternS1TokenizeFn(InternS1TokenizeFn.Config(max_length=2000, chat=chat)).build(
        make_byte_tokenizer(image_tokens=True), _Model(ModelComponent.Config())
    )
    opened.clear()
    reasons = _reasons(dataset, tokenize)
    store = build_store(tmp_path / "store", dataset, tokenize, on_bad_record="skip", name="d")
    assert len(store) == reasons.pop("sample")
    assert len(store) + sum(reasons.values()) == NUM_RECORDS
    expected = {
        "image outside media_root",
        "image is a URL",
        "image path invalid",
        "image missing",
        "image no file",
        "image not readable",
        "image data URL invalid",
        "image_wh invalid",
        "image not named",
        "video not named",
        "placeholders differ",
    }
    assert expected <= reasons.keys(), expected - reasons.keys()

    counted = {
        name.removeprefix("bad record: "): count
        for name, count in store.meta["events"].items()
        if name.startswith("bad record: ")
    }
    assert counted == {name: reasons[name] for name in counted} and expected <= counted.keys()

    skipped, seen_good = _load_all(store)
    assert seen_good == num_good
    assert skipped == 0 or check == "lazy"
    forbidden = (str(outside), "/etc/passwd", "/dev/", "/proc/self/environ")
    outside_paths = [
        name
        for name in opened
        if os.path.realpath(name).startswith(forbidden) or name == str(tmp_path / "secret.png")
    ]
    assert outside_paths == []


def _reasons(dataset: MediaJsonlRecords, tokenize: TokenizeFn) -> Counter[str]:
    """What became of each record; every error is one line of text."""
    reasons: Counter[str] = Counter()
    for index in range(len(dataset)):
        try:
            reasons["sample"] += len(tokenize(dataset[index]))
        except DroppedSample as dropped:
            reasons[dropped.reason] += 1
        except DataError as error:
            assert "\n" not in str(error)
            reasons[getattr(error, "reason", "no chat record")] += 1
    return reasons


def _load_all(store: Any) -> tuple[int, int]:
    """(samples left out when loading, good samples loaded); never a pixel of the secret picture."""
    collator: Callable[..., Any] = VisionCollator(pad_token_id=0)
    skipped = seen_good = 0
    for index in range(len(store)):
        example = store[index]
        example.may_skip = True
        batch = collator([example])
        skipped += batch.num_skipped
        if batch.media:
            pixels = batch.media["pixel_values"]
            assert len(pixels) == example.num_tiles
            assert (pixels[:, :, 0, 0] != pixels.new_tensor([1, 2, 3])).any()
        seen_good += (example.key.line % 10 == 0) and not batch.num_skipped
    return skipped, seen_good
