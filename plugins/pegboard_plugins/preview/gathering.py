"""Gather what a step is fed: the run's own stores, plan and collator, in one process.

Tokens, positions, boundaries and losses are read off the batches that the trainer's loader gives
for the step; nothing is computed a second way. What a batch does not say (which message a token
belongs to, the prompt at inference) is found from the record and marked as such in the views.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pegboard import ConfigError, DataError
from pegboard.data_loading import DataSource, EpochPlan, RunData
from pegboard.preparation import cache_folder, prepare_sources
from pegboard_plugins.texts.messages import read_chat_record
from pegboard_plugins.texts.rendering import ChatRenderer

from .conditions import Measure
from .contents import Histogram, Pack, Preview, Sample, Segment, Source, Totals, Turn
from .inference import compare_turns
from .pictures import read_tiles
from .pieces import PieceReader
from .records import RecordFinder
from .roles import TextSpan, find_roles

if TYPE_CHECKING:
    from pegboard.contracts import Batch, SampleKey, Tokenizer
    from pegboard.run_config import DatasetEntry, RunConfig

__all__ = ["gather_preview"]

_BINS = 48


def gather_preview(
    run: RunConfig,
    *,
    config_path: str,
    step: int,
    num_shown: int,
    trust_remote_code: bool = False,
) -> Preview:
    """Prepare the data as training does (or map what is prepared) and read one step.

    Args:
        step: from 1, over all epochs.
        num_shown: packs of the step to read token by token.

    Raises:
        ConfigError: the run has no such step.
        DataError: a bad record, or no samples.
    """
    tokenizer = run.tokenizer.build(trust_remote_code=trust_remote_code)
    sources = prepare_sources(
        run.datasets,
        cache=cache_folder(run),
        tokenizer=tokenizer,
        model=run.model,
        num_workers=run.dataloader.num_workers,
    )
    # One data rank of one: its micro-batches are the packs of all ranks, in order.
    data = RunData(
        sources,
        packer=run.dataloader.packer.build(),
        collator=run.dataloader.collator.build(pad_token_id=tokenizer.pad_token_id),
        pack_max_length=run.dataloader.pack_max_length,
        global_batch_size=run.global_batch_size,
        seed=run.seed,
    )
    try:
        epoch, step_in_epoch, total_steps = _locate(run, data, step)
        batches = data.micro_batches(epoch, step_in_epoch)
    finally:
        data.close()
    plan = data.plan_epoch(epoch)
    chats = [_ChatReader(entry, tokenizer, run) for entry in run.datasets]
    pieces = PieceReader(tokenizer)
    first = step_in_epoch * run.global_batch_size + 1
    packs = tuple(
        _read_pack(batch, first + k, chats, pieces)
        for k, batch in enumerate(batches[:num_shown])
        if batch.num_tokens
    )
    step_sources = _count_step(batches, [source.name for source in sources])
    listed = tuple(_read_source(s, k, plan, step_sources[k]) for k, s in enumerate(sources))
    step_totals = Totals(
        packs=sum(batch.num_tokens > 0 for batch in batches),
        samples=sum(totals.samples for totals in step_sources),
        tokens=sum(batch.num_tokens for batch in batches),
        supervised=sum(len(batch.targets.positions_K) for batch in batches),
        padding=sum(
            len(batch.input_ids_T) - batch.num_tokens for batch in batches if batch.num_tokens
        ),
    )
    epoch_totals = Totals(
        packs=plan.num_packs,
        samples=len(plan.samples),
        tokens=plan.num_tokens,
        supervised=sum(source.epoch.supervised for source in listed),
    )
    return Preview(
        config_path=config_path,
        model=type(run.model).__name__,
        tokenizer=type(run.tokenizer).__name__,
        step=step,
        total_steps=total_steps,
        epoch=epoch + 1,
        pack_max_length=run.dataloader.pack_max_length,
        step_totals=step_totals,
        epoch_totals=epoch_totals,
        fill=plan.fill,
        sources=listed,
        histogram=_histogram(sources, plan),
        packs=packs,
        measures=_measures(listed, step, step_totals, epoch_totals, plan, run, packs),
    )


def _locate(run: RunConfig, data: RunData, step: int) -> tuple[int, int, int]:
    """(epoch from 0, step in it from 0, steps in all); counted as the trainer does."""
    total = run.total_steps
    if total is None:
        total = sum(data.steps_per_epoch(epoch) for epoch in range(run.epoch_num or 1))
    if step > total:
        raise ConfigError(f"--step {step}: the run has {total} steps")
    epoch, left = 0, step - 1
    while left >= (steps := data.steps_per_epoch(epoch)):
        epoch, left = epoch + 1, left - steps
    return epoch, left, total


def _read_pack(
    batch: Batch, number: int, chats: Sequence[_ChatReader], pieces: PieceReader
) -> Pack:
    ids = batch.input_ids_T.tolist()
    read = pieces.read(ids)
    weights = np.zeros(len(ids))
    # A row predicts the next token: the loss is that token's.
    weights[batch.targets.positions_K.numpy() + 1] = batch.targets.weights_K.numpy()
    names = {chat.name: k for k, chat in enumerate(chats)}
    bounds = batch.cu_seqlens.tolist()
    samples = []
    for k, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if start >= batch.num_tokens:
            samples.append(Sample(-1, "padding", start, end, (Segment("padding", start, end),)))
            continue
        key = batch.keys[k] if k < len(batch.keys) else None
        if key is None or key.source not in names:
            samples.append(Sample(-1, "unknown", start, end, (Segment("text", start, end),)))
            continue
        source = names[key.source]
        texts = [piece.text for piece in read[start:end]]
        segments, turns = chats[source].read(key, texts, weights[start:end] != 0)
        segments = [Segment(role, a + start, b + start) for role, a, b in segments]
        place = f"{key} part {key.part + 1}" if key.part else str(key)
        samples.append(Sample(source, place, start, end, tuple(segments), tuple(turns)))
    return Pack(
        number=number,
        ids=ids,
        positions=batch.position_ids_T.tolist(),
        weights=weights.tolist(),
        pieces=read,
        samples=tuple(samples),
        tiles=read_tiles(batch),
        media=tuple(f"{name} {tuple(value.shape)}" for name, value in batch.media.items()),
        skipped=batch.num_skipped,
    )


class _ChatReader:
    """Reads the chats behind the samples of one dataset, where there are any."""

    def __init__(self, entry: DatasetEntry, tokenizer: Tokenizer, run: RunConfig) -> None:
        self.name = entry.name
        self._stops = tuple(tokenizer.decode([token]) for token in tokenizer.eos_token_ids)
        self._records: RecordFinder | None = None
        self._renderer: ChatRenderer | None = None
        arguments = getattr(entry.tokenize_fn.config, "template_kwargs", None)
        if tokenizer.chat_template is not None and isinstance(arguments, Mapping):
            self._renderer = ChatRenderer(tokenizer, arguments)
            self._records = RecordFinder(entry.dataset.build(entry.name))

    def read(
        self, key: SampleKey, texts: Sequence[str], has_loss: np.ndarray
    ) -> tuple[list[Segment], list[Turn]]:
        """Roles of a sample's tokens (counted from its first), and its turns beside inference."""
        whole = [Segment("text", 0, len(texts))]
        if self._renderer is None or self._records is None:
            return whole, []
        record = self._records.find(key)
        if record is None:
            return whole, []
        try:
            chat = read_chat_record(record)
        except DataError:
            return whole, []
        text = "".join(texts)
        ends = np.cumsum([len(part) for part in texts])
        spans = find_roles(text, chat.messages, chat.tools, self._renderer, self._stops)
        if not spans:
            return whole, []
        segments = [Segment(s.role, a, b) for s, a, b in _token_spans(spans, ends)]
        trained = [bool(has_loss[a:b].any()) for _, a, b in segments]
        turns = compare_turns(
            text, spans, trained, chat.messages, chat.tools, self._renderer, self._stops
        )
        return [segment for segment in segments if segment.end > segment.start], turns


