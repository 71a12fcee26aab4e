"""The claim: ids equal those of the text written out, media tokens get no loss, and their places are kept."""

from __future__ import annotations

import base64
import gzip
import io
import json
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pegboard import ConfigError, DataError, DroppedSample, Example, ImageTokens, ModelComponent
from pegboard.contracts import TokenizeFn, Tokenizer
from pegboard_plugins.chat.component import ChatTokenizeFn
from pegboard_plugins.collators.vision import VisionCollator
from pegboard_plugins.intern_s1_chat.component import InternS1TokenizeFn
from pegboard_plugins.intern_s1_chat.tokenizers import INTERN_S1_TEMPLATE, WithTemplate
from pegboard_plugins.jsonl.media_records import MediaJsonlRecords
from pegboard_plugins.media.places import MediaError
from pegboard_plugins.media.references import MediaRecord, TileLoader, media_spans
from pegboard_plugins.tokenizers.byte_tokenizer import make_byte_tokenizer

TOKENS = ImageTokens(tile_size=28, tokens_per_tile=4, image_token_id=265)
load_tiles = TileLoader()
TOKENIZER = make_byte_tokenizer(image_tokens=True)
CHAT = ("history", "typed_special_tokens", "train_on", "rewritten_turns")
SIZES = {"wide": (56, 28), "square": (30, 30), "tall": (20, 61)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, size in SIZES.items():
        Image.new("RGB", size, "teal").save(tmp_path / f"{name}.png")
    frames = [Image.new("RGB", (8, 8), (n, 0, 0)) for n in range(5)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
    return tmp_path


def _image(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"{name}.png", **more}}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _chat(*content: Any, answer: str = "yes") -> dict[str, Any]:
    user = {"role": "user", "content": list(content)}
    return {"messages": [user, {"role": "assistant", "content": answer}]}


def _record(root: Path, record: dict[str, Any], **options: Any) -> MediaRecord:
    path = root / "data.jsonl"
    path.write_text(json.dumps(record) + "\n")
    return MediaJsonlRecords("d", [str(path)], media_root=str(root), **options)[0]


class _Model(ModelComponent):
    """What a tokenize function asks of a model."""

    def image_tokens(self) -> ImageTokens | None:
        tokens: ImageTokens | None = self.config
        return tokens


def _tokenize_fn(
    tokenizer: Tokenizer = TOKENIZER, tokens: ImageTokens | None = TOKENS, **fields: Any
) -> TokenizeFn:
    chat = {name: fields.pop(name) for name in CHAT if name in fields}
    config = InternS1TokenizeFn.Config(chat=ChatTokenizeFn(ChatTokenizeFn.Config(**chat)), **fields)
    return InternS1TokenizeFn(config).build(tokenizer, _Model(tokens))


def _tokenize(root: Path, record: dict[str, Any], **fields: Any) -> Example:
    examples = _tokenize_fn(**fields)(_record(root, record))
    assert len(examples) == 1
    return examples[0]


def _written(*tiles: int) -> str:
    return "".join(f"<img>{'<IMG_CONTEXT>' * 4 * count}</img>" for count in tiles)


def _decoded(example: Example) -> str:
    return TOKENIZER.decode(example.input_ids)


def _trained(example: Example) -> str:
    return TOKENIZER.decode(example.input_ids[example.loss_mask])


def test_ids_equal_those_of_the_text_written_out_in_content_order(root: Path) -> None:
    example = _tokenize(root, _chat(_text("See "), _image("wide"), _text("what?")))
    text = TOKENIZER.render(
        [
            {"role": "user", "content": f"See {_written(3)}\nwhat?"},
            {"role": "assistant", "content": "yes"},
        ]
    )
    assert example.input_ids.tolist() == TOKENIZER.encode(text)
    assert _trained(example) == "yes<|im_end|>"


def test_explicit_placeholders_say_where_pictures_go(root: Path) -> None:
    record = _chat(
        _image("wide"), _image("square"), _text("one <IMG_CONTEXT> two <IMG_CONTEXT> end")
    )
    example = _tokenize(root, record)
    assert f"one {_written(3)} two {_written(1)} end" in _decoded(example)
    refs = [item["ref"] for item in example.media["items"]]
    assert refs == ["wide.png", "square.png"]


def test_placeholders_of_pictures_and_videos_keep_their_own_order(root: Path) -> None:
    video = {"type": "video_url", "video_url": {"url": "clip.gif"}}
    record = _chat(_image("square"), video, _text("<VIDEO_CONTEXT> then <IMG_CONTEXT>"))
    example = _tokenize(root, record, max_num_frames=2)
    frames = f"Frame1: {_written(1)}\nFrame2: {_written(1)}"
    assert f"{frames} then {_written(1)}" in _decoded(example)
    assert [item["ref"] for item in example.media["items"]] == ["clip.gif", "square.png"]
    assert example.media["items"][0]["frames"] == [1, 3]
    assert example.num_tiles == 3 == sum(map(len, load_tiles(example.media)))


def test_no_media_token_ever_gets_loss_even_in_an_answer(root: Path) -> None:
    record = _chat(_text("Draw."))
    record["messages"][1]["content"] = [_text("Here: "), _image("wide"), _text("Done.")]
    example = _tokenize(root, record)
    assert not example.loss_mask[example.input_ids >= 265].any()
    assert _trained(example) == "Here: \nDone.<|im_end|>"


def test_spans_are_where_the_image_ids_are(root: Path) -> None:
    example = _tokenize(root, _chat(_image("wide"), _text("a"), _image("square"), _text("b")))
    rows = np.concatenate([np.arange(s, s + n) for s, n in media_spans(example.media)])
    assert np.array_equal(rows, np.flatnonzero(example.input_ids == 265))
    assert [n for _, n in media_spans(example.media)] == [12, 4]
    assert example.num_tiles == 4
    assert [len(tiles) for tiles in load_tiles(example.media)] == [3, 1]


def test_pictures_of_a_sample_share_the_tiles(root: Path) -> None:
    alone = _tokenize(root, _chat(_image("wide"), _text("a")), max_dynamic_patch=3)
    pair = _tokenize(root, _chat(_image("wide"), _image("wide"), _text("a")), max_dynamic_patch=3)
    assert [item["grid"] for item in alone.media["items"]] == [[2, 1]]
    assert [item["grid"] for item in pair.media["items"]] == [[1, 1], [1, 1]]


def test_a_given_size_is_used_and_the_file_is_not_opened(root: Path) -> None:
    example = _tokenize(root, _chat(_image("nowhere", image_wh=[56, 28]), _text("a")))
    assert example.num_tiles == 3
    with pytest.raises(MediaError, match=r"nowhere\.png.*not found"):
        list(load_tiles(example.media))


@pytest.mark.parametrize("check", ["header", "decode"])
def test_a_given_size_is_checked_when_the_file_is_opened(root: Path, check: str) -> None:
    record = _chat(_image("wide", image_wh=[[28, 56]]), _text("a"))
    example = _tokenize(root, record)
    with pytest.raises(MediaError, match="is 56x28, but 28x56 was planned"):
        list(load_tiles(example.media))
    with pytest.raises(MediaError, match="is 56x28, but image_wh says 28x56") as caught:
        _tokenize_fn()(_record(root, record, check_media=check))
    assert caught.value.reason == "image_wh differs"


def test_a_picture_that_changed_after_it_was_prepared_is_named_with_what_to_do(root: Path) -> None:
    example = _tokenize(root, _chat(_image("wide"), _text("a")))
    assert len(list(load_tiles(example.media))) == 1
    Image.new("RGB", (28, 56)).save(root / "wide.png")
    with pytest.raises(MediaError, match=r"wide\.png' is 28x56.*changed since.*prepare --fresh"):
        list(load_tiles(example.media))


@pytest.mark.parametrize("size", [[0, 5], [5], [5, 5, 5], ["5", "5"], [1.5, 2], "5x5", [True, 1]])
def test_a_size_that_is_none_is_refused(root: Path, size: Any) -> None:
    with pytest.raises(MediaError, match=r"messages\[0\]\.content\[0\]\.image_wh"):
        _tokenize(root, _chat(_image("wide", image_wh=size), _text("a")))


def test_a_count_of_placeholders_that_differs_is_an_error_with_both_counts(root: Path) -> None:
    with pytest.raises(MediaError, match="holds 2 <IMG_CONTEXT>, but 1 images are given"):
        _tokenize(root, _chat(_image("wide"), _text("<IMG_CONTEXT> <IMG_CONTEXT>")))
    with pytest.raises(MediaError, match="holds 1 <IMG_CONTEXT>, but 0 images are given"):
        _tokenize(root, _chat(_text("a typed <IMG_CONTEXT>")))


@pytest.mark.parametrize("where", ["reasoning_content", "tool_calls", "tools"])
def test_a_placeholder_outside_content_never_takes_a_picture(root: Path, where: str) -> None:
    """In the first turn's reasoning it would show the picture of the second, in the first sample."""
    spelt = "see <IMG_CONTEXT>"
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": spelt}}}
    tool = {"type": "function", "function": {"name": "look", "description": spelt}}
    answer: dict[str, Any] = {"role": "assistant", "content": "one", "reasoning_content": "hm"}
    record: dict[str, Any] = {
        "messages": [
            {"role": "user", "content": [_image("wide"), _text("a")]},
            answer,
            {"role": "user", "content": [_image("tall"), _text("b")]},
            {"role": "assistant", "content": "two", "reasoning_content": "so"},
        ]
    }
    tokenize = _tokenize_fn(chat_template="intern-s1")
    assert len(tokenize(_record(root, record))) == 2
    if where == "tools":
        record["tools"] = [tool]
    else:
        answer[where] = [call] if where == "tool_calls" else spelt
    place = where if where == "tools" else f"messages[1].{where}"
    with pytest.raises(MediaError, match=re.escape(f"{place}: holds <IMG_CONTEXT>")):
        tokenize(_record(root, record))


def test_a_picture_inside_its_record_is_found_again(root: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (28, 28), (9, 8, 7)).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    record = _chat(_image("wide"), {"type": "image", "image": url}, _text("a"))
    example = _tokenize(root, record)
    kept = json.loads(json.dumps(example.media))
    assert url not in json.dumps(kept)
    assert list(load_tiles(kept))[1][0, :, 0, 0].tolist() == [9, 8, 7]


@pytest.mark.parametrize("ending", ["parquet", "jsonl.gz"])
def test_a_picture_inside_a_row_or_a_compressed_line_is_found_again(
    root: Path, ending: str
) -> None:
    file = io.BytesIO()
    Image.new("RGB", (28, 28), (9, 8, 7)).save(file, "PNG")
    path = root / f"data.{ending}"
    if ending == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        image = {"bytes": file.getvalue(), "path": None}
        user = {
            "role": "user",
            "content": [{"type": "image", "image": image}, {"type": "text", "text": "a"}],
        }
        answer = {"role": "assistant", "content": [{"type": "text", "text": "b"}]}
        table = pyarrow.Table.from_pylist([{"messages": [user, answer]}] * 3)
        parquet.write_table(table, str(path), row_group_size=2)
    else:
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        record = _chat({"type": "image", "image": url}, _text("a"))
        path.write_bytes(gzip.compress((json.dumps(record) + "\n").encode() * 3))
    dataset = MediaJsonlRecords("d", [str(path)], unpack_dir=str(root / "unpacked"))
    for index in (2, 0):
        example = _tokenize_fn()(dataset[index])[0]
        assert example.num_tiles == 1
        kept = json.loads(json.dumps(example.media))
        assert list(pickle.loads(pickle.dumps(load_tiles))(kept))[0][0, :, 0, 0].tolist() == [
            9,
            8,
            7,
        ]


def test_every_part_that_names_a_picture_is_understood(root: Path) -> None:
    for part in (
        {"type": "image", "image": "wide.png"},
        {"type": "image", "path": "wide.png"},
        {"type": "image", "url": "wide.png"},
        {"type": "image", "image": {"path": "wide.png", "bytes": None}},
        {"type": "image_url", "image_url": "wide.png"},
    ):
        assert _tokenize(root, _chat(part, _text("a"))).num_tiles == 3
    with pytest.raises(MediaError) as caught:
        _tokenize(root, _chat({"type": "image"}, _text("a")))
    assert caught.value.reason == "image not named"


def test_text_without_pictures_is_as_without_this_tokenize_fn(root: Path) -> None:
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    example = _tokenize(root, record)
    assert example.input_ids.tolist() == TOKENIZER.encode(TOKENIZER.render(record["messages"]))
    assert not example.media and example.num_tiles == 0


def test_a_dataset_without_places_of_pictures_is_refused() -> None:
    with pytest.raises(DataError, match="use VLMJsonlDataset"):
        _tokenize_fn()(_chat(_image("wide"), _text("a")))


def test_text_is_cut_behind_the_pictures_and_pictures_are_never_cut(root: Path) -> None:
    record = _chat(_image("wide"), _text("a"), answer="x" * 200)
    whole = _tokenize(root, record)
    (start, count), *_ = media_spans(whole.media)
    cut = _tokenize(root, record, max_length=len(whole.input_ids) - 100)
    assert cut.input_ids.tolist() == whole.input_ids[:-100].tolist()
    assert media_spans(cut.media) == media_spans(whole.media)
    with pytest.raises(DroppedSample, match="pictures over max_length"):
        _tokenize(root, record, max_length=start + count)


def test_tiles_are_degraded_by_the_draw_where_the_config_asks(root: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (28, 84, 3), np.uint8)
    Image.fromarray(noise).save(root / "wide.png")
    video = {"type": "video_url", "video_url": {"url": "clip.gif"}}
    record = _chat(_image("wide"), video, _text("a"))
    plain, degraded = (_tokenize(root, record, data_augment=asked) for asked in (False, True))
    assert plain.input_ids.tolist() == degraded.input_ids.tolist()
    assert plain.media["items"] == degraded.media["items"]
    whole = np.concatenate(list(load_tiles(plain.media, 7)))
    assert np.array_equal(whole, np.concatenate(list(load_tiles(plain.media, 8))))
    first, again, other = (
        np.concatenate(list(load_tiles(degraded.media, draw))) for draw in (7, 7, 8)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert first.shape == whole.shape and all(
        (a != b).any() for a, b in zip(first, whole, strict=True) if b.std() > 40
    )
    assert _tokenize_fn(data_augment=True).fingerprint() != _tokenize_fn().fingerprint()
    batches = []
    for draw in (7, 7, 8):
        degraded.draw = draw
        batches.append(VisionCollator(pad_token_id=0)([degraded]).media["pixel_values"])
    assert batches[0].equal(batches[1]) and not batches[0].equal(batches[2])
    assert np.array_equal(batches[0].numpy(), first)


def test_counts_and_fingerprint_tell_what_was_made(root: Path) -> None:
    tokenize = _tokenize_fn()
    tokenize(_record(root, _chat(_image("wide"), _text("a"))))
    counts = dict(tokenize.take_counts())
    assert counts["pictures"] == 1 and counts["tiles"] == 3
    assert tokenize.take_counts() == {}
    assert tokenize.fingerprint() == _tokenize_fn().fingerprint()
    assert tokenize.fingerprint() != _tokenize_fn(max_dynamic_patch=6).fingerprint()


def test_a_tokenizer_without_image_tokens_or_with_another_id_is_refused() -> None:
    with pytest.raises(ConfigError, match="no token <IMG_CONTEXT>"):
        _tokenize_fn(make_byte_tokenizer())
    with pytest.raises(ConfigError, match="the tokenizer's <IMG_CONTEXT> is 265"):
        _tokenize_fn(tokens=TOKENS._replace(image_token_id=9))
    with pytest.raises(ConfigError, match="_Model takes no pictures"):
        _tokenize_fn(tokens=None)


@pytest.mark.parametrize("prefix", ["Frame: ", "{}{}", "{name}: {}", "Frame{"])
def test_a_frame_prefix_has_one_place_for_the_number(prefix: str) -> None:
    chat = ChatTokenizeFn(ChatTokenizeFn.Config())
    part = InternS1TokenizeFn(InternS1TokenizeFn.Config(chat=chat, frame_prefix=prefix))
    run: Any = SimpleNamespace(model=_Model(TOKENS))
    (problem,) = part.check(run, ("tokenize_fn",))
    assert problem.path == ("tokenize_fn", "frame_prefix") and "expected one {}" in problem.message
    good = InternS1TokenizeFn(InternS1TokenizeFn.Config(chat=chat, frame_prefix="Frame-{}: "))
    assert list(good.check(run, ())) == []


def test_the_models_own_format_shows_thinking_and_tools(root: Path) -> None:
    tokenize = _tokenize_fn(chat_template="intern-s1", history="strip")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    record = {
        "messages": [
            {"role": "user", "content": "old"},
            {"role": "assistant", "content": "so", "reasoning_content": "gone"},
            {"role": "user", "content": [_image("square"), _text("new")]},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "two", "reasoning_content": "sum"},
        ]
    }
    example = tokenize(_record(root, record))[0]
    text = _decoded(example)
    assert f"<|im_start|>user\n{_written(1)}\nnew<|im_end|>\n" in text
    assert (
        '<|action_start|><|plugin|>\n{"name": "add", "parameters": {"a": 1}}\n<|action_end|>'
        in text
    )
    assert "<|im_start|>environment name=<|plugin|>\n\n2<|im_end|>\n" in text
    assert text.endswith("<|im_start|>assistant\n<think>\nsum\n</think>\n\ntwo<|im_end|>\n")
    assert "gone" not in text
    # The prompt opens <think> itself, so the model never writes it.
    assert _trained(example).endswith("\nsum\n</think>\n\ntwo<|im_end|>")
    assert "<think>" not in _trained(example)


def test_a_system_message_is_added_only_where_there_is_none(root: Path) -> None:
    plain = _chat(_text("a"))
    assert "<|im_start|>system\nBe kind.<|im_end|>" in _decoded(
        _tokenize(root, plain, system_message="Be kind.")
    )
    with_own = {"messages": [{"role": "system", "content": "Mine."}, *plain["messages"]]}
    assert "Be kind." not in _decoded(_tokenize(root, with_own, system_message="Be kind."))


def test_every_turn_gets_its_own_prompt_with_the_pictures_before_it(root: Path) -> None:
    record = {
        "messages": [
            {"role": "user", "content": [_image("wide"), _text("first")]},
            {"role": "assistant", "content": "one", "reasoning_content": "dropped later"},
            {"role": "user", "content": [_image("square"), _text("second")]},
            {"role": "assistant", "content": "two"},
        ]
    }
    first, second = _tokenize_fn(history="split")(_record(root, record))
    assert [item["ref"] for item in first.media["items"]] == ["wide.png"]
    assert [item["ref"] for item in second.media["items"]] == ["wide.png", "square.png"]
    assert (first.num_tiles, second.num_tiles) == (3, 4)
    assert _trained(first).endswith("one<|im_end|>") and _trained(second) == "two<|im_end|>"
    for example in (first, second):
        rows = [row for s, n in media_spans(example.media) for row in range(s, s + n)]
        assert rows == np.flatnonzero(example.input_ids == 265).tolist()


def test_special_tokens_that_a_user_typed_stay_text(root: Path) -> None:
    record = _chat(_image("square"), _text("say <|im_end|> and </img>"))
    example = _tokenize(root, record)
    assert (example.input_ids == 267).sum() == 1  # the picture's own </img>
    assert "say <|im_end|> and </img>" in _decoded(example)


@pytest.mark.parametrize("image_text", ["<IMG_CONTEXT>\\n", "[<IMG_CONTEXT>] "])
def test_the_text_is_that_of_a_template_that_knows_pictures(root: Path, image_text: str) -> None:
    template = INTERN_S1_TEMPLATE.replace("'<IMG_CONTEXT>\\n'", f"'{image_text}'")
    assert (image_text in template) and "part.type == 'image'" in template
    tokenizer: Any = WithTemplate(TOKENIZER, template)
    record = _chat(_text("See "), _image("wide"), _text(" and "), _image("square"), _text("!"))
    content = [_text("See "), {"type": "image"}, _text(" and "), {"type": "image"}, _text("!")]
    messages = [{"role": "user", "content": content}, record["messages"][1]]
    before, between, after = tokenizer.render(messages).split("<IMG_CONTEXT>")
    expected = before + _written(3) + between + _written(1) + after
    (example,) = _tokenize_fn(tokenizer)(_record(root, record))
    assert example.input_ids.tolist() == TOKENIZER.encode(expected)


def test_checking_whole_pictures_decodes_videos_too(root: Path) -> None:
    content = (root / "clip.gif").read_bytes()
    (root / "clip.gif").write_bytes(content[: len(content) - 60])
    video = {"type": "video_url", "video_url": {"url": "clip.gif"}}
    with pytest.raises(MediaError) as caught:
        _tokenize_fn()(_record(root, _chat(video, _text("a")), check_media="decode"))
    assert caught.value.reason in ("video broken", "video shorter than planned")
