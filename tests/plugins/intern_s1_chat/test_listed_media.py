"""The claim: records that list their pictures beside the turns, as LLaVA's and others' do, give the same samples as
records that name them in the messages."""

from __future__ import annotations

import base64
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pegboard import DataError, Example, ImageTokens, ModelComponent
from pegboard.contracts import TokenizeFn
from pegboard_plugins.chat.component import ChatTokenizeFn, TextTokenizeFn
from pegboard_plugins.intern_s1_chat.component import InternS1TokenizeFn
from pegboard_plugins.jsonl.media_records import MediaJsonlRecords
from pegboard_plugins.media.places import MediaError
from pegboard_plugins.media.references import TileLoader, media_spans
from pegboard_plugins.records.formats import PromptCompletionFormat, ShareGPTFormat
from pegboard_plugins.tokenizers.byte_tokenizer import make_byte_tokenizer

TOKENIZER = make_byte_tokenizer(image_tokens=True)
load_tiles = TileLoader()


class _Model(ModelComponent):
    """What a tokenize function asks of a model."""

    def image_tokens(self) -> ImageTokens:
        return ImageTokens(28, 4, 265)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    Image.new("RGB", (56, 28), (1, 0, 0)).save(tmp_path / "wide.png")
    Image.new("RGB", (30, 30), (2, 0, 0)).save(tmp_path / "square.png")
    frames = [Image.new("RGB", (8, 8), (n, 0, 0)) for n in range(5)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
    return tmp_path


def _tokenize_fn(record_format: Any = None, **fields: Any) -> TokenizeFn:
    named = {} if record_format is None else {"record_format": record_format}
    fields.setdefault("chat", ChatTokenizeFn(ChatTokenizeFn.Config(**named)))
    config = InternS1TokenizeFn.Config(**fields)
    return InternS1TokenizeFn(config).build(TOKENIZER, _Model(ModelComponent.Config()))


def _tokenize(root: Path, record: Any, **fields: Any) -> Example:
    path = root / "data.jsonl"
    path.write_text(json.dumps(record) + "\n")
    dataset = MediaJsonlRecords("d", [str(path)], media_root=str(root))
    return _tokenize_fn(**fields)(dataset[0])[-1]


def _image(name: str) -> dict[str, Any]:
    return {"type": "image", "image": f"{name}.png"}


def _written(*names: str) -> dict[str, Any]:
    """The record that names its pictures in the text's places: texts, and names with an @."""
    content = [
        _image(name[1:]) if name[0] == "@" else {"type": "text", "text": name} for name in names
    ]
    user = {"role": "user", "content": content}
    return {"messages": [user, {"role": "assistant", "content": "yes"}]}


def _same(one: Example, other: Example) -> None:
    assert TOKENIZER.decode(one.input_ids) == TOKENIZER.decode(other.input_ids)
    assert one.input_ids.tolist() == other.input_ids.tolist()
    assert one.loss_mask.tolist() == other.loss_mask.tolist()
    assert one.media == other.media and one.num_tiles == other.num_tiles > 0


def _turns(question: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "yes"}]


ONE = ("@wide", "What?")
"""A picture part is followed by a newline, as `<image>` and a newline are."""
FORMS: dict[str, Any] = {
    "LLaVA": {"id": "0", "image": "wide.png", "conversations": _turns("<image>\nWhat?")},
    "without a placeholder": {"image": "wide.png", "conversations": _turns("What?")},
    "a list": {"images": ["wide.png"], "conversations": _turns("<image>\nWhat?")},
    "messages of text": {
        "images": [{"path": "wide.png", "bytes": None, "image_wh": [56, 28]}],
        "messages": [
            {"role": "user", "content": "<image>\nWhat?"},
            {"role": "assistant", "content": "yes"},
        ],
    },
    "messages with a part that names none": {
        "images": ["wide.png"],
        "messages": _written("What?")["messages"],
    },
    "conversations with roles": {
        "images": ["wide.png"],
        "conversations": _written("What?")["messages"],
    },
    "Alpaca": {"images": ["wide.png"], "instruction": "<image>\nWhat?", "output": "yes"},
    "prompt and completion": {"image": "wide.png", "prompt": "What?", "completion": "yes"},
    "named there too": {**_written(*ONE), "images": ["wide.png"]},
}
FORMS["messages with a part that names none"]["messages"][0]["content"].insert(
    0, {"type": "image", "image": None}
)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_sample_of_the_written_one(root: Path, form: str) -> None:
    _same(_tokenize(root, FORMS[form]), _tokenize(root, _written(*ONE)))


