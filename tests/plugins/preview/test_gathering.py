"""What a preview shows is what the trainer's own loader feeds, and its totals add up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pegboard import ConfigError
from pegboard.data_loading import RunData
from pegboard.plugin_manager import load_plugins
from pegboard.preparation import cache_folder, prepare_sources
from pegboard.run_config import RunConfig, load_run_config
from pegboard_plugins.preview.contents import Preview
from pegboard_plugins.preview.gathering import gather_preview
from pegboard_plugins.preview.page import render_page
from pegboard_plugins.preview.terminal import Style, render_terminal

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def load(path: Path) -> RunConfig:
    return load_run_config(path, (), load_plugins(third_party=False).registry).run


def gather(path: Path, step: int = 1, num_shown: int = 99) -> Preview:
    return gather_preview(load(path), config_path=str(path), step=step, num_shown=num_shown)


def chat(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[k % 2], "content": t} for k, t in enumerate(turns)]}


SOURCES = {
    "chats": [
        chat(f"question {k} \u4f60", f"answer {k}", "and?", "x" * (k % 40)) for k in range(40)
    ],
    "texts": [{"text": "word " * (1 + k % 30)} for k in range(25)],
}


@pytest.mark.parametrize("world", [1, 2])
def test_every_step_shows_the_batches_that_the_ranks_train(
    write_run: Callable[..., Path], world: int
) -> None:
    path = write_run(SOURCES, global_batch_size=4)
    run = load(path)
    tokenizer = run.tokenizer.build()
    sources = prepare_sources(
        run.datasets,
        cache=cache_folder(run),
        tokenizer=tokenizer,
        model=run.model,
        num_workers=0,
    )
    ranks = [
        RunData(
            sources,
            packer=run.dataloader.packer.build(),
            collator=run.dataloader.collator.build(pad_token_id=tokenizer.pad_token_id),
            pack_max_length=run.dataloader.pack_max_length,
            global_batch_size=run.global_batch_size,
            data_rank=rank,
            data_world=world,
            seed=run.seed,
        )
        for rank in range(world)
    ]
    step = 0
    for epoch in range(2):
        for step_in_epoch in range(ranks[0].steps_per_epoch(epoch)):
            step += 1
            fed = [
                batch
                for data in ranks
                for batch in data.micro_batches(epoch, step_in_epoch)
                if batch.num_tokens
            ]
            preview = gather(path, step)
            assert preview.step_totals.packs == len(fed) == len(preview.packs)
            shown = {tuple(pack.ids): pack for pack in preview.packs}
            for batch in fed:
                pack = shown[tuple(batch.input_ids_T.tolist())]
                weights = np.zeros(len(pack.ids))
                weights[batch.targets.positions_K.numpy() + 1] = batch.targets.weights_K.numpy()
                assert list(pack.weights) == weights.tolist()
                assert list(pack.positions) == batch.position_ids_T.tolist()
                assert [s.start for s in pack.samples] == batch.cu_seqlens[:-1].tolist()
                named = [s.place.split(" part ")[0] for s in pack.samples if s.source >= 0]
                assert named == [str(key) for key in batch.keys]
    assert step == preview.total_steps
    for data in ranks:
        data.close()


@pytest.mark.parametrize("packer", ["ExpandSoftPacker", "HardPacker", "NoPacker"])
def test_an_epoch_s_steps_add_up_to_its_totals(write_run: Callable[..., Path], packer: str) -> None:
    dataloader = {"pack_max_length": 410, "packer": {"class_name": packer}}
    few = {name: records[:14] for name, records in SOURCES.items()}
    path = write_run(few, global_batch_size=4, epoch_num=1, dataloader=dataloader)
    first = gather(path)
    steps = [gather(path, step) for step in range(1, first.total_steps + 1)]
    for name in ("packs", "samples", "tokens", "supervised"):
        assert sum(getattr(p.step_totals, name) for p in steps) == getattr(first.epoch_totals, name)
    for k, source in enumerate(first.sources):
        for name in ("samples", "tokens", "supervised"):
            of_steps = sum(getattr(p.sources[k].step, name) for p in steps)
            assert of_steps == getattr(source.epoch, name)
    assert sum(map(sum, first.histogram.counts)) == first.epoch_totals.samples
    shown = [pack for p in steps for pack in p.packs]
    assert sum(pack.num_supervised for pack in shown) == first.epoch_totals.supervised
    assert sum(pack.num_tokens for pack in shown) == first.epoch_totals.tokens


def test_segments_cover_each_sample_without_a_gap(write_run: Callable[..., Path]) -> None:
    for pack in gather(write_run(SOURCES)).packs:
        for sample in pack.samples:
            ends = [sample.start, *(segment.end for segment in sample.segments)]
            assert [segment.start for segment in sample.segments] == ends[:-1]
            assert ends[-1] == sample.end


def test_a_part_of_a_cut_sample_keeps_its_roles(write_run: Callable[..., Path]) -> None:
    records = [chat("question " * 20, "answer " * 20)] * 2
    dataloader = {"pack_max_length": 100, "packer": {"class_name": "HardPacker"}}
    preview = gather(write_run({"a": records}, global_batch_size=99, dataloader=dataloader))
    answered = 0
    for pack in preview.packs:
        for sample in pack.samples:
            for role, start, end in sample.segments:
                text = "".join(piece.text for piece in pack.pieces[start:end])
                assert role == ("user" if "question" in text else "assistant")
                answered += text.count("answer ")
    assert answered > 20
    assert sum(pack.beyond for pack in preview.packs) > 0


@pytest.mark.parametrize("cut", range(4))
def test_an_answer_cut_inside_a_character_is_cut_and_nothing_else(
    write_run: Callable[..., Path], cut: int
) -> None:
    records = [chat("q", "\U0001f600" * 40)]
    tokenize = {"max_length": 100 + cut}  # characters of four bytes, and a token is a byte
    preview = gather(write_run({"a": records}, tokenize=tokenize))
    [sample] = [sample for pack in preview.packs for sample in pack.samples]
    assert [turn.status for turn in sample.turns] == ["cut"]


def test_roles_are_those_of_the_messages(write_run: Callable[..., Path]) -> None:
    messages = [
        {"role": "system", "content": "user"},  # contents that look like headers
        {"role": "user", "content": "assistant"},
        {"role": "assistant", "content": "user"},
        {"role": "user", "content": "user"},
        {"role": "assistant", "content": "done \u4f60"},
    ]
    pack = gather(write_run({"a": [{"messages": messages}]})).packs[0]
    read = [
        (segment.role, "".join(piece.text for piece in pack.pieces[segment.start : segment.end]))
        for segment in pack.samples[0].segments
    ]
    assert [role for role, _ in read] == [message["role"] for message in messages]
    for (_, text), message in zip(read, messages, strict=True):
        assert text.startswith(f"<|im_start|>{message['role']}\n")
        assert message["content"] in text and text.rstrip().endswith("<|im_end|>")


THINKING = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "first", "reasoning_content": "hidden later"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "second", "reasoning_content": "shown"},
]


def test_turns_say_what_trains_otherwise_than_at_inference(write_run: Callable[..., Path]) -> None:
    strip = {"history": "strip"}
    preview = gather(write_run({"a": [{"messages": THINKING}]}, tokenize=strip))
    turns = preview.packs[0].samples[0].turns
    assert [turn.status for turn in turns] == ["rewritten", "same"]
    only_inference = "".join(part.text for part in turns[0].diff if part.kind == "inference")
    assert "hidden later" in only_inference
    plain = chat("one", "first", "two", "second")
    shown = gather(write_run({"b": [plain]}, tokenize={**strip, "shown_turns": "train"}))
    assert [turn.status for turn in shown.packs[0].samples[0].turns] == ["differs", "same"]
    measures = {m.name: (m.count, m.total) for m in shown.measures}
    assert measures["mismatch"] == (1, 2)


@pytest.mark.parametrize("history", ["chain", "split"])
def test_a_turn_that_trains_in_another_sample_is_history_here(
    write_run: Callable[..., Path], history: str
) -> None:
    messages = [*THINKING[:3], {**THINKING[3], "loss": False}, *THINKING]
    preview = gather(
        write_run({"a": [{"messages": messages}]}, tokenize={"history": history, "max_length": 512})
    )
    turns = [
        [(turn.message, turn.status) for turn in sample.turns]
        for pack in preview.packs
        for sample in sorted(pack.samples, key=lambda sample: sample.end - sample.start)
    ]
    assert turns == [
        [(1, "same")],
        [(3, "rewritten"), (5, "same")],
        [(3, "rewritten"), (7, "same")],
    ]


def test_kept_history_is_another_prompt_than_the_template_gives(
    write_run: Callable[..., Path],
) -> None:
    preview = gather(write_run({"a": [{"messages": THINKING}]}, tokenize={"history": "keep"}))
    sample = preview.packs[0].samples[0]
    assert [segment.role for segment in sample.segments] == ["user", "assistant"] * 2
    assert [turn.status for turn in sample.turns] == ["same", "differs"]
    extra = "".join(part.text for part in sample.turns[1].diff if part.kind == "training")
    assert "hidden later" in extra


def test_pictures_stand_in_the_roles_of_their_messages(
    write_run: Callable[..., Path], tmp_path: Path
) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (96, 48), "teal").save(tmp_path / "a.png")
    part = {"type": "image_url", "image_url": {"url": "a.png"}}
    question = {"role": "user", "content": [part, {"type": "text", "text": "and now?"}]}
    messages = [question, {"role": "assistant", "content": "teal"}]
    path = write_run({"a": [{"messages": [*messages, *messages]}]})
    config = json.loads(path.read_text())
    tiny = json.loads((CONFIGS / "tiny" / "intern_s1.json").read_text())
    config["datasets"][0]["dataset"] |= {
        "class_name": "VLMJsonlDataset",
        "media_root": str(tmp_path),
    }
    config["datasets"][0]["tokenize_fn"] = {"class_name": "InternS1TokenizeFn"}
    config["dataloader"] = {"pack_max_length": 4096}
    config |= {"model": tiny["model"], "tokenizer": tiny["tokenizer"]}
    path.write_text(json.dumps(config))
    packs = gather(path).packs
    assert packs[0].tiles and all(tile.picture for tile in packs[0].tiles)
    for pack in packs:
        for sample in pack.samples:
            assert [turn.status for turn in sample.turns] == ["same"] * len(sample.turns) != []
            roles = [segment.role for segment in sample.segments]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
            asked = [segment for segment in sample.segments if segment.role == "user"]
            for tile in pack.tiles:
                if sample.start <= tile.start < sample.end:
                    assert any(s.start < tile.start and tile.end < s.end for s in asked)


def test_dropped_bad_and_truncated_are_counted_by_source_and_reason(
    write_run: Callable[..., Path],
) -> None:
    records: list[Any] = [chat("q", "a"), chat("q", "b" * 900), "{broken", chat("q" * 900, "a")]
    source = gather(write_run({"a": records, "b": [chat("q", "a")]})).sources[0]
    assert dict(source.dropped) == {"no supervised token": 1, "bad record": 1}
    assert (source.records, source.bad, source.truncated) == (4, 1, 2)


def test_padding_is_a_segment_of_its_own_and_counted(write_run: Callable[..., Path]) -> None:
    collator = {"class_name": "SFTLLMCollator", "pad_to_multiple_of": 64}
    path = write_run(
        {"a": [chat("q", "a")]}, dataloader={"pack_max_length": 512, "collator": collator}
    )
    preview = gather(path)
    pack = preview.packs[0]
    assert len(pack.ids) == 64
    assert [s.place for s in pack.samples][-1] == "padding"
    assert preview.step_totals.padding == 64 - pack.num_tokens > 0
    assert {m.name: m for m in preview.measures}["padding"].count == preview.step_totals.padding


def test_a_step_that_the_run_does_not_have_is_an_error(write_run: Callable[..., Path]) -> None:
    path = write_run(SOURCES, total_steps=3, epoch_num=None)
    gather(path, 3)
    with pytest.raises(ConfigError, match="--step 4: the run has 3 steps"):
        gather(path, 4)


def test_what_was_estimated_is_marked_in_terminal_and_page(
    write_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pegboard.store_parts._SMALLEST_PART", 1024)
    records = [{"messages": [*THINKING[:3], {**THINKING[3], "content": f"{k}"}]} for k in range(99)]
    preview = gather(write_run({"a": records}, tokenize={"history": "strip", "max_length": 512}))
    policies = {policy.name: policy for policy in preview.sources[0].policies}
    assert {name: policy.is_estimate for name, policy in policies.items()} == {
        "strip": False,
        "chain": True,
        "keep": True,
        "split": True,
    }
    assert [name for name, policy in policies.items() if policy.used] == ["strip"]
    terminal = render_terminal(preview, Style(False, 132), num_packs=1, full=True)
    page = render_page(preview)
    for name, policy in policies.items():
        said = policy.said(policy.supervised)
        assert said.startswith("~") == (name != "strip")
        assert f"{name} {said}" in terminal and f"{said}</td>" in page
