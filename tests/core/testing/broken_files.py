"""Savers and trackers with one fault each."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from broken_parts import Broken, Sound

import pegboard

__all__ = ["BROKEN", "SOUND"]


class Notes:
    """The step and who ran it, in one file, written whole or not at all."""

    def due(self, step: int, *, is_last: bool) -> bool:
        return is_last

    def save(self, request: Any) -> Path:
        path: Path = request.run_dir / "notes.json"
        return self.write(path, {"step": request.train_state["step"]})

    def write(self, path: Path, notes: Mapping[str, Any]) -> Path:
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(notes), encoding="utf-8")
        os.replace(draft, path)
        return path


class NeverLast(Notes):
    def due(self, step: int, *, is_last: bool) -> bool:
        return step % 5 == 0 and not is_last


class Beside(Notes):
    def save(self, request: Any) -> Path:
        path = super().save(request)
        path.parent.with_name("latest.txt").write_text(str(path), encoding="utf-8")
        return path


class Littering(Notes):
    def write(self, path: Path, notes: Mapping[str, Any]) -> Path:
        path.with_suffix(".draft").write_text("{}", encoding="utf-8")
        path.write_text(json.dumps(notes), encoding="utf-8")
        return path


class Numbered(Notes):
    def write(self, path: Path, notes: Mapping[str, Any]) -> Path:
        return super().write(path.with_name(f"notes_{os.urandom(8).hex()}.json"), notes)


class Pickled(Notes):
    def write(self, path: Path, notes: Mapping[str, Any]) -> Path:
        path = path.with_suffix(".state")
        path.write_bytes(pickle.dumps(dict(notes)))
        return path


class Hasty(Notes):
    def save(self, request: Any) -> Path:
        path: Path = request.run_dir / "notes.json"
        path.write_text("", encoding="utf-8")
        return self.write(path, {"step": request.train_state["step"]})


def saver(cls: type[Notes]) -> type[pegboard.SaverComponent]:
    class NoteSaver(pegboard.SaverComponent):
        """The step, in a file."""

        config: Any

        def build(self) -> Any:
            return cls()

    return NoteSaver


class Lines:
    """A JSON line for each number."""

    mode = "a"

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.last = run_dir, 0
        self.file = open(run_dir / "numbers.jsonl", self.mode, encoding="utf-8")

    def log(self, step: int, metrics: Any) -> None:
        for name, value in metrics.items():
            self.file.write(json.dumps([step, name, value]) + "\n")

    def close(self) -> None:
        self.file.close()


class PlainNames(Lines):
    def log(self, step: int, metrics: Any) -> None:
        for name in metrics:
            if not name.isidentifier():
                raise ValueError(name)
        super().log(step, metrics)


class Finite(Lines):
    def log(self, step: int, metrics: Any) -> None:
        for value in metrics.values():
            int(value)
        super().log(step, metrics)


class InOrder(Lines):
    def log(self, step: int, metrics: Any) -> None:
        if step <= self.last:
            raise ValueError(step)
        self.last = step
        super().log(step, metrics)


class Clearing(Lines):
    def log(self, step: int, metrics: Any) -> None:
        super().log(step, metrics)
        metrics.clear()


class Once(Lines):
    mode = "x"


class Overwriting(Lines):
    mode = "w"


class Rounding(Lines):
    def log(self, step: int, metrics: Any) -> None:
        super().log(step, {name: round(value, 3) for name, value in metrics.items()})


class Straying(Lines):
    def log(self, step: int, metrics: Any) -> None:
        super().log(step, metrics)
        self.run_dir.with_name("latest.txt").write_text(str(step), encoding="utf-8")


def tracker(cls: type[Lines]) -> type[pegboard.TrackerComponent]:
    class LineTracker(pegboard.TrackerComponent):
        """A JSON line for each number."""

        config: Any

        def build(self, run_dir: Path) -> Any:
            return cls(run_dir)

    return LineTracker


def read(run_dir: Path) -> dict[tuple[int, str], float]:
    lines = (run_dir / "numbers.jsonl").read_text(encoding="utf-8").splitlines()
    return {(step, name): value for step, name, value in map(json.loads, lines)}


SOUND = {"saver": Sound(saver(Notes)), "tracker": Sound(tracker(Lines), {}, {"read": read})}
BROKEN = [
    Broken("is not due at the end", "is_due_at_the_end", saver(NeverLast)),
    Broken("writes beside the run's folder", "writes_inside_the_run_folder", saver(Beside)),
    Broken("leaves its draft", "leaves_no_draft", saver(Littering)),
    Broken("draws the names of its files", "the_same_state_gives_the_same_bytes", saver(Numbered)),
    Broken("pickles", "writes_no_pickle", saver(Pickled)),
    Broken(
        "empties the last save before the new one stands",
        "a_failure_leaves_the_last_one",
        saver(Hasty),
    ),
    Broken("refuses a name with a space in it", "takes_numbers_and_closes", tracker(PlainNames)),
    Broken("refuses NaN", "takes_numbers_that_are_not_finite", tracker(Finite)),
    Broken("wants a step once", "takes_steps_out_of_order_and_new_names", tracker(InOrder)),
    Broken("clears the numbers it is told", "leaves_the_numbers_alone", tracker(Clearing)),
    Broken(
        "wants a folder of its own",
        "may_be_built_again",
        tracker(Once),
        also=frozenset({"numbers_are_kept"}),
    ),
    Broken("rounds", "numbers_are_kept", tracker(Rounding)),
    Broken("overwrites what was kept before a resume", "numbers_are_kept", tracker(Overwriting)),
    Broken("writes beside the run's folder", "writes_inside_the_run_folder", tracker(Straying)),
]
