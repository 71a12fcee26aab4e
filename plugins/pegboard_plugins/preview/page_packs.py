"""Packs, token by token, as HTML.

Tokens are plain elements in order; ids, positions and weights come beside them as JSON
(`pack_data`), read when a token is pointed at.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator

from .contents import Pack, Preview, Sample, Turn
from .markup import STATUS_WORDS, color, flow, sample_id, share, status_class, text
from .pieces import Piece
from .placeholders import groups

__all__ = ["pack_data", "render_packs", "render_tokens"]

_BAR_STEPS = 1000
_ROLES = ("system", "developer", "user", "assistant", "tool", "template", "padding")


def render_packs(preview: Preview) -> Iterator[str]:
    yield '<section id="packs"><h2>Packs</h2>'
    if len(preview.packs) < preview.step_totals.packs:
        yield (
            f'<p class="facts">The first {len(preview.packs):,} of this step\'s '
            f"{preview.step_totals.packs:,} packs; --packs N shows more.</p>"
        )
    yield (
        '<div class="tools">'
        '<p class="legend"><i class="s">loss</i><i>no loss</i><i class="x">special</i>'
        '<i class="y">E4 BD</i><span>part of a character</span><i><b class="d">  </b></i>'
        "<span>white space</span><i><b></b></i><span>newline</span></p>"
        '<p class="switches">'
        '<label><input type="checkbox" id="edges" checked>token edges</label>'
        '<label><input type="checkbox" id="only">loss only</label>'
        '<span class="keys"><kbd>j</kbd> <kbd>k</kbd> next, previous sample '
        "<kbd>&larr;</kbd> <kbd>&rarr;</kbd> tokens</span></p></div>"
    )
    top = max((weight for pack in preview.packs for weight in pack.weights), default=1.0) or 1.0
    for p, pack in enumerate(preview.packs):
        yield from _pack(preview, p, pack, top)
    yield "</section>"


def render_tokens(pack: Pack, start: int, end: int, top: float) -> Iterator[str]:
    for first, stop in groups(pack, start, end):
        piece, weight = pack.pieces[first], pack.weights[first]
        classes = _token_classes(piece, weight / top)
        times = stop - first
        more = f' data-n="{times}"' if times > 1 else ""
        shown = flow(piece.shown)
        if times > 1:
            classes.append("m")
            shown += f" &times;&#8239;{times:,}"
            shown += "".join(_tile(pack, k) for k in _tiles_in(pack, first, stop))
        elif piece.kind == "bytes" and piece.text:
            shown += f"<u>{flow(piece.text)}</u>"
        named = f' class="{" ".join(classes)}"' if classes else ""
        yield f"<i{named}{more}>{shown}</i>"


def pack_data(pack: Pack) -> dict[str, object]:
    weights = sorted({weight for weight in pack.weights if weight})
    return {
        "ids": list(pack.ids),
        "positions": list(pack.positions),
        "weights": [round(weight, 6) for weight in weights],
        "loss": [weights.index(w) if w else -1 for w in pack.weights]
        if len(weights) > 1
        else [0 if w else -1 for w in pack.weights],
    }


def _pack(preview: Preview, p: int, pack: Pack, top: float) -> Iterator[str]:
    media = f", {text(pack.media)}" if pack.media else ""
    if pack.skipped:
        media += f", {pack.skipped:,} skipped"
    yield f'<details class="pack" id="p{p}" data-pack="{p}" open><summary><h3>Pack {pack.number:,}</h3>'
    yield (
        f"<span>{pack.num_tokens:,} of {preview.pack_max_length:,} tokens, "
        f"{share(pack.num_supervised, pack.num_tokens)} supervised, "
        f"{sum(sample.source >= 0 for sample in pack.samples):,} samples{media}</span></summary>"
    )
    yield from _strip(p, pack)
    for s, sample in enumerate(pack.samples):
        yield from _sample(preview, p, s, pack, sample, top)
    yield "</details>"


def _strip(p: int, pack: Pack) -> Iterator[str]:
    """The pack at a glance: samples in their sources' colours, full where there is loss."""
    scale = _BAR_STEPS / max(1, len(pack.ids))
    yield (
        f'<svg class="strip" viewBox="0 0 {_BAR_STEPS} 16" preserveAspectRatio="none" '
        'aria-hidden="true">'
    )
    for s, sample in enumerate(pack.samples):
        left, wide = sample.start * scale, (sample.end - sample.start) * scale
        yield (
            f'<a href="#{sample_id(p, s)}" tabindex="-1" class="{_sample_color(sample)}">'
            f"<title>{text(sample.place)}</title>"
            f'<rect class="rail" x="{left:.2f}" width="{max(wide - 0.8, 0.4):.2f}" height="16"/>'
        )
        for start, end in _loss_runs(pack, sample, scale):
            yield f'<rect x="{start:.2f}" width="{end - start:.2f}" height="16"/>'
        yield "</a>"
    yield "</svg>"


