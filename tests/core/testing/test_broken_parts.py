"""The claim: a part that breaks one promise is caught by the check of that promise, and the same part without the
fault is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import Field

import pegboard
from pegboard import LossOutput, PackPlan, SampleKey
from pegboard.testing import Case, checks_for, contract_for


class Rows:
    def __init__(self, name: str) -> None:
        self.name = name

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= 3:
            raise IndexError(index)
        return {"text": str(index)}

    def key(self, index: int) -> SampleKey:
        return SampleKey(self.name, "memory", index + 1)

    def fingerprint(self) -> str | None:
        return "three rows"


class Wrapping(Rows):
    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"text": str(index % 3)}


class OneKey(Rows):
    def key(self, index: int) -> SampleKey:
        return SampleKey(self.name, "memory", 1)


class FromZero(Rows):
    def key(self, index: int) -> SampleKey:
        return SampleKey(self.name, "memory", index)


class Restless(Rows):
    def fingerprint(self) -> str | None:
        return str(id(self))


class Forgetful(Rows):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.read = 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read += 1
        return {"text": f"{index} {self.read}"}


class Unpicklable(Rows):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.open = lambda: 1


def dataset(rows: type[Rows]) -> type[pegboard.DatasetComponent]:
    class Rowed(pegboard.DatasetComponent):
        """Three rows."""

        config: Any

        def build(self, name: str) -> Any:
            return rows(name)

    return Rowed


def schedule(rate: Callable[[int, int, float], float]) -> type[pegboard.LRScheduleComponent]:
    class Rated(pegboard.LRScheduleComponent):
        """A rate by step."""

        config: Any

        def build(self, total_steps: int) -> Any:
            return lambda step, base: rate(step, total_steps, base)

    return Rated


def packer(plan: Callable[[np.ndarray, int, int], PackPlan]) -> type[pegboard.PackerComponent]:
    class Planned(pegboard.PackerComponent):
        """A plan."""

        config: Any

        def build(self) -> Any:
            class Built:
                def plan(self, lengths: np.ndarray, limit: int, seed: int) -> PackPlan:
                    return plan(lengths, limit, seed)

            return Built()

    return Planned


def alone(samples: np.ndarray) -> PackPlan:
    return PackPlan(np.arange(len(samples) + 1), samples)


def shuffled(lengths: np.ndarray, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(len(lengths))


def loss(change: Callable[[Any, Any], Any], counts: float = 1.0) -> type[pegboard.LossComponent]:
    class Changed(pegboard.LossComponent):
        """Cross-entropy with a fault."""

        config: Any

        def build(self) -> Any:
            class Built:
                def __call__(self, hidden: Any, head: Any, targets: Any) -> LossOutput:
                    logits = head.logits(hidden[targets.positions_K])
                    nll = torch.nn.functional.cross_entropy(
                        logits, targets.labels_K, reduction="none"
                    )
                    return LossOutput(change(nll, targets), nll.detach())

                def step_counts(self, batch: Any) -> dict[str, float]:
                    return {"targets": counts * float(batch.targets.weights_K.sum())}

            return Built()

    return Changed


class Undescribed(pegboard.LRScheduleComponent):
    """A schedule with a field that nobody explains."""

    class Config(pegboard.ComponentConfig):
        power: float = 1.0

    config: Config

    def build(self, total_steps: int) -> Any:
        return lambda step, base: base


class Silent(pegboard.LRScheduleComponent):
    config: Any

    def build(self, total_steps: int) -> Any:
        return lambda step, base: base


class Loose(pegboard.LRScheduleComponent):
    """A schedule that takes any key."""

    class Config(pegboard.ComponentConfig):
        model_config = {"extra": "ignore"}
        power: float = Field(default=1.0, description="A power.")

    config: Config

    def build(self, total_steps: int) -> Any:
        return lambda step, base: base


class Oblivious(pegboard.LRScheduleComponent):
    """A schedule that forgets its config."""

    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__(type(config)())

    def build(self, total_steps: int) -> Any:
        return lambda step, base: base


class Tracking:
    """A tracker with a fault."""

    def __init__(self, closes: bool = True, changes: bool = False, finite: bool = False) -> None:
        self.closes, self.changes, self.finite = closes, changes, finite

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if self.changes:
            metrics.clear()
        if self.finite:
            for value in metrics.values():
                int(value)

    def close(self) -> None:
        if not self.closes:
            raise OSError("can't")


def tracker(**faults: bool) -> type[pegboard.TrackerComponent]:
    class Tracked(pegboard.TrackerComponent):
        """A tracker."""

        config: Any

        def build(self, run_dir: Path) -> Any:
            return Tracking(**faults)

    return Tracked


class Told(pegboard.Callback):
    """A callback without a fault."""

    def on_step_end(self, event: pegboard.StepEnd) -> str | None:
        return "low enough" if event.metrics["loss"] < 0.1 else None


class Misspelt(Told):
    def on_checkpoint_save(self, event: pegboard.CheckpointSaved) -> None: ...


class Wordless(Told):
    def on_step_end(self, event: pegboard.StepEnd) -> Any:
        return event.metrics["loss"] > 0.1


class Meddling(Told):
    def on_step_end(self, event: pegboard.StepEnd) -> str | None:
        dict.clear(event.metrics)  # type: ignore[arg-type]
        return None


class Whole(Told):
    def on_step_end(self, event: pegboard.StepEnd) -> str | None:
        int(event.metrics["loss"])
        return None


class Expectant(Told):
    def on_train_end(self, event: pegboard.TrainEnd) -> None:
        assert event.step == event.total_steps


class Hopeful(Told):
    def on_train_error(self, event: pegboard.TrainFailure) -> None:
        assert event.step > 0


def callback(told: Callable[[], Any]) -> type[pegboard.CallbackComponent]:
    class Called(pegboard.CallbackComponent):
        """A callback."""

        config: Any

        def build(self, run_dir: Path) -> Any:
            return told()

    return Called


class OnceOnly(pegboard.CallbackComponent):
    """A callback that can't be resumed."""

    config: Any

    def build(self, run_dir: Path) -> pegboard.Callback:
        (run_dir / "told").mkdir()
        return Told()