def test_places_are_taken_in_order_over_turns(root: Path) -> None:
    record = {
        "images": ["wide.png", "square.png", "wide.png"],
        "conversations": [
            {"from": "human", "value": "<image> or <image>?"},
            {"from": "gpt", "value": "one"},
            {"from": "human", "value": "and <image>"},
            {"from": "gpt", "value": "two"},
        ],
        "system": "Look.",
    }
    example = _tokenize(root, record, max_dynamic_patch=6)
    assert [item["ref"] for item in example.media["items"]] == record["images"]
    rows = [
        row for start, count in media_spans(example.media) for row in range(start, start + count)
    ]
    assert rows == np.flatnonzero(example.input_ids == 265).tolist()
    text = TOKENIZER.decode(example.input_ids)
    assert "<image>" not in text and text.count("</img> or <img>") == 1
    assert text.startswith("<|im_start|>system\nLook.")
    assert TOKENIZER.decode(example.input_ids[example.loss_mask]).endswith("two<|im_end|>")


def test_videos_are_listed_alike(root: Path) -> None:
    record = {"video": "clip.gif", "conversations": _turns("<video>What?")}
    example = _tokenize(root, record, max_num_frames=2)
    assert example.media["items"][0]["frames"] == [1, 3] and example.num_tiles == 2
    both = {**record, "image": "wide.png", "conversations": _turns("<image> <video>")}
    assert [item["ref"] for item in _tokenize(root, both).media["items"]] == [
        "wide.png",
        "clip.gif",
    ]


def test_keys_and_placeholders_have_the_names_that_the_config_gives(root: Path) -> None:
    record = {"picture": "wide.png", "talk": _turns("<ImageHere>\nWhat?")}
    fields: dict[str, Any] = {"image_keys": ("picture",), "image_placeholder": "<ImageHere>"}
    form: Any = ShareGPTFormat(ShareGPTFormat.Config(conversations="talk"))
    _same(_tokenize(root, record, record_format=form, **fields), _tokenize(root, _written(*ONE)))
    asked = {"image": "wide.png", "question": "What?", "answer": "yes"}
    form = PromptCompletionFormat(
        PromptCompletionFormat.Config(prompt="question", completion="answer")
    )
    _same(_tokenize(root, asked, record_format=form), _tokenize(root, _written(*ONE)))
    one, other = (_tokenize_fn(record_format=f) for f in (form, None))
    assert one.fingerprint() != other.fingerprint()
    assert _tokenize_fn(image_keys=("a",)).fingerprint() != other.fingerprint()


def test_a_record_that_lists_nothing_is_text_and_its_placeholder_is_counted(root: Path) -> None:
    lists: tuple[dict[str, Any], ...] = ({}, {"image": None}, {"image": ""}, {"images": []})
    for image in lists:
        example = _tokenize(root, {**image, "conversations": _turns("<image> What?")})
        assert not example.media and b"<image>" in bytes(
            example.input_ids[example.input_ids < 256].tolist()
        )
    tokenize = _tokenize_fn()
    path = root / "data.jsonl"
    path.write_text(
        json.dumps({"img": "wide.png", "conversations": _turns("<image> What?")}) + "\n"
    )
    tokenize(MediaJsonlRecords("d", [str(path)], media_root=str(root))[0])
    assert tokenize.take_counts()["<image> without a picture"] == 1
    ignored = {"image": "nowhere.png", "conversations": _turns("What?")}
    assert not _tokenize(root, ignored, image_keys=()).media


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_bytes_listed_in_a_record_are_found_again(root: Path, form: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (28, 28), (9, 8, 7)).save(file, "PNG")
    path = root / f"data.{form}"
    turns = _turns("<image>\nWhat?")
    if form == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        image = {"bytes": file.getvalue(), "path": "from/elsewhere.png"}
        rows = [{"conversations": turns, "image": image, "images": None}] * 3
        parquet.write_table(pyarrow.Table.from_pylist(rows), str(path), row_group_size=2)
    else:
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        record = {"images": ["wide.png", url], "conversations": _turns("<image><image>")}
        path.write_text((json.dumps(record) + "\n") * 3)
    dataset = MediaJsonlRecords("d", [str(path)], media_root=str(root))
    for index in (2, 0):
        (example,) = _tokenize_fn()(dataset[index])
        kept = json.loads(json.dumps(example.media))
        tiles = list(pickle.loads(pickle.dumps(load_tiles))(kept))
        assert tiles[-1][0, :, 0, 0].tolist() == [9, 8, 7] and len(json.dumps(kept)) < 1000


