"""Gather what a step is fed: the run's own stores, plan and collator, in one process.

Tokens, positions, boundaries and losses are read off the batches that the trainer's loader gives
for the step; nothing is computed a second way. What a batch does not say (which message a token
belongs to, the prompt at inference) is found from the record and marked as such in the views.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pegboard import ConfigError
from pegboard.assemble import build_run_data
from pegboard.data_loading import Cursor, DataSource, EpochPlan, RunData
from pegboard.data_report import Count, read_counts
from pegboard.preparation import cache_folder, prepare_sources

from .chats import ChatReader
from .conditions import Measure
from .contents import Histogram, Pack, Policy, Preview, Sample, Segment, Source, Totals
from .pictures import read_tiles
from .pieces import PieceReader

if TYPE_CHECKING:
    from pegboard.contracts import Batch
    from pegboard.run_config import RunConfig

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
        log_counts=False,  # the preview shows them
    )
    # One data rank of one: its micro-batches are the packs of all ranks.
    data = build_run_data(
        run,
        None,
        sources,
        tokenizer,
        global_batch_size=run.global_batch_size,
        last_epoch=run.epoch_num - 1 if run.epoch_num else None,
    )
    try:
        epoch, step_in_epoch, total_steps = _locate(run, data, step)
        cursor = Cursor(epoch, step_in_epoch * run.global_batch_size)
        batches = data.batches_at(cursor, steps_left=1)
    finally:
        data.close()
    plan = data.plan_epoch(epoch)
    pieces = PieceReader(tokenizer)
    chats = [
        ChatReader(entry, source, tokenizer, run.model, pieces)
        for entry, source in zip(run.datasets, sources, strict=True)
    ]
    first = step_in_epoch * run.global_batch_size + 1
    packs = tuple(
        _read_pack(batch, first + k, _in_pack(plan, first + k - 1), sources, chats, pieces)
        for k, batch in enumerate(batches[:num_shown])
        if batch.num_tokens
    )
    step_sources = _count_step(batches, [source.name for source in sources])
    listed = tuple(
        _read_source(source, k, plan, step_sources[k], run.datasets[k].tokenize_fn.config)
        for k, source in enumerate(sources)
    )
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
        samples=plan.num_samples,
        tokens=plan.num_tokens,
        supervised=plan.num_targets,
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


class _Piece(NamedTuple):
    """A sample, or a part of one, as planned."""

    source: int
    sample: int
    """In the source's store."""
    start: int
    """First token of the piece in its sample."""


def _in_pack(plan: EpochPlan, pack: int) -> list[_Piece]:
    """What the plan puts in a pack, in order."""
    part = plan.pieces.part(int(plan.offsets[pack]), int(plan.offsets[pack + 1]))
    starts = [0] * len(part.samples) if part.starts is None else part.starts.tolist()
    return list(map(_Piece, part.sources.tolist(), part.samples.tolist(), starts))


def _read_pack(
    batch: Batch,
    number: int,
    planned: Sequence[_Piece],
    sources: Sequence[DataSource],
    chats: Sequence[ChatReader],
    pieces: PieceReader,
) -> Pack:
    ids = batch.input_ids_T.tolist()
    read = pieces.read(ids)
    weights, beyond = _losses(batch)
    bounds = batch.cu_seqlens.tolist()
    # A collator may leave samples out, but keeps their order.
    waiting = iter(planned)
    samples = []
    for k, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if start >= batch.num_tokens:
            samples.append(Sample(-1, "padding", start, end, (Segment("padding", start, end),)))
            continue
        key = batch.keys[k] if k < len(batch.keys) else None
        piece = next((p for p in waiting if sources[p.source].store.key(p.sample) == key), None)
        if key is None or piece is None:
            samples.append(Sample(-1, "unknown", start, end, (Segment("text", start, end),)))
            continue
        texts = [one.text for one in read[start:end]]
        has_loss = weights[start:end] != 0
        segments, turns = chats[piece.source].read(piece.sample, texts, has_loss, piece.start)
        segments = [Segment(role, a + start, b + start) for role, a, b in segments]
        place = f"{key} part {key.part + 1}" if key.part else str(key)
        if end - start < sources[piece.source].store.lengths[piece.sample]:
            place += f", tokens {piece.start:,} to {piece.start + end - start - 1:,}"
        samples.append(Sample(piece.source, place, start, end, tuple(segments), tuple(turns)))
    return Pack(
        number=number,
        ids=ids,
        positions=batch.position_ids_T.tolist(),
        weights=weights.tolist(),
        pieces=read,
        samples=tuple(samples),
        tiles=read_tiles(batch),
        media=_describe_media(batch),
        skipped=batch.num_skipped,
        beyond=beyond,
    )