BROKEN: list[tuple[str, Any]] = [
    ("its_methods_are_events", callback(Misspelt)),
    ("its_methods_are_events", callback(object)),
    ("takes_a_run_that_fails", callback(Hopeful)),
    ("takes_a_run_that_is_stopped", callback(Expectant)),
    ("takes_a_whole_run", callback(object)),
    ("may_be_built_again", OnceOnly),
    ("asks_for_a_stop_in_words", callback(Wordless)),
    ("leaves_the_facts_alone", callback(Meddling)),
    ("takes_numbers_that_are_not_finite", callback(Whole)),
    ("describes_every_field", Undescribed),
    ("says_what_it_is", Silent),
    ("config_is_strict_and_frozen", Loose),
    ("init_keeps_the_config", Oblivious),
    ("an_index_outside_is_an_error", dataset(Wrapping)),
    ("keys_say_where", dataset(OneKey)),
    ("keys_say_where", dataset(FromZero)),
    ("fingerprint_is_stable", dataset(Restless)),
    ("any_order_gives_the_same_records", dataset(Forgetful)),
    ("pickles_into_a_new_process", dataset(Unpicklable)),
    ("the_first_step_moves", schedule(lambda step, total, base: base * (step - 1) / total)),
    ("no_rate_is_over_the_base", schedule(lambda step, total, base: base * 2)),
    (
        "every_step_has_a_rate",
        schedule(lambda step, total, base: base / max(0, total - step - 1e-9)),
    ),
    ("another_base_never_lowers_a_rate", schedule(lambda step, total, base: 1e-3)),
    ("a_step_has_one_rate", schedule(lambda s, t, b, seen=[]: (seen.append(s), b / len(seen))[1])),  # type: ignore[misc]
    ("every_sample_once", packer(lambda lengths, limit, seed: alone(shuffled(lengths, seed)[1:]))),
    (
        "every_sample_once",
        packer(lambda lengths, limit, seed: alone(np.zeros(len(lengths), dtype=np.int64))),
    ),
    ("the_seed_alone_decides", packer(lambda lengths, limit, seed: alone(np.arange(len(lengths))))),
    (
        "no_pack_is_too_long",
        packer(
            lambda lengths, limit, seed: PackPlan(
                np.array([0, len(lengths)]), shuffled(lengths, seed)
            )
        ),
    ),
    ("parts_add_up", loss(lambda nll, targets: nll.mean() if len(nll) else nll.sum())),
    ("the_scale_is_a_factor", loss(lambda nll, targets: (nll * targets.weights_K).sum())),
    ("weights_are_factors", loss(lambda nll, targets: nll.sum() * targets.scale)),
    (
        "gradients_are_right",
        loss(
            lambda nll, targets: (
                (nll * targets.weights_K).sum() * targets.scale + (nll - nll.detach()).sum()
            )
        ),
    ),
    (
        "counts_targets",
        loss(lambda nll, t: (nll * t.weights_K).sum() * t.scale, counts=2.0),
    ),
    ("takes_numbers_and_closes", tracker(closes=False)),
    ("leaves_the_numbers_alone", tracker(changes=True)),
    ("takes_numbers_that_are_not_finite", tracker(finite=True)),
]


@pytest.mark.parametrize(
    ("name", "component"), BROKEN, ids=[f"{i}-{name}" for i, (name, _) in enumerate(BROKEN)]
)
def test_the_check_of_a_promise_finds_it_broken(name: str, component: Any, tmp_path: Path) -> None:
    check = next(check for check in checks_for(component.kind) if check.name == name)
    with pytest.raises(Exception) as caught:  # noqa: PT011 (what is broken decides)
        check.run(Case(component, {}, tmp_path))
    assert not isinstance(caught.value, pytest.skip.Exception)


SOUND: dict[str, Any] = {
    "dataset": dataset(Rows),
    "lr_schedule": schedule(lambda step, total, base: base * (1 - (step - 1) / total)),
    "packer": packer(lambda lengths, limit, seed: alone(shuffled(lengths, seed))),
    "loss": loss(lambda nll, targets: (nll * targets.weights_K).sum() * targets.scale),
    "tracker": tracker(),
    "callback": callback(Told),
}


@pytest.mark.parametrize(
    "name", sorted({name for name, _ in BROKEN} - {"pickles_into_a_new_process"})
)
def test_the_same_check_passes_a_sound_part(name: str, tmp_path: Path) -> None:
    kinds = {component.kind for check, component in BROKEN if check == name}
    for kind in kinds:
        check = next(check for check in checks_for(kind) if check.name == name)
        check.run(Case(SOUND[kind], {}, tmp_path))


test_rows_keep_the_contract = contract_for(
    dataset(Rows), skip={"pickles_into_a_new_process": "its class is made in a function"}
)


def test_a_check_that_does_not_exist_cannot_be_skipped() -> None:
    with pytest.raises(ValueError, match="no check named tidy; there are is_a_part"):
        contract_for(dataset(Rows), skip={"tidy": "because"})
