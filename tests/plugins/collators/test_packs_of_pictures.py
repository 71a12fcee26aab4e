"""The claim: from a config's data parts to batches, packs hold whole samples and no more tiles than allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pegboard import DataError, ImageTokens, ModelComponent
from pegboard.data_loading import DataSource, RunData
from pegboard.token_store import TokenStore, build_store
from pegboard_plugins.chat.component import ChatTokenizeFn
from pegboard_plugins.collators.vision import VisionCollator
from pegboard_plugins.intern_s1.component import InternS1
from pegboard_plugins.intern_s1_chat.component import InternS1TokenizeFn
from pegboard_plugins.jsonl.media_records import MediaJsonlRecords
from pegboard_plugins.packers.component import ExpandSoftPacker, HardPacker, SoftPacker
from pegboard_plugins.qwen3.component import Qwen3
from pegboard_plugins.tokenizers.byte_tokenizer import make_byte_tokenizer

SIZES = [(28, 28), (56, 28), (84, 28), (28, 84), (56, 56)]


class _Model(ModelComponent):
    """What a tokenize function asks of a model."""

    def image_tokens(self) -> ImageTokens:
        return ImageTokens(28, 4, 265)


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    lines = []
    for number in range(60):
        content: list[dict[str, Any]] = [{"type": "text", "text": f"number {number}?"}]
        if number % 3:
            name = f"{number}.png"
            Image.new("RGB", SIZES[number % len(SIZES)], (number, 0, 0)).save(tmp_path / name)
            content.insert(0, {"type": "image", "image": name})
        user = {"role": "user", "content": content}
        lines.append(json.dumps({"messages": [user, {"role": "assistant", "content": "yes"}]}))
    (tmp_path / "d.jsonl").write_text("\n".join(lines) + "\n")
    dataset = MediaJsonlRecords("d", [str(tmp_path / "d.jsonl")], media_root=str(tmp_path))
    chat = ChatTokenizeFn(ChatTokenizeFn.Config())
    tokenize = InternS1TokenizeFn(InternS1TokenizeFn.Config(chat=chat)).build(
        make_byte_tokenizer(image_tokens=True), _Model(ModelComponent.Config())
    )
    return build_store(tmp_path / "store", dataset, tokenize, name="d")


def _data(
    store: TokenStore, packer: Any, most: int | None, workers: int = 0, **more: Any
) -> RunData:
    return RunData(
        [DataSource(store, 0, "d")],
        packer=packer,
        collator=VisionCollator(pad_token_id=0, max_tiles_per_pack=most),
        pack_max_length=700,
        global_batch_size=2,
        num_workers=workers,
        **more,
    )


@pytest.mark.parametrize("packer", [ExpandSoftPacker, SoftPacker])
@pytest.mark.parametrize("most", [6, 9, None])
def test_packs_hold_whole_samples_and_no_more_tiles_than_allowed(
    store: TokenStore, packer: Any, most: int | None
) -> None:
    data = _data(store, packer(packer.Config()).build(), most)
    lines, tiles = [], []
    for step in range(data.steps_per_epoch(0)):
        for batch in data.micro_batches(0, step):
            lines += [key.line for key in batch.keys]
            tiles.append(batch.extras["num_tiles"])
            assert batch.num_tokens <= 700
            if not batch.media:
                continue
            reds = iter(batch.media["pixel_values"][:, 0, 0, 0].tolist())
            for key, count in zip(batch.keys, batch.extras["tiles_of_samples"], strict=True):
                # Each sample's own picture, whole: its number is its colour.
                assert {next(reds) for _ in range(count)} <= {key.line - 1}
            rows = np.flatnonzero(batch.input_ids_T.numpy() == 265)
            assert rows.tolist() == batch.media["image_positions"].tolist()
            assert len(rows) == 4 * batch.extras["num_tiles"]
    data.close()
    assert sorted(lines) == list(range(1, 61))
    assert store.num_tiles is not None and sum(tiles) == int(store.num_tiles.sum())
    if most is None:
        assert max(tiles) > 9
    else:
        assert max(tiles) <= most


class _Draws:
    """A collator that notes what it is given."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def __call__(self, examples: Any) -> Any:
        self.seen += [(example.key.line, example.draw) for example in examples]
        return VisionCollator(pad_token_id=0)([])


def _draws(store: TokenStore, epoch: int, ranks: int = 1, seed: int = 0) -> list[tuple[int, int]]:
    seen = []
    for rank in range(ranks):
        packer, collator = SoftPacker(SoftPacker.Config()).build(), _Draws()
        data = RunData(
            [DataSource(store, 0, "d", sample_ratio=2.0)],
            packer=packer,
            collator=collator,
            pack_max_length=700,
            global_batch_size=2,
            data_rank=rank,
            data_world=ranks,
            seed=seed,
        )
        for step in range(data.steps_per_epoch(epoch)):
            data.micro_batches(epoch, step)
        data.close()
        seen += collator.seen
    return sorted(seen)


def test_each_time_that_a_sample_is_taken_draws_anew_whatever_the_ranks(store: TokenStore) -> None:
    alone = _draws(store, 0)
    assert len(alone) == 120 == len({draw for _, draw in alone})
    assert alone == _draws(store, 0) == _draws(store, 0, ranks=2)
    others = _draws(store, 1) + _draws(store, 0, seed=1)
    assert not {draw for _, draw in alone} & {draw for _, draw in others}


def test_a_sample_of_more_tiles_than_a_pack_may_hold_is_refused(store: TokenStore) -> None:
    with pytest.raises(DataError, match=r"d\.jsonl:\d+: 5 image tiles, over max_tiles_per_pack 4"):
        _data(store, SoftPacker(SoftPacker.Config()).build(), 4).plan_epoch(0)


def test_a_packer_that_cuts_samples_is_refused(store: TokenStore) -> None:
    with pytest.raises(DataError, match="holds media, which can't be cut"):
        _data(store, HardPacker(HardPacker.Config()).build(), None).plan_epoch(0)


@pytest.mark.slow
def test_worker_processes_make_the_same_batches(store: TokenStore) -> None:
    packer = SoftPacker(SoftPacker.Config()).build()
    alone, workers = _data(store, packer, 9), _data(store, packer, 9, workers=2)
    workers.start_workers(wait=True)
    for step in range(alone.steps_per_epoch(0)):
        for one, other in zip(
            alone.micro_batches(0, step), workers.micro_batches(0, step), strict=True
        ):
            assert one.keys == other.keys and one.extras == other.extras
            assert one.media.keys() == other.media.keys()
            for name, tensor in one.media.items():
                assert tensor.dtype == other.media[name].dtype
                assert tensor.equal(other.media[name])
    alone.close()
    workers.close()


def test_ranks_are_balanced_with_what_tiles_cost() -> None:
    fields = dict(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    text = Qwen3(Qwen3.Config.model_validate(fields))
    lengths, tiles = np.array([300.0, 300.0]), np.array([0.0, 3.0])
    training, frozen = (
        InternS1(InternS1.Config(text_config=text, freeze_vision=freeze)).sample_costs(
            lengths, tiles
        )
        for freeze in (False, True)
    )
    assert training[0] == frozen[0] == text.sample_costs(lengths, tiles)[0]
    assert training[1] - training[0] == pytest.approx(3 * (frozen[1] - frozen[0]))
    assert frozen[1] > frozen[0]