def _describe_media(batch: Batch) -> str:
    if not batch.media:
        return ""
    if "pixel_values" in batch.media and "tile_counts" in batch.media:
        tiles, pictures = len(batch.media["pixel_values"]), len(batch.media["tile_counts"])
        return f"{tiles:,} image tiles of {pictures:,} pictures"
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in batch.media.items())


def _losses(batch: Batch) -> tuple[np.ndarray, int]:
    """(T,) weight of the loss on each token, and how many predicted tokens stand in no row here.

    A row predicts the token after it. Where a sample is cut, its last token predicts the first of
    the next piece, which is in another pack.
    """
    rows = batch.targets.positions_K.numpy()
    ids = batch.input_ids_T.numpy()
    weights = np.zeros(len(ids))
    ends = np.isin(rows + 1, batch.cu_seqlens.numpy())
    weights[rows[~ends] + 1] = batch.targets.weights_K.numpy()[~ends]
    return weights, int(ends.sum())


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


def _read_source(source: DataSource, k: int, plan: EpochPlan, step: Totals, config: Any) -> Source:
    meta: Mapping[str, Any] = source.store.meta
    counts = plan.counts[k]
    counted = read_counts(meta["events"])
    dropped = dict(meta["dropped"])
    if meta["num_bad"]:
        dropped["bad record"] = meta["num_bad"]
    return Source(
        name=source.name,
        records=meta["num_records"],
        samples=len(source.store),
        epoch=Totals(0, counts.samples, counts.tokens, counts.targets),
        step=step,
        dropped=dropped,
        bad=meta["num_bad"],
        truncated=sum(n for name, n in meta["events"].items() if name.startswith("truncated")),
        events={
            name: count.number
            for name, count in counted.items()
            if not name.startswith("truncated") and not name.endswith(" tokens")
        },
        policies=_policies(counted, _history(config)),
    )


def _history(config: Any) -> str | None:
    """The history policy that a tokenize function's config names, itself or for its inner one."""
    inner = getattr(config, "chat", None)
    found = getattr(config, "history", None)
    return found if inner is None else getattr(inner.config, "history", None)


def _policies(counts: Mapping[str, Count], used: str | None) -> tuple[Policy, ...]:
    """The counts `history X: tokens` and `history X: supervised tokens` of a tokenize function, by X."""
    policies = []
    for event, supervised in counts.items():
        group, _, what = event.partition(": ")
        if what == "supervised tokens":
            name = group.removeprefix("history ")
            tokens = counts.get(f"{group}: tokens")
            policies.append(
                Policy(
                    name,
                    None if tokens is None else tokens.number,
                    supervised.number,
                    name == used,
                    supervised.is_estimate or (tokens is not None and tokens.is_estimate),
                )
            )
    return tuple(sorted(policies, key=lambda policy: (not policy.used, policy.name)))


def _histogram(sources: Sequence[DataSource], plan: EpochPlan) -> Histogram:
    pieces = plan.pieces.part(0, plan.num_samples)
    lengths = []
    for k, source in enumerate(sources):
        own = pieces.sources == k
        if pieces.starts is None or pieces.stops is None:
            lengths.append(source.store.lengths[pieces.samples[own]])
        else:
            lengths.append(pieces.stops[own] - pieces.starts[own])
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
