"""`pegboard prepare` makes the stores that training maps, and says what became of every record."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pegboard.assemble import build_run_data
from pegboard.cli import main
from pegboard.data_loading import Cursor
from pegboard.epoch_planner import EpochPlanner
from pegboard.plugin_manager import load_plugins
from pegboard.preparation import cache_folder, prepare_sources
from pegboard.record_tokenizing import RecordJob
from pegboard.run_config import load_run_config
from pegboard.token_store import open_store


def write_config(tmp_path: Path, lines: list[Any], **dataset: Any) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (tmp_path / "data.jsonl").write_text("\n".join(texts) + "\n")
    config = {
        "work_dir": str(tmp_path / "work"),
        "tokenizer": {"class_name": "ByteTokenizer"},
        "model": {"class_name": "Qwen3", "vocab_size": 288, "hidden_size": 8,
                  "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
                  "num_key_value_heads": 1, "head_dim": 8},
        "datasets": [{
            "dataset": {"class_name": "JsonlDataset", "name": "chats",
                        "anno_path": str(tmp_path / "data.jsonl"), **dataset},
            "tokenize_fn": {"class_name": "ChatTokenizeFn", "max_length": 64},
        }],
        "dataloader": {"pack_max_length": 128},
        "epoch_num": 1,
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return path


def chat(question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


CHATS = [chat("one", "two"), chat("three", "four"), chat("five", "six")]


def stores(tmp_path: Path) -> list[Path]:
    return sorted(meta.parent for meta in (tmp_path / "work" / ".token_store").glob("*/meta.json"))


def prepare(config: Path, *words: str) -> int:
    return main(["prepare", str(config), "--workers", "0", "--no-third-party", *words])


def test_a_second_prepare_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, CHATS)
    assert prepare(config) == 0
    (store,) = stores(tmp_path)
    assert "chats: 3 records: 3 samples" in capsys.readouterr().out
    made = (store / "meta.json").stat().st_ino
    assert prepare(config) == 0
    assert (store / "meta.json").stat().st_ino == made
    assert stores(tmp_path) == [store]


def test_the_counts_at_the_end_account_for_every_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [CHATS[0], "nonsense", chat("x" * 100, "never reached"), chat("a", "b" * 90), "[]"]
    config = write_config(tmp_path, lines, on_bad_record="skip")
    assert prepare(config) == 0
    out = capsys.readouterr().out
    (store,) = stores(tmp_path)
    assert "chats: 5 records: 2 samples" in out
    assert "chats: dropped: no supervised token 1" in out
    assert "truncated 2" in out
    assert "chats: 2 bad records, left out:" in out
    assert f"  {tmp_path}/data.jsonl:2: invalid JSON" in out
    assert f"  {tmp_path}/data.jsonl:5: found a JSON list" in out
    meta = open_store(store).meta
    assert meta["num_records"] == 5 == len(open_store(store)) + 1 + meta["num_bad"]


def test_the_plan_counts_exactly_what_the_model_is_fed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [chat("q" * (i % 7), "answer " * (1 + i % 5)) for i in range(60)]
    config = write_config(tmp_path, lines)
    data = json.loads(config.read_text())
    (tmp_path / "more.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines[3:20]))
    more = json.loads(json.dumps(data["datasets"][0]))
    more["dataset"] |= {
        "name": "more",
        "anno_path": str(tmp_path / "more.jsonl"),
        "sample_ratio": 1.5,
    }
    data["datasets"].append(more)
    config.write_text(json.dumps(data))
    assert prepare(config) == 0
    table = {
        row[0]: [int(cell.replace(",", "")) for cell in row[1:5]]
        for row in (line.split() for line in capsys.readouterr().out.splitlines())
        if row[0] in ("chats", "more", "all") and len(row) == 10
    }
    run = load_run_config(config, (), load_plugins(third_party=False).registry).run
    tokenizer = run.tokenizer.build()
    sources = prepare_sources(
        run.datasets, cache=cache_folder(run), tokenizer=tokenizer, model=run.model, num_workers=0
    )
    fed = build_run_data(
        run, None, sources, tokenizer, global_batch_size=run.global_batch_size, last_epoch=0
    )
    samples, targets, tokens = Counter[str](), Counter[str](), 0
    for step in range(fed.steps_per_epoch(0)):
        for batch in fed.micro_batches(0, step):
            tokens += batch.num_tokens
            samples.update(key.source for key in batch.keys)
            names = [sources[i].name for i in batch.targets.source_ids_K.tolist()]
            targets.update(names)
    fed.close()
    assert samples == {"chats": table["chats"][1], "more": table["more"][1]}
    assert targets == {"chats": table["chats"][3], "more": table["more"][3]}
    assert tokens == table["chats"][2] + table["more"][2] == table["all"][2]
    assert table["chats"][:2] == [60, 60] and table["more"][:2] == [17, 26]


def test_training_after_prepare_tokenizes_and_plans_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, [CHATS[0]] * 10_000)  # fewer are planned sooner than read
    length = ("--set", "epoch_num=null", "--set", "total_steps=1", "--set", "savers=[]")
    assert prepare(config, *length) == 0
    plans = sorted(tmp_path.glob("work/.token_store/plans/*/epoch_00000/offsets.npy"))
    assert len(plans) == 1
    made = plans[0].stat().st_ino
    monkeypatch.setattr(RecordJob, "write_part", lambda *_: pytest.fail("tokenized"))
    assert main(["train", str(config), "--no-third-party", *length]) == 0
    assert plans[0].stat().st_ino == made


@pytest.mark.parametrize("packer", ["ExpandSoftPacker", "HardPacker"])
@pytest.mark.parametrize(
    ("length", "epochs", "said"),
    [
        (("--set", "epoch_num=3"), 3, "steps, 3 epochs"),
        (("--set", "epoch_num=null", "--set", "total_steps=500"), 2, "the run: 500 steps, 1."),
    ],
)
def test_every_epoch_of_the_run_is_planned_so_that_training_only_maps(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    packer: str,
    length: tuple[str, ...],
    epochs: int,
    said: str,
) -> None:
    config = write_config(tmp_path, [CHATS[0]] * 10_000)
    words = (*length, "--set", f"dataloader.packer.class_name={packer}")
    assert prepare(config, *words, "--set", "global_batch_size=7") == 0
    assert said in capsys.readouterr().out.splitlines()[-1]
    plans = sorted(tmp_path.glob("work/.token_store/plans/*/*/plan.json"))
    assert len(plans) == epochs
    parsed = load_run_config(
        config,
        [word for word in words if word != "--set"],
        load_plugins(third_party=False).registry,
    ).run
    tokenizer = parsed.tokenizer.build()
    sources = prepare_sources(
        parsed.datasets,
        cache=cache_folder(parsed),
        tokenizer=tokenizer,
        model=parsed.model,
        num_workers=0,
    )
    monkeypatch.setattr(EpochPlanner, "_make", lambda *_: pytest.fail("planned"))
    last = epochs - 1 if parsed.epoch_num else None
    data = build_run_data(parsed, None, sources, tokenizer, global_batch_size=7, last_epoch=last)
    if parsed.epoch_num:
        assert data.steps_from(Cursor(), epochs) > 0
    assert all(data.plan_epoch(epoch).num_packs for epoch in range(epochs))


def test_a_fresh_store_is_made_of_media_that_changed(tmp_path: Path) -> None:
    """What a picture looks like is no part of a store's name: looking at each would cost too much."""
    config = write_config(tmp_path, CHATS)
    assert prepare(config) == 0
    (store,) = stores(tmp_path)
    mapped = open_store(store)
    expected = mapped[1].input_ids.tolist()
    made = (store / "meta.json").stat().st_ino
    assert prepare(config, "--fresh") == 0
    assert stores(tmp_path) == [store]
    assert (store / "meta.json").stat().st_ino != made
    assert mapped[1].input_ids.tolist() == expected, "a job that has the old one open reads on"
    assert list(store.parent.glob(".*.gone")) == []


