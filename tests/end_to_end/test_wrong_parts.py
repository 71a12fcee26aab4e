"""The claim: a part of somebody's own that builds or returns the wrong thing is an error of one line that names the part,
not a traceback of ours."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pegboard.cli import main

PARTS = '''
import pegboard


class Words(pegboard.DatasetComponent):
    """Two words."""

    def build(self, name):
        return WORDS


class WordRecords:
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"prompt": "abc"[index], "completion": "xyz"[index]}

    def key(self, index):
        return pegboard.SampleKey("words", "words", index + 1)

    def fingerprint(self):
        return "two words"


class Plain(pegboard.LossComponent):
    """Cross entropy."""

    def build(self):
        return LOSS


class PlainLoss:
    def __call__(self, hidden_TD, head, targets):
        from torch.nn.functional import cross_entropy

        logits = head.logits(hidden_TD[targets.positions_K]).float()
        losses = cross_entropy(logits, targets.labels_K, reduction="none")
        loss = (losses * targets.weights_K).sum() * targets.scale
        return OUTPUT

    def step_counts(self, batch):
        return {"targets": float(batch.targets.weights_K.sum())}


class Nothing(pegboard.SaverComponent):
    """Writes nothing."""

    def build(self):
        return SAVER


class NothingSaver:
    def due(self, step, *, is_last):
        return False

    def save(self, request):
        return None


@pegboard.hookimpl
def register_datasets(register):
    register(Words)


@pegboard.hookimpl
def register_losses(register):
    register(Plain)


@pegboard.hookimpl
def register_savers(register):
    register(Nothing)
'''
RIGHT = {
    "WORDS": "WordRecords()",
    "LOSS": "PlainLoss()",
    "OUTPUT": "pegboard.LossOutput(loss, losses.detach())",
    "SAVER": "NothingSaver()",
}


def _train(make_config: Callable[..., Path], folder: Path, **wrong: str) -> int:
    code = PARTS
    for word, value in {**RIGHT, **wrong}.items():
        code = code.replace(f"return {word}\n", f"return {value}\n")
    file = folder / f"parts_{uuid.uuid4().hex}.py"  # a module name of its own in this process
    file.write_text(code)
    changes: dict[str, Any] = {
        "datasets": [
            {
                "dataset": {"class_name": "Words"},
                "tokenize_fn": {"class_name": "ChatTokenizeFn", "max_length": 64},
            }
        ],
        "loss": {"class_name": "Plain"},
        "savers": [{"class_name": "Nothing"}],
        "epoch_num": 1,
        "global_batch_size": 1,
    }
    config = make_config(**changes)
    return main(["train", str(config), "--plugin", str(file), "--no-third-party"])


def test_the_parts_train_as_they_should_be(
    make_config: Callable[..., Path], tmp_path: Path
) -> None:
    assert _train(make_config, tmp_path) == 0


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            {"WORDS": "None"},
            "dataset 'Words': build() returned None; return an object that has __len__, __getitem__, key, fingerprint",
        ),
        (
            {"WORDS": "[{}]"},
            "dataset 'Words': build() returned an object of type list, which lacks key, fingerprint; a built dataset has "
            "__len__, __getitem__, key, fingerprint",
        ),
        (
            {"LOSS": "None"},
            "loss 'Plain': build() returned None; return an object that has __call__, step_counts",
        ),
        (
            {"LOSS": "PlainLoss().__call__"},
            "loss 'Plain': build() returned an object of type method, which lacks step_counts; a built loss has __call__, "
            "step_counts",
        ),
        (
            {"OUTPUT": "loss"},
            "loss 'PlainLoss' returned an object of type Tensor; return pegboard.LossOutput(scaled sum, detached loss of each "
            "target)",
        ),
        ({"SAVER": "None"}, "saver 'Nothing': build() returned None; return an object that has due, save"),
    ],
    ids=["no dataset", "a list", "no loss", "a function", "a bare tensor", "no saver"],
)  # fmt: skip
def test_a_wrong_thing_is_one_line_that_names_the_part(
    wrong: dict[str, str],
    says: str,
    make_config: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _train(make_config, tmp_path, **wrong) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == says
    assert "Traceback" not in said
