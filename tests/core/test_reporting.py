"""Claim: losses per source are means over that source's weighted targets however they were cut into micro-batches;
the line of a step says what it should; a bar is drawn on a terminal only; every metric is documented."""

from __future__ import annotations

import io
import math
import sys
from pathlib import Path

import pytest
import torch

from pegboard.contracts import Batch, ModelOutput, Targets
from pegboard.parallel import Ranks
from pegboard.reporting import SourceSums, StepResult, progress_bar, step_line, step_metrics

ALONE = Ranks(0, 1, torch.device("cpu"), None)  # type: ignore[arg-type]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def micro_batch(
    losses: list[float], sources: list[int], weights: list[float]
) -> tuple[Batch, ModelOutput]:
    count = len(losses)
    ids_T = torch.zeros(count, dtype=torch.int64)
    targets = Targets(
        torch.arange(count),
        ids_T,
        torch.tensor(weights),
        torch.tensor(sources, dtype=torch.int64),
        1.0,
    )
    batch = Batch(
        input_ids_T=ids_T,
        position_ids_T=ids_T,
        cu_seqlens=torch.tensor([0, count], dtype=torch.int32),
        max_seqlen=count,
        targets=targets,
        num_tokens=count,
    )
    values_K = torch.tensor(losses)
    loss = (values_K * torch.tensor(weights)).sum() / 10
    return batch, ModelOutput(loss, values_K, {"z_loss": torch.tensor(0.25)})


def test_a_source_has_the_weighted_mean_of_its_own_targets() -> None:
    sums = SourceSums(3, torch.device("cpu"))
    sums.add(*micro_batch([1.0, 2.0, 8.0], [0, 0, 2], [1.0, 3.0, 1.0]))
    sums.add(*micro_batch([4.0], [2], [0.5]))
    sums.add(*micro_batch([], [], []))
    loss, by_source, metrics = sums.reduce(["a", "b", "c"], ALONE)
    assert loss == pytest.approx((1 + 6 + 8 + 2) / 10)
    assert by_source == pytest.approx({"a": 7 / 4, "c": 10 / 1.5})  # of b there was nothing
    assert sums.mean_loss == pytest.approx(17 / 5.5)
    assert metrics == {"z_loss": 0.75}


def test_nothing_at_all_is_no_number() -> None:
    sums = SourceSums(1, torch.device("cpu"))
    assert sums.reduce(["a"], ALONE) == (0.0, {}, {})
    assert math.isnan(sums.mean_loss)


def metrics_of_a_step() -> dict[str, float]:
    counts = {
        "tokens": 1000.0,
        "samples": 5.0,
        "skipped_samples": 1.0,
        "supervised": 400.0,
        "tiles": 2.0,
    }
    result = StepResult(
        1.25, 3.5, True, counts, {"chats": 1.5}, {"z_loss": 0.1, "balancing_loss": 0.2}
    )
    return step_metrics(
        result, lr=1e-4, epoch=2, step_s=0.5, data_wait_s=0.01, peak_memory_gib=7.0, bad_steps=3
    )


def test_the_line_of_a_step_has_every_number_a_person_wants() -> None:
    line = step_line(10, 100, metrics_of_a_step(), pace_s=40.0)
    for words in (
        "step 10/100", "loss 1.2500", "lr 1.000e-04", "grad_norm 3.500", "800 targets/s",
        "2,000 tokens/s", "7.00 GiB", "ETA 1:00:00",
    ):  # fmt: skip
        assert words in line


def test_every_metric_is_documented() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in ("step", *metrics_of_a_step(), "eval_loss", "eval_loss/chats"):
        assert f"`{name.replace('/chats', '/<source>')}`" in text, name


@pytest.mark.parametrize(
    ("terminal", "shown", "drawn"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_a_bar_is_drawn_on_a_terminal_and_by_one_rank_only(
    terminal: bool, shown: bool, drawn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    bar = progress_bar(3, 1, shown=shown)
    bar.update(1)
    bar.close()
    assert ("2/3" in screen.getvalue()) is drawn