def test_a_part_inside_turns_of_any_form_is_found_again(root: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (28, 28), (9, 8, 7)).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [_image("wide"), {"type": "image", "image": url}, {"type": "text", "text": "a"}]
    answer = [{"role": "assistant", "content": "b"}]
    for record in (
        {"prompt": [{"role": "user", "content": content}], "completion": answer},
        {"conversations": [{"role": "user", "content": content}, *answer]},
        {"conversations": [{"from": "human", "value": content}, {"from": "gpt", "value": "b"}]},
    ):
        example = _tokenize(root, record)
        assert list(load_tiles(example.media))[1][0, :, 0, 0].tolist() == [9, 8, 7]


def test_plain_text_with_pictures_trains_on_the_text_alone(root: Path) -> None:
    listed = _tokenize(root, {"text": "<image>a cat", "image": "wide.png"})
    parts = [_image("wide"), {"type": "text", "text": "a cat"}]
    message = {"role": "pretrain", "content": parts}
    named = _tokenize(root, {"messages": [message]})
    assert TOKENIZER.decode(listed.input_ids).endswith("</img>a cat<|im_end|>")
    assert TOKENIZER.decode(named.input_ids).endswith("</img>\na cat<|im_end|>")
    for example in (listed, named):
        assert example.num_tiles == 3 and not example.loss_mask[example.input_ids >= 265].any()
        assert TOKENIZER.decode(example.input_ids[example.loss_mask]).strip().startswith("a cat")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"image": "wide.png", "conversations": _turns("<image> <image>")},
            "they hold 2 <image>, but image lists 1 images",
        ),
        (
            {"images": ["wide.png", "square.png"], "conversations": _turns("<image>")},
            "they hold 1 <image>, but images lists 2 images",
        ),
        (
            {**_written(*ONE), "images": ["square.png"]},
            "name 1 images, and images lists 1; leave one of both out",
        ),
        ({"images": [7], "conversations": _turns("<image>")}, r"images\[0\]: expected"),
        ({"image": {"w": 1}, "conversations": _turns("<image>")}, "image: expected"),
        ({"image": "../wide.png", "conversations": _turns("a")}, "leads out of media_root"),
        ({"image": "none.png", "conversations": _turns("a")}, "none.png' not found under"),
        (
            {"input_ids": [1, 2], "labels": [1, 2], "image": "wide.png"},
            "has no messages that could",
        ),
        ({"image": "wide.png", "talk": _turns("a")}, "fits no record format"),
    ],
)
def test_what_does_not_fit_is_refused(root: Path, record: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        _tokenize(root, record)


def test_more_places_than_pictures_of_parts_are_refused(root: Path) -> None:
    holes = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "a <image>"}]
    record = {"images": ["wide.png"], **_written("x")}
    record["messages"][0]["content"] = holes
    with pytest.raises(MediaError, match="2 parts of type image and 1 <image>, but images lists 1"):
        _tokenize(root, record)


def test_a_tokenize_fn_without_record_formats_reads_messages_as_before(root: Path) -> None:
    chat = TextTokenizeFn(TextTokenizeFn.Config())
    with pytest.raises(DataError, match="has no messages that could hold them"):
        _tokenize(root, {"text": "<image>", "image": "wide.png"}, chat=chat)
