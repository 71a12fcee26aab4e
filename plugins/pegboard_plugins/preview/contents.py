"""What a preview shows, as plain values: the views (terminal, HTML) read nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pegboard.data_report import Count

from .conditions import Measure
from .pieces import Piece

__all__ = [
    "DiffPart",
    "Histogram",
    "Pack",
    "Policy",
    "Preview",
    "Sample",
    "Segment",
    "Source",
    "Tile",
    "Totals",
    "Turn",
    "TurnStatus",
]

TurnStatus = Literal["same", "cut", "differs", "no loss", "rewritten"]
"""same: trained, after the very prompt of inference; cut: so too, but max_length took its end;
differs: trained, and the text up to its end is another than at inference; no loss: as at inference,
not trained; rewritten: another text than at inference, not trained."""


class DiffPart(NamedTuple):
    """A stretch of a comparison of two texts."""

    kind: Literal["same", "training", "inference", "elided"]
    """In both, in the training text only, in the inference text only; or left out, being the same."""
    text: str


class Turn(NamedTuple):
    """An assistant turn as it trains, beside what it is at inference."""

    message: int
    """Index in the record's messages."""
    status: TurnStatus
    diff: tuple[DiffPart, ...] = ()
    """Empty where the texts are equal."""


class Segment(NamedTuple):
    """Tokens of one role, in a row of a pack."""

    role: str
    """Of the message; `template` for what the chat template says itself, `text` without messages,
    `padding`."""
    start: int
    end: int


@dataclass(frozen=True)
class Sample:
    """One sample in a pack, or the padding at its end."""

    source: int
    """Index in Preview.sources; -1 for padding."""
    place: str
    """`file:line`, and the part of the record where it gave several."""
    start: int
    """First token, in the pack's row."""
    end: int
    segments: tuple[Segment, ...]
    turns: tuple[Turn, ...] = ()


class Tile(NamedTuple):
    """A vision tile and the rows of the pack that its features fill."""

    start: int
    end: int
    picture: bytes
    """A small PNG; empty where there are too many."""


@dataclass(frozen=True)
class Pack:
    """One pack as the collator made it: lists have one entry for each of the row's T tokens."""

    number: int
    """In the epoch, from 1."""
    ids: Sequence[int]
    positions: Sequence[int]
    weights: Sequence[float]
    """Weight of the loss that predicts this token; 0 if it is not predicted."""
    pieces: Sequence[Piece]
    samples: tuple[Sample, ...]
    tiles: tuple[Tile, ...] = ()
    media: str = ""
    """What the batch holds beside text."""
    skipped: int = 0
    """Samples left out because their media could not be read."""
    beyond: int = 0
    """Tokens that are predicted at the end of a piece and stand in the next one, in another pack."""

    @property
    def num_tokens(self) -> int:
        """Without padding."""
        return sum(sample.end - sample.start for sample in self.samples if sample.source >= 0)

    @property
    def num_supervised(self) -> int:
        return sum(weight != 0 for weight in self.weights) + self.beyond


@dataclass(frozen=True)
class Totals:
    """Sums over packs."""

    packs: int
    samples: int
    tokens: int
    """Without padding."""
    supervised: int
    padding: int = 0


class Policy(NamedTuple):
    """What a source would train under a way to treat history, before anything is cut."""

    name: str
    tokens: int | None
    """None where it is not known."""
    supervised: int
    used: bool
    """It is the one of this run."""
    is_estimate: bool = False
    """The numbers were estimated from some of the records."""

    def said(self, number: int) -> str:
        """`1,234`, or `~1,230` where it is an estimate."""
        return str(Count(number, self.is_estimate))


@dataclass(frozen=True)
class Source:
    """One dataset of the run."""

    name: str
    records: int
    """Records read, before any was dropped."""
    samples: int
    """Samples of the store, once each."""
    epoch: Totals
    """What the epoch takes of it (packs: 0)."""
    step: Totals
    """What the step takes of it (packs: 0)."""
    dropped: Mapping[str, int]
    """Records that gave no sample, by reason; bad ones included."""
    bad: int
    truncated: int
    events: Mapping[str, int]
    """What else the tokenize function counted."""
    policies: tuple[Policy, ...] = ()


@dataclass(frozen=True)
class Histogram:
    """Samples of the epoch by length."""

    edges: tuple[int, ...]
    """(bins+1,) lengths in tokens; a bin holds its lower edge, not its upper one."""
    counts: tuple[tuple[int, ...], ...]
    """(sources, bins)."""
    quantiles: Mapping[str, int]
    """`p50` and the like -> tokens."""


@dataclass(frozen=True)
class Preview:
    """Everything shown."""

    config_path: str
    model: str
    tokenizer: str
    step: int
    """From 1, over all epochs."""
    total_steps: int
    epoch: int
    """From 1."""
    pack_max_length: int
    step_totals: Totals
    epoch_totals: Totals
    fill: float
    """Tokens / room in the epoch's packs."""
    sources: tuple[Source, ...]
    histogram: Histogram
    packs: tuple[Pack, ...]
    """The first of the step's packs."""
    measures: tuple[Measure, ...]
