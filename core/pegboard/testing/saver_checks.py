"""What a saver promises: it says when it is due, writes into the run's folder, whole or not at all.

Options: `model`, a component (a tiny Qwen3 by default); `transforms`, components that change it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pegboard.savers import SaveRequest
from pegboard.testing.case import Case, Check
from pegboard.testing.rows import fill

__all__ = ["CHECKS", "OPTIONS"]

OPTIONS = frozenset({"model", "tokenizer", "transforms"})


def _request(case: Case, run_dir: Path, *, step: int = 3, is_last: bool = True) -> SaveRequest:
    with torch.device("meta"):
        built = case.model().build()
        for transform in case.options.get("transforms", ()):
            built = transform.build()(built)
    module = fill(built, seed=1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    return SaveRequest(
        step=step,
        is_last=is_last,
        run_dir=run_dir,
        model=built,
        module=module,
        optimizer=optimizer,
        tokenizer=case.tokenizer(),
        loaded_dtype=None,
        source_folder=None,
        train_state={"step": step},
    )


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _is_due_at_the_end(case: Case) -> None:
    saver = case.make().build()
    assert saver.due(17, is_last=True), "not due at the end: the run's result would be lost"
    due = [saver.due(step, is_last=False) for step in range(1, 50)]
    again = [case.make().build().due(step, is_last=False) for step in range(1, 50)]
    assert due == again, "`due` depends on what was asked before: ranks would part"


def _writes_inside_the_run_folder(case: Case) -> None:
    run_dir = case.folder / "run"
    run_dir.mkdir()
    (case.folder / "beside.txt").write_text("x", encoding="utf-8")
    written = case.make().build().save(_request(case, run_dir))
    assert written is not None and written.is_relative_to(run_dir), f"wrote {written}"
    assert written.exists() and _files(run_dir), "nothing is there"
    outside = {p.name for p in case.folder.iterdir()} - {"run", "beside.txt"}
    assert not outside, f"left {', '.join(sorted(outside))} beside the run's folder"


def _leaves_no_draft(case: Case) -> None:
    run_dir = case.folder / "run"
    run_dir.mkdir()
    case.make().build().save(_request(case, run_dir))
    drafts = [name for name in _files(run_dir) if "tmp" in name or "draft" in name]
    assert not drafts, f"left {drafts[:3]}"


def _the_same_state_gives_the_same_bytes(case: Case) -> None:
    found = []
    for name in ("one", "two"):
        run_dir = case.folder / name
        run_dir.mkdir()
        case.make().build().save(_request(case, run_dir))
        found.append(_files(run_dir))
    assert found[0].keys() == found[1].keys(), "one state was saved as other files"
    differing = [n for n in found[0] if n.endswith(".safetensors") and found[0][n] != found[1][n]]
    assert not differing, f"one state gave two versions of {', '.join(differing)}"


def _writes_no_pickle(case: Case) -> None:
    run_dir = case.folder / "run"
    run_dir.mkdir()
    case.make().build().save(_request(case, run_dir))
    for name, content in _files(run_dir).items():
        pickled = content[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
        assert not pickled and not name.endswith((".pt", ".pth", ".bin", ".pkl")), (
            f"{name} is pickled: opening it can run code"
        )


def _a_failure_leaves_the_last_one(case: Case) -> None:
    run_dir = case.folder / "run"
    run_dir.mkdir()
    saver = case.make().build()
    saver.save(_request(case, run_dir))
    before = _files(run_dir)

    class Full:
        """A tokenizer whose files can't be written, and a state that can't be either."""

        def __getattr__(self, name: str) -> Any:
            raise OSError(28, "No space left on device")

    request = _request(case, run_dir)
    broken = SaveRequest(**{**vars(request), "tokenizer": Full(), "train_state": Full()})
    try:
        saver.save(broken)
    except Exception:  # noqa: BLE001 (how it fails is the saver's matter; what is left is ours)
        assert _files(run_dir) == before, "a save that failed changed what was saved before"


CHECKS = (
    Check("is_due_at_the_end", _is_due_at_the_end),
    Check("writes_inside_the_run_folder", _writes_inside_the_run_folder),
    Check("leaves_no_draft", _leaves_no_draft),
    Check("the_same_state_gives_the_same_bytes", _the_same_state_gives_the_same_bytes),
    Check("writes_no_pickle", _writes_no_pickle),
    Check("a_failure_leaves_the_last_one", _a_failure_leaves_the_last_one),
)