def _loss_runs(pack: Pack, sample: Sample, scale: float) -> Iterator[tuple[float, float]]:
    """Where a sample has loss, in units of the strip; closer runs than can be seen are one."""
    start: float | None = None
    last = 0.0
    for k in range(sample.start, sample.end):
        if not pack.weights[k]:
            continue
        if start is None:
            start = k * scale
        elif k * scale - last > 0.5:
            yield start, last
            start = k * scale
        last = min((k + 1) * scale, sample.end * scale - 0.8)
    if start is not None and last > start:
        yield start, last


def _sample(
    preview: Preview, p: int, s: int, pack: Pack, sample: Sample, top: float
) -> Iterator[str]:
    size = sample.end - sample.start
    loss = sum(weight != 0 for weight in pack.weights[sample.start : sample.end])
    name = preview.sources[sample.source].name if sample.source >= 0 else ""
    title = f'<span class="dot"></span><b>{text(name)}</b> ' if name else ""
    counts = f"{size:,} token{'' if size == 1 else 's'}"
    if sample.source >= 0:
        counts += f", {loss:,} supervised"
    yield (
        f'<article class="sample {_sample_color(sample)}" id="{sample_id(p, s)}" tabindex="-1" '
        f'data-start="{sample.start}" data-sample="{s}"><h4>{title}'
        f'<span class="place">{text(sample.place)}</span> <span class="count">{counts}</span></h4>'
    )
    for turn in sample.turns:
        if turn.diff:
            yield _difference(turn)
    for segment in sample.segments:
        role = segment.role if segment.role in _ROLES else "other"
        yield (
            f'<div class="segment r-{role}"><span class="role">{text(segment.role)}</span>'
            f'<p class="tokens" tabindex="0" data-at="{segment.start}">'
            f"{''.join(render_tokens(pack, segment.start, segment.end, top))}</p></div>"
        )
    yield "</article>"


def _difference(turn: Turn) -> str:
    tags = {"training": "del", "inference": "ins", "elided": "em", "same": "span"}
    parts = "".join(
        f"<{tags[part.kind]}>{flow(part.text)}</{tags[part.kind]}>" for part in turn.diff
    )
    return (
        f'<details class="difference {status_class(turn.status)}"><summary>Message '
        f"{turn.message + 1}: {STATUS_WORDS[turn.status]}</summary>"
        '<p class="facts"><del>only in training</del> <ins>only at inference</ins></p>'
        f'<p class="diff">{parts}</p></details>'
    )


def _tiles_in(pack: Pack, start: int, end: int) -> list[int]:
    return [k for k, tile in enumerate(pack.tiles) if start <= tile.start < end and tile.picture]


def _tile(pack: Pack, k: int) -> str:
    data = base64.b64encode(pack.tiles[k].picture).decode()
    return f'<img src="data:image/png;base64,{data}" alt="tile {k + 1} of {len(pack.tiles)}">'


def _token_classes(piece: Piece, weight: float) -> list[str]:
    classes = []
    if weight:
        classes.append("s")
        if weight < 0.95:
            classes.append(f"q{1 + int(weight * 3.2)}")
    if piece.kind == "special":
        classes.append("x")
    elif piece.kind in ("bytes", "unknown"):
        classes.append("y")
    return classes


def _sample_color(sample: Sample) -> str:
    return color(sample.source) if sample.source >= 0 else "none"
