"""The preview as one HTML file that needs nothing else.

Style and script stand in the file, and a content security policy allows exactly these two, by hash:
no request leaves the page, and nothing that comes from data can run even if an escape were missed.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from .contents import Preview, Sample, Source, Totals, Turn
from .markup import STATUS_WORDS, bar, color, sample_id, share, status_class, text
from .page_packs import pack_data, render_packs

__all__ = ["render_page"]

_MOST_LISTED_TURNS = 20


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
            *render_packs(preview),
            "</main>",
        ]
    )
    data = [pack_data(pack) for pack in preview.packs]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{text(name)}, step {preview.step:,}: pegboard preview</title>
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
    dumped = json.dumps(value, separators=(",", ":"))
    return dumped.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _header(preview: Preview, name: str) -> Iterator[str]:
    facts = [
        f"step {preview.step:,} of {preview.total_steps:,}",
        f"epoch {preview.epoch}",
        text(preview.model),
        text(preview.tokenizer),
    ]
    yield "<header>"
    yield '<p class="eyebrow">pegboard preview</p>'
    yield f'<h1 title="{text(preview.config_path)}">{text(name)}</h1>'
    yield f'<p class="facts">{" &middot; ".join(facts)}</p>'
    yield "</header>"


def _conditions(conditions: Sequence[str], broken: Sequence[str]) -> Iterator[str]:
    if not conditions:
        return
    yield '<section class="checks" aria-label="Conditions"><ul>'
    for condition in conditions:
        reason = next((line for line in broken if line.startswith(f"{condition.strip()}: ")), None)
        state = "fails" if reason else "holds"
        said = text(reason or f"{condition.strip()}: does not hold")
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
            share(step.supervised, step.tokens),
            f"{share(epoch.supervised, epoch.tokens)} in the epoch",
        ),
        ("Padding", share(step.padding, rows), f"{step.padding:,} tokens"),
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
        part = taken.tokens / preview.epoch_totals.tokens if preview.epoch_totals.tokens else 0
        loss = taken.supervised / taken.tokens if taken.tokens else 0
        yield (
            f'<tr class="{color(k)}"><th scope="row"><span class="dot"></span>{text(source.name)}'
            f"</th><td>{bar(part)}{part:.1%}</td>"
            f"<td>{bar(loss, 'loss')}{loss:.1%}</td>"
            f'<td class="n">{taken.tokens:,}</td><td class="n">{taken.samples:,}</td>'
            f'<td class="n">{_of_step(source.step)}</td><td>{_losses(source)}</td></tr>'
        )
    yield "</tbody></table></div>"
    yield from _policies(preview)
    events = [(source.name, source.events) for source in preview.sources if source.events]
    if events:
        yield "<details><summary>What the tokenize functions counted</summary><ul>"
        for name, counts in events:
            said = ", ".join(f"{text(event)} {count:,}" for event, count in sorted(counts.items()))
            yield f"<li><b>{text(name)}</b>: {said}</li>"
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
            tokens = policy.said(policy.tokens) if policy.tokens is not None else "&ndash;"
            yield (
                f"<tr><td>{text(source.name)}</td><td>{text(policy.name)}{here}</td>"
                f'<td class="n">{bar(policy.supervised / most, "loss")}{policy.said(policy.supervised)}</td>'
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
        f'<span class="lost">{count:,} dropped: {text(reason)}</span>'
        for reason, count in sorted(source.dropped.items(), key=lambda item: -item[1])
    ]
    if source.truncated:
        parts.append(f'<span class="lost">{source.truncated:,} truncated</span>')
    return "<br>".join(parts) or '<span class="none">nothing</span>'


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
                    f'<rect class="{color(k)}" x="{b * step + gap / 2:.1f}" y="{top:.1f}" '
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
            yield f'<span class="{color(k)}"><span class="dot"></span>{text(source.name)}</span>'
        yield "</p>"
    yield "</section>"


def _turns(preview: Preview) -> Iterator[str]:
    listed: list[tuple[str, Sample, Turn]] = [
        (sample_id(p, s), sample, turn)
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
    for status, words in STATUS_WORDS.items():
        if counts[status]:
            yield (
                f'<li class="{status_class(status)}">{bar(counts[status] / len(listed))}'
                f"<b>{counts[status]:,}</b> {words}</li>"
            )
    yield "</ul>"
    odd = [item for item in listed if item[2].diff]
    if odd:
        yield "<details><summary>Where they differ</summary><ul>"
        for anchor, sample, turn in odd[:_MOST_LISTED_TURNS]:
            yield (
                f'<li><a href="#{anchor}">{text(sample.place)}</a>, message {turn.message + 1}: '
                f"{STATUS_WORDS[turn.status]}</li>"
            )
        if len(odd) > _MOST_LISTED_TURNS:
            yield f"<li>and {len(odd) - _MOST_LISTED_TURNS:,} more, marked in the packs</li>"
        yield "</ul></details>"
    yield "</section>"