def test_a_bad_record_that_is_not_allowed_is_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, [*CHATS, "nonsense"])
    assert prepare(config) == 2
    assert f"{tmp_path}/data.jsonl:4: invalid JSON" in capsys.readouterr().err.splitlines()[-1]
    assert prepare(config, "--set", 'datasets[0].dataset.on_bad_record={"share": 0.2}') == 2
    assert "1 bad records among 4 of 4" in capsys.readouterr().err
    assert prepare(config, "--set", 'datasets[0].dataset.on_bad_record={"count": 1}') == 0


@pytest.mark.parametrize("policy", ['{"count": -1}', '{"share": 2}', "{}", '{"most": 1}', "3"])
def test_a_policy_that_means_nothing_is_refused(
    policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, CHATS)
    assert prepare(config, "--set", f"datasets[0].dataset.on_bad_record={policy}") == 2
    assert "on_bad_record" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_a_limit_takes_the_first_records_and_leaves_the_whole_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, [*CHATS, "nonsense"])
    assert prepare(config, "--limit", "2") == 0
    assert "chats: 2 records: 2 samples" in capsys.readouterr().out
    assert prepare(config, "--limit", "99") == 2
    for wrong in ("0", "-1", "x"):
        assert prepare(config, "--limit", wrong) == 2
        assert "expected a whole number from 1 up" in capsys.readouterr().err