def _token_spans(spans: Sequence[TextSpan], ends: np.ndarray) -> list[tuple[TextSpan, int, int]]:
    """Character spans that cover a text -> token spans that cover it; a token goes by its end."""
    borders = np.searchsorted(ends, [span.end for span in spans], side="left") + 1
    borders[-1] = len(ends)
    starts = [0, *borders[:-1].tolist()]
    return list(zip(spans, starts, borders.tolist(), strict=True))


def _count_step(batches: Sequence[Batch], names: Sequence[str]) -> list[Totals]:
    samples: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    supervised: Counter[int] = Counter()
    for batch in batches:
        lengths = np.diff(batch.cu_seqlens.numpy()).tolist()
        for key, length in zip(batch.keys, lengths, strict=False):
            samples[key.source] += 1
            tokens[key.source] += length
        supervised.update(batch.targets.source_ids_K.tolist())
    return [Totals(0, samples[name], tokens[name], supervised[k]) for k, name in enumerate(names)]


def _read_source(source: DataSource, k: int, plan: EpochPlan, step: Totals) -> Source:
    meta: Mapping[str, Any] = source.store.meta
    chosen = plan.samples[plan.sources == k]
    supervised = int(source.store.num_targets[chosen].sum(dtype=np.int64))
    dropped = dict(meta["dropped"])
    if meta["num_bad"]:
        dropped["bad record"] = meta["num_bad"]
    tokens = int(source.store.lengths[chosen].sum())
    return Source(
        name=source.name,
        records=meta["num_records"],
        samples=len(source.store),
        epoch=Totals(0, len(chosen), tokens, supervised),
        step=step,
        dropped=dropped,
        bad=meta["num_bad"],
        truncated=meta["events"].get("truncated", 0),
        events=meta["events"],
    )


