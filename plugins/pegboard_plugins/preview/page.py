"""The preview as one HTML file that needs nothing else.

Style and script stand in the file, and a content security policy allows exactly these two, by hash:
no request leaves the page, and nothing that comes from data can run even if an escape were missed.
Tokens are plain elements in order; ids and positions come beside them as JSON, read on hover.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from .contents import Pack, Preview, Sample, Source, Totals, Turn, TurnStatus
from .pieces import Piece, visible_character
from .placeholders import groups

__all__ = ["render_page"]

_NUM_SOURCE_COLORS = 8
_BAR_STEPS = 1000
_MOST_LISTED_TURNS = 20

_STATUS_WORDS: dict[TurnStatus, str] = {
    "same": "trained exactly as at inference",
    "cut": "trained, cut at max_length",
    "differs": "trained after another prompt than at inference",
    "no loss": "as at inference, without loss",
    "rewritten": "without loss: its text differs from inference",
}
_ROLES = ("system", "developer", "user", "assistant", "tool", "template", "padding")


def render_page(
    preview: Preview, *, conditions: Sequence[str] = (), broken: Sequence[str] = ()
) -> str:
    """The whole file.

    Args:
        conditions: `--fail-if` as given.
        broken: what `broken_conditions` says of them.
    """
    folder = Path(__file__).parent
    style = (folder / "page.css").read_text(encoding="utf-8")
    script = (folder / "page.js").read_text(encoding="utf-8")
    name = preview.config_path.replace("\\", "/").rsplit("/", 1)[-1]
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    body = "\n".join(
        [
            *_header(preview, name),
            "<main>",
            *_conditions(conditions, broken),
            *_tiles(preview),
            *_sources(preview),
            *_lengths(preview),
            *_turns(preview),
            *_packs(preview),
            "</main>",
        ]
    )
    data = [_pack_data(pack) for pack in preview.packs]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_text(name)}, step {preview.step:,}: pegboard preview</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#packs">Skip to the packs</a>
{body}
<div id="tip" role="status" aria-live="polite" hidden></div>
<script type="application/json" id="data">{_json(data)}</script>
<script>{script}</script>
</body>
</html>
"""


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _json(value: object) -> str:
    """JSON that can stand in a script element."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _text(text: str) -> str:
    """Anything that comes from data, as text of one line."""
    return html.escape("".join(visible_character(c) or c for c in text))


def _pack_data(pack: Pack) -> dict[str, object]:
    weights = sorted({weight for weight in pack.weights if weight})
    return {
        "ids": list(pack.ids),
        "positions": list(pack.positions),
        "weights": [round(weight, 6) for weight in weights],
        "loss": [weights.index(w) if w else -1 for w in pack.weights]
        if len(weights) > 1
        else [0 if w else -1 for w in pack.weights],
    }


def _header(preview: Preview, name: str) -> Iterator[str]:
    facts = [
        f"step {preview.step:,} of {preview.total_steps:,}",
        f"epoch {preview.epoch}",
        _text(preview.model),
        _text(preview.tokenizer),
    ]
    yield "<header>"
    yield '<p class="eyebrow">pegboard preview</p>'
    yield f'<h1 title="{_text(preview.config_path)}">{_text(name)}</h1>'
    yield f'<p class="facts">{" &middot; ".join(facts)}</p>'
    yield "</header>"


def _conditions(conditions: Sequence[str], broken: Sequence[str]) -> Iterator[str]:
    if not conditions:
        return
    yield '<section class="checks" aria-label="Conditions"><ul>'
    for condition in conditions:
        reason = next((line for line in broken if line.startswith(f"{condition.strip()}: ")), None)
        state = "fails" if reason else "holds"
        said = _text(reason or f"{condition.strip()}: does not hold")
        yield f'<li class="{state}"><b>{"fails" if reason else "passes"}</b> {said}</li>'
    yield "</ul></section>"


def _tiles(preview: Preview) -> Iterator[str]:
    step, epoch = preview.step_totals, preview.epoch_totals
    rows = step.tokens + step.padding
    dropped = sum(sum(source.dropped.values()) for source in preview.sources)
    truncated = sum(source.truncated for source in preview.sources)
    tiles = [
        ("Packs of this step", f"{step.packs:,}", f"{epoch.packs:,} in the epoch"),
        ("Samples", f"{step.samples:,}", f"{epoch.samples:,} in the epoch"),
        ("Tokens", f"{step.tokens:,}", f"{epoch.tokens:,} in the epoch"),
        (
            "Supervised",
            _share(step.supervised, step.tokens),
            f"{_share(epoch.supervised, epoch.tokens)} in the epoch",
        ),
        ("Padding", _share(step.padding, rows), f"{step.padding:,} tokens"),
        ("Packs filled", f"{preview.fill:.2%}", f"of {preview.pack_max_length:,} tokens each"),
        ("Truncated", f"{truncated:,}", "samples of all sources"),
        ("Dropped", f"{dropped:,}", "records of all sources"),
    ]
    yield '<section aria-label="Totals"><dl class="tiles">'
    for title, value, note in tiles:
        yield f"<div><dt>{title}</dt><dd>{value}</dd><dd>{note}</dd></div>"
    yield "</dl></section>"


def _sources(preview: Preview) -> Iterator[str]:
    yield '<section><h2 id="sources">Sources</h2><div class="scroll"><table>'
    yield (
        '<thead><tr><th scope="col">source</th><th scope="col">share of tokens</th>'
        '<th scope="col">supervised</th><th scope="col" class="n">tokens</th>'
        '<th scope="col" class="n">samples</th><th scope="col" class="n">in this step</th>'
        '<th scope="col">lost or cut</th></tr></thead><tbody>'
    )
    for k, source in enumerate(preview.sources):
        taken = source.epoch
        share = taken.tokens / preview.epoch_totals.tokens if preview.epoch_totals.tokens else 0
        loss = taken.supervised / taken.tokens if taken.tokens else 0
        yield (
            f'<tr class="{_color(k)}"><th scope="row"><span class="dot"></span>{_text(source.name)}'
            f"</th><td>{_bar(share)}{share:.1%}</td>"
            f"<td>{_bar(loss, 'loss')}{loss:.1%}</td>"
            f'<td class="n">{taken.tokens:,}</td><td class="n">{taken.samples:,}</td>'
            f'<td class="n">{_of_step(source.step)}</td><td>{_losses(source)}</td></tr>'
        )
    yield "</tbody></table></div>"
    yield from _policies(preview)
    events = [(source.name, source.events) for source in preview.sources if source.events]
    if events:
        yield "<details><summary>What the tokenize functions counted</summary><ul>"
        for name, counts in events:
            said = ", ".join(f"{_text(event)} {count:,}" for event, count in sorted(counts.items()))
            yield f"<li><b>{_text(name)}</b>: {said}</li>"
        yield "</ul></details>"
    yield "</section>"


def _policies(preview: Preview) -> Iterator[str]:
    """What each way to treat history would train, where they differ."""
    chats = [
        source
        for source in preview.sources
        if len({(policy.tokens, policy.supervised) for policy in source.policies}) > 1
    ]
    if not chats:
        return
    yield "<details><summary>What each history policy would train</summary>"
    yield (
        '<div class="scroll"><table class="small"><thead><tr><th scope="col">source</th>'
        '<th scope="col">history</th><th scope="col" class="n">supervised tokens</th>'
        '<th scope="col" class="n">of tokens</th></tr></thead><tbody>'
    )
    for source in chats:
        most = max(policy.supervised for policy in source.policies) or 1
        for policy in source.policies:
            here = " <em>this run</em>" if policy.used else ""
            tokens = f"{policy.tokens:,}" if policy.tokens is not None else "&ndash;"
            yield (
                f"<tr><td>{_text(source.name)}</td><td>{_text(policy.name)}{here}</td>"
                f'<td class="n">{_bar(policy.supervised / most, "loss")}{policy.supervised:,}</td>'
                f'<td class="n">{tokens}</td></tr>'
            )
    yield "</tbody></table></div></details>"


def _of_step(totals: Totals) -> str:
    if not totals.samples:
        return '<span class="none">nothing</span>'
    noun = "sample" if totals.samples == 1 else "samples"
    return f"{totals.samples:,} {noun}, {totals.tokens:,} tokens"


def _losses(source: Source) -> str:
    parts = [
        f'<span class="lost">{count:,} dropped: {_text(reason)}</span>'
        for reason, count in sorted(source.dropped.items(), key=lambda item: -item[1])
    ]
    if source.truncated:
        parts.append(f'<span class="lost">{source.truncated:,} truncated</span>')
    return "<br>".join(parts) or '<span class="none">nothing</span>'


def _bar(share: float, kind: str = "") -> str:
    width = round(100 * share, 2)
    return (
        f'<svg class="bar {kind}" viewBox="0 0 100 8" preserveAspectRatio="none" '
        f'aria-hidden="true"><rect class="rail" width="100" height="8"/>'
        f'<rect width="{width}" height="8"/></svg>'
    )


def _lengths(preview: Preview) -> Iterator[str]:
    histogram = preview.histogram
    heights = [sum(column) for column in zip(*histogram.counts, strict=True)]
    most = max(heights, default=0) or 1
    width, height, gap = 960, 150, 1
    step = width / len(heights)
    marks = ", ".join(f"{name} {tokens:,}" for name, tokens in histogram.quantiles.items())
    yield '<section><h2 id="lengths">Tokens per sample</h2>'
    yield f'<p class="facts">{marks}</p>'
    yield (
        f'<svg class="chart" viewBox="0 0 {width} {height + 24}" role="img" '
        f'aria-label="Histogram of sample lengths: {marks}">'
    )
    for b, total in enumerate(heights):
        if not total:
            continue
        low, high = histogram.edges[b], histogram.edges[b + 1] - 1
        label = f"{low:,} to {high:,} tokens: {total:,} sample{'' if total == 1 else 's'}"
        yield f"<g><title>{label}</title>"
        top = float(height)
        for k, row in enumerate(histogram.counts):
            tall = height * row[b] / most
            if tall:
                top -= tall
                yield (
                    f'<rect class="{_color(k)}" x="{b * step + gap / 2:.1f}" y="{top:.1f}" '
                    f'width="{step - gap:.1f}" height="{max(tall, 0.7):.1f}"/>'
                )
        yield "</g>"
    yield f'<line x1="0" x2="{width}" y1="{height}" y2="{height}"/>'
    for k in range(5):
        tokens = histogram.edges[-1] * k // 4
        anchor = ("start", "middle", "middle", "middle", "end")[k]
        yield (
            f'<text x="{width * k / 4:.0f}" y="{height + 18}" text-anchor="{anchor}">'
            f"{tokens:,}</text>"
        )
    yield "</svg>"
    if len(preview.sources) > 1:
        yield '<p class="legend">'
        for k, source in enumerate(preview.sources):
            yield f'<span class="{_color(k)}"><span class="dot"></span>{_text(source.name)}</span>'
        yield "</p>"
    yield "</section>"


def _turns(preview: Preview) -> Iterator[str]:
    listed: list[tuple[str, Sample, Turn]] = [
        (_sample_id(p, s), sample, turn)
        for p, pack in enumerate(preview.packs)
        for s, sample in enumerate(pack.samples)
        for turn in sample.turns
    ]
    if not listed:
        return
    counts = Counter(turn.status for _, _, turn in listed)
    yield '<section><h2 id="turns">Training beside inference</h2>'
    yield (
        '<p class="facts">Each assistant turn in the packs below, compared with the prompt that the '
        "chat template gives at inference and the answer that the model would write there.</p>"
    )
    yield '<ul class="turns">'
    for status, words in _STATUS_WORDS.items():
        if counts[status]:
            yield (
                f'<li class="{_status_class(status)}">{_bar(counts[status] / len(listed))}'
                f"<b>{counts[status]:,}</b> {words}</li>"
            )
    yield "</ul>"
    odd = [item for item in listed if item[2].diff]
    if odd:
        yield "<details><summary>Where they differ</summary><ul>"
        for anchor, sample, turn in odd[:_MOST_LISTED_TURNS]:
            yield (
                f'<li><a href="#{anchor}">{_text(sample.place)}</a>, message {turn.message + 1}: '
                f"{_STATUS_WORDS[turn.status]}</li>"
            )
        if len(odd) > _MOST_LISTED_TURNS:
            yield f"<li>and {len(odd) - _MOST_LISTED_TURNS:,} more, marked in the packs</li>"
        yield "</ul></details>"
    yield "</section>"


def _packs(preview: Preview) -> Iterator[str]:
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


def _pack(preview: Preview, p: int, pack: Pack, top: float) -> Iterator[str]:
    media = f", {_text(pack.media)}" if pack.media else ""
    if pack.skipped:
        media += f", {pack.skipped:,} skipped"
    yield f'<details class="pack" id="p{p}" data-pack="{p}" open><summary><h3>Pack {pack.number:,}</h3>'
    yield (
        f"<span>{pack.num_tokens:,} of {preview.pack_max_length:,} tokens, "
        f"{_share(pack.num_supervised, pack.num_tokens)} supervised, "
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
            f'<a href="#{_sample_id(p, s)}" tabindex="-1" class="{_sample_color(sample)}">'
            f"<title>{_text(sample.place)}</title>"
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
    title = f'<span class="dot"></span><b>{_text(name)}</b> ' if name else ""
    counts = f"{size:,} token{'' if size == 1 else 's'}"
    if sample.source >= 0:
        counts += f", {loss:,} supervised"
    yield (
        f'<article class="sample {_sample_color(sample)}" id="{_sample_id(p, s)}" tabindex="-1" '
        f'data-start="{sample.start}" data-sample="{s}"><h4>{title}'
        f'<span class="place">{_text(sample.place)}</span> <span class="count">{counts}</span></h4>'
    )
    for turn in sample.turns:
        if turn.diff:
            yield _difference(turn)
    for segment in sample.segments:
        role = segment.role if segment.role in _ROLES else "other"
        yield (
            f'<div class="segment r-{role}"><span class="role">{_text(segment.role)}</span>'
            f'<p class="tokens" tabindex="0" data-at="{segment.start}">'
            f"{''.join(_tokens(pack, segment.start, segment.end, top))}</p></div>"
        )
    yield "</article>"


def _difference(turn: Turn) -> str:
    tags = {"training": "del", "inference": "ins", "elided": "em", "same": "span"}
    parts = "".join(
        f"<{tags[part.kind]}>{_flow(part.text)}</{tags[part.kind]}>" for part in turn.diff
    )
    return (
        f'<details class="difference {_status_class(turn.status)}"><summary>Message '
        f"{turn.message + 1}: {_STATUS_WORDS[turn.status]}</summary>"
        '<p class="facts"><del>only in training</del> <ins>only at inference</ins></p>'
        f'<p class="diff">{parts}</p></details>'
    )


def _tokens(pack: Pack, start: int, end: int, top: float) -> Iterator[str]:
    for first, stop in groups(pack, start, end):
        piece, weight = pack.pieces[first], pack.weights[first]
        classes = _token_classes(piece, weight / top)
        times = stop - first
        more = f' data-n="{times}"' if times > 1 else ""
        shown = _flow(piece.shown)
        if times > 1:
            classes.append("m")
            shown += f" &times;&#8239;{times:,}"
            shown += "".join(_tile(pack, k) for k in _tiles_in(pack, first, stop))
        elif piece.kind == "bytes" and piece.text:
            shown += f"<u>{_flow(piece.text)}</u>"
        named = f' class="{" ".join(classes)}"' if classes else ""
        yield f"<i{named}{more}>{shown}</i>"


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


def _flow(text: str) -> str:
    """Text with its lines; newlines, tabs, several spaces and what would not show get a glyph."""
    visible = "( +)" if not text.strip(" \n") else "( {2,})"
    stretches = re.split(visible, text)
    return "".join(
        f'<b class="d">{part}</b>' if k % 2 else "".join(map(_glyph, part))
        for k, part in enumerate(stretches)
    )


def _glyph(character: str) -> str:
    if character == "\n":
        return "<b></b>\n"
    if character == "\t":
        return '<b class="t"></b>\t'
    if name := visible_character(character):
        return f'<b class="c">{name}</b>'
    return html.escape(character)


def _sample_id(pack: int, sample: int) -> str:
    return f"p{pack}s{sample}"


def _sample_color(sample: Sample) -> str:
    return _color(sample.source) if sample.source >= 0 else "none"


def _color(index: int) -> str:
    return f"c{index % _NUM_SOURCE_COLORS}"


def _status_class(status: TurnStatus) -> str:
    return f"t-{status.replace(' ', '-')}"


def _share(count: int, total: int) -> str:
    return f"{count / total:.1%}" if total else "0.0%"