def test_anything_that_changes_samples_makes_another_store_and_nothing_else_does(
    tmp_path: Path,
) -> None:
    config = write_config(tmp_path, CHATS)
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    changes = [
        "datasets[0].tokenize_fn.max_length=60",
        'datasets[0].tokenize_fn.train_on="last"',
        f"datasets[0].dataset.record_schema={schema}",
        "datasets[0].dataset.max_records=2",
    ]
    assert prepare(config) == 0
    for number, change in enumerate(changes, start=2):
        assert prepare(config, "--set", change) == 0
        assert len(stores(tmp_path)) == number, change
    for change in ("seed=9", "datasets[0].dataset.sample_ratio=2", "datasets[0].dataset.name=x",
                   "global_batch_size=4", 'datasets[0].dataset.on_bad_record="skip"'):  # fmt: skip
        assert prepare(config, "--set", change) == 0
        assert len(stores(tmp_path)) == 5, change
    # The schema's text counts, not its path.
    schema.write_text('{"type": "object", "required": ["messages"]}')
    assert prepare(config, "--set", changes[2]) == 0
    assert len(stores(tmp_path)) == 6


def test_a_change_of_the_data_that_keeps_its_size_and_time_is_seen(tmp_path: Path) -> None:
    config = write_config(tmp_path, CHATS)
    data = tmp_path / "data.jsonl"
    os.utime(data, (1e9, 1e9))
    assert prepare(config) == 0
    data.write_text(data.read_text().replace("three", "seven"))
    os.utime(data, (1e9, 1e9))
    assert prepare(config) == 0
    assert len(stores(tmp_path)) == 2


def test_a_cache_folder_is_shared_by_runs(tmp_path: Path) -> None:
    config = write_config(tmp_path, CHATS)
    cache = f"cache_dir={tmp_path / 'cache'}"
    for work in ("a", "b"):
        assert prepare(config, "--set", cache, "--set", f"work_dir={tmp_path / work}") == 0
    assert len(list((tmp_path / "cache").glob("*/meta.json"))) == 1
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "not JSON"), ('{"type": 3}', "not a JSON Schema"), (None, "No such file"), ("[]", "expected an object")],
)  # fmt: skip
def test_a_record_schema_that_is_none_is_refused(
    text: str | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, CHATS)
    schema = tmp_path / "schema.json"
    if text is not None:
        schema.write_text(text)
    assert prepare(config, "--set", f"datasets[0].dataset.record_schema={schema}") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert says in error and str(schema) in error


def test_a_schema_that_points_outside_itself_fetches_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"$ref": "http://127.0.0.1:9/x.json"}')
    config = write_config(tmp_path, CHATS, record_schema=str(schema))
    assert prepare(config) == 2
    assert "127.0.0.1:9/x.json" in capsys.readouterr().err.splitlines()[-1]


def test_a_record_that_does_not_fit_its_schema_is_named_with_the_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(
        json.dumps({"properties": {"messages": {"items": {"properties": {"role": {"enum": ["user", "assistant"]}}}}}})
    )  # fmt: skip
    odd = chat("a", "b")
    odd["messages"][0]["role"] = "usr"
    config = write_config(tmp_path, [CHATS[0], odd], record_schema=str(schema))
    assert prepare(config) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"{tmp_path}/data.jsonl:2: messages[0].role: 'usr' is not one of ['user', 'assistant']"
    )