def _histogram(sources: Sequence[DataSource], plan: EpochPlan) -> Histogram:
    lengths = [
        source.store.lengths[plan.samples[plan.sources == k]] for k, source in enumerate(sources)
    ]
    together = np.concatenate(lengths)
    longest = int(together.max())
    width = -(-longest // _BINS)
    edges = np.arange(0, longest + width, width)
    edges = np.append(edges, edges[-1] + width) if edges[-1] <= longest else edges
    counts = tuple(tuple(np.histogram(part, bins=edges)[0].tolist()) for part in lengths)
    marks = np.percentile(together, [50, 90, 99], method="inverted_cdf").astype(int).tolist()
    quantiles = dict(zip(("p50", "p90", "p99"), marks, strict=True))
    return Histogram(tuple(edges.tolist()), counts, {**quantiles, "longest": longest})


def _measures(
    sources: Sequence[Source],
    step: int,
    step_totals: Totals,
    epoch: Totals,
    plan: EpochPlan,
    run: RunConfig,
    packs: Sequence[Pack],
) -> tuple[Measure, ...]:
    measures = []
    for source in sources:
        place = f"source '{source.name}'"
        taken = source.epoch
        lost = sum(source.dropped.values())
        measures += [
            Measure("supervised", place, taken.supervised, taken.tokens, "tokens"),
            Measure("dropped", place, lost, source.records, "records"),
            Measure("bad", place, source.bad, source.records, "records"),
            Measure("truncated", place, source.truncated, source.samples, "samples"),
        ]
    rows = step_totals.tokens + step_totals.padding
    room = epoch.packs * run.dataloader.pack_max_length
    measures.append(Measure("padding", f"step {step}", step_totals.padding, rows, "tokens"))
    measures.append(Measure("fill", f"epoch of step {step}", plan.num_tokens, room, "places"))
    turns = [turn for pack in packs for sample in pack.samples for turn in sample.turns]
    trained = [turn for turn in turns if turn.status in ("same", "cut", "differs")]
    differs = sum(turn.status == "differs" for turn in trained)
    measures.append(
        Measure("mismatch", f"the packs shown of step {step}", differs, len(trained), "turns")
    )
    return tuple(measures)
