"""The preview for a terminal: as wide as it is, in colour where it may be.

Without colour, what gets loss stands between the marks given in the legend. Nothing that comes from
data reaches the terminal as a control character.
"""

from __future__ import annotations

import os
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

from .contents import Pack, Preview, Sample, Source, Totals, TurnStatus
from .pieces import Piece, visible_character
from .placeholders import groups

__all__ = ["Style", "choose_style", "render_terminal"]

_MOST_LINES = 60
"""Lines of a pack that are printed unless all are asked for."""
_GUTTER = 12
_BLOCKS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_LOSS_MARKS = ("\u2039", "\u203a")
_CODES = {
    "bold": "1",
    "faint": "2",
    "loss": "1;32",
    "special": "35",
    "special loss": "1;35;4",
    "bytes": "33",
    "bytes loss": "1;33;4",
    "good": "32",
    "bad": "1;31",
    "source0": "34",
    "source1": "33",
    "source2": "36",
    "source3": "31",
    "source4": "35",
    "source5": "32",
}
_NUM_SOURCE_COLORS = 6


@dataclass(frozen=True)
class Style:
    """How to print."""

    color: bool
    width: int
    """Columns."""

    def paint(self, text: str, name: str) -> str:
        """`text` in a named style, or as it is."""
        if not self.color or not text or name not in _CODES:
            return text
        return f"\x1b[{_CODES[name]}m{text}\x1b[0m"


def choose_style(color: str, stream: TextIO) -> Style:
    """Style for a stream: `auto` colours a terminal, unless NO_COLOR is set or it is dumb."""
    wanted = color == "always"
    if color == "auto":
        wanted = (
            stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        )
    return Style(wanted, max(40, shutil.get_terminal_size((100, 24)).columns))


def render_terminal(preview: Preview, style: Style, *, num_packs: int, full: bool) -> str:
    """The whole view, lines ended by newlines but for the last."""
    lines = [*_header(preview, style), "", *_sources(preview, style), ""]
    lines += [*_lengths(preview, style), ""]
    if turns := list(_turns(preview.packs, style)):
        lines += [*turns, ""]
    if num_packs and preview.packs:
        lines += [_legend(style), ""]
    for pack in preview.packs[:num_packs]:
        body = list(_pack(preview, pack, style))
        left = len(body) - _MOST_LINES
        if not full and left > 5:
            body = body[:_MOST_LINES]
            note = f"{left:,} more lines of this pack: --full prints them, --html PATH shows all"
            body.append(style.paint(f"\u2026 {note}", "faint"))
        lines += [*body, ""]
    hidden = preview.step_totals.packs - min(num_packs, len(preview.packs))
    if hidden > 0 and num_packs:
        note = f"{hidden:,} more packs in this step: --packs N prints more of them"
        lines.append(style.paint(f"\u2026 {note}", "faint"))
    return "\n".join(lines).rstrip("\n")


def _header(preview: Preview, style: Style) -> Iterator[str]:
    step = f"step {preview.step:,} of {preview.total_steps:,}, epoch {preview.epoch}"
    yield f"{style.paint(_safe(preview.config_path), 'bold')}  {step}"
    yield style.paint(f"{preview.model}, {preview.tokenizer}", "faint")
    yield ""
    rows = [("step", preview.step_totals), ("epoch", preview.epoch_totals)]
    cells = [_total_cells(name, totals) for name, totals in rows]
    cells[0].append(f"padding {_share(preview.step_totals.padding, _row_tokens(preview))}")
    cells[1].append(f"packs filled {preview.fill:.2%}")
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    for row in cells:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        yield from _fit([style.paint(row[0].ljust(len(first)), "bold"), *rest], style)


def _row_tokens(preview: Preview) -> int:
    return preview.step_totals.tokens + preview.step_totals.padding


def _total_cells(name: str, totals: Totals) -> list[str]:
    return [
        name,
        _count(totals.packs, "pack"),
        _count(totals.samples, "sample"),
        _count(totals.tokens, "token"),
        f"{_share(totals.supervised, totals.tokens)} supervised",
    ]


def _sources(preview: Preview, style: Style) -> Iterator[str]:
    head = ["source", "tokens", "of epoch", "supervised", "samples", "truncated", "dropped"]
    rows = []
    for source in preview.sources:
        rows.append(
            [
                _safe(source.name),
                f"{source.epoch.tokens:,}",
                _share(source.epoch.tokens, preview.epoch_totals.tokens),
                _share(source.epoch.supervised, source.epoch.tokens),
                f"{source.epoch.samples:,}",
                f"{source.truncated:,}",
                f"{sum(source.dropped.values()):,}",
            ]
        )
    widths = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]
    room = style.width - sum(widths[1:]) - 2 * (len(head) - 1)
    widths[0] = max(6, min(widths[0], room))
    yield style.paint(_table_row(head, widths), "faint")
    for k, (source, row) in enumerate(zip(preview.sources, rows, strict=True)):
        line = _table_row([_cut(row[0], widths[0]), *row[1:]], widths)
        yield style.paint(line[: widths[0]], _source_style(k)) + line[widths[0] :]
        for reason, count in sorted(source.dropped.items(), key=lambda item: -item[1]):
            yield style.paint(f"  dropped {count:,}: {_safe(reason)}", "bad")
        yield from (
            style.paint(line, "faint") for line in _fit(_policies(source), style, first="  ")
        )
        events = [f"{_safe(name)} {count:,}" for name, count in sorted(source.events.items())]
        yield from (style.paint(line, "faint") for line in _fit(events, style, first="  "))


def _policies(source: Source) -> list[str]:
    """What each way to treat history would train, if they differ at all."""
    if len({(policy.tokens, policy.supervised) for policy in source.policies}) < 2:
        return []
    cells = ["history:"]
    for policy in source.policies:
        of = f" of {policy.said(policy.tokens)}" if policy.tokens is not None else ""
        here = " (this run)" if policy.used else ""
        cells.append(f"{_safe(policy.name)} {policy.said(policy.supervised)}{of}{here}")
    return cells


def _table_row(cells: Sequence[str], widths: Sequence[int]) -> str:
    first = cells[0].ljust(widths[0])
    rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
    return "  ".join((first, *rest)).rstrip()


def _lengths(preview: Preview, style: Style) -> Iterator[str]:
    histogram = preview.histogram
    marks = ", ".join(f"{name} {tokens:,}" for name, tokens in histogram.quantiles.items())
    yield f"{style.paint('tokens per sample', 'bold')}  {marks}"
    most = max((max(row, default=0) for row in histogram.counts), default=0) or 1
    names = [_cut(_safe(source.name), 20) for source in preview.sources]
    indent = max(len(name) for name in names) + 2
    for k, (name, row) in enumerate(zip(names, histogram.counts, strict=True)):
        bars = "".join(_BLOCKS[-(-8 * count // most)] for count in row[: style.width - indent])
        yield style.paint(name.ljust(indent), "faint") + style.paint(bars, _source_style(k))
    longest = f"{histogram.edges[-1]:,}"
    axis = "0" + longest.rjust(max(1, min(len(histogram.counts[0]), style.width - indent) - 1))
    yield " " * indent + style.paint(axis, "faint")


def _turns(packs: Sequence[Pack], style: Style) -> Iterator[str]:
    counts = Counter(
        turn.status for pack in packs for sample in pack.samples for turn in sample.turns
    )
    words: dict[TurnStatus, tuple[str, str]] = {
        "same": ("as at inference", "good"),
        "cut": ("cut at max_length", "faint"),
        "differs": ("trained after another prompt than at inference", "bad"),
        "no loss": ("without loss", "faint"),
        "rewritten": ("without loss, not as at inference", "faint"),
    }
    if counts:
        yield style.paint("assistant turns in the packs read", "bold")
    for status, (text, name) in words.items():
        if counts[status]:
            yield style.paint(f"  {counts[status]:,} {text}", name)


def _legend(style: Style) -> str:
    loss = style.paint("loss", "loss") if style.color else "loss".join(_LOSS_MARKS)
    special = style.paint("<special>", "special")
    return (
        f"legend: {loss}, no loss, {special}, \u00b7 white space, \u21b5 newline, "
        f"{style.paint('[E4 BD]', 'bytes')} part of a character"
    )


def _pack(preview: Preview, pack: Pack, style: Style) -> Iterator[str]:
    title = (
        f"pack {pack.number:,}: {pack.num_tokens:,} of {preview.pack_max_length:,} tokens, "
        f"{_share(pack.num_supervised, pack.num_tokens)} supervised"
    )
    if pack.media:
        title += f", {pack.media}"
    if pack.skipped:
        title += f", {_count(pack.skipped, 'sample')} skipped"
    rule = "\u2500" * max(2, style.width - len(title) - 4)
    yield style.paint(f"\u2500\u2500 {title} {rule}"[: style.width], "bold")
    for k, sample in enumerate(pack.samples):
        yield from _sample_title(preview, pack, k, sample, style).split("\n")
        for segment in sample.segments:
            role = style.paint(
                f"  {_cut(_safe(segment.role), _GUTTER - 3)}".ljust(_GUTTER), "faint"
            )
            for line in _token_lines(pack, segment.start, segment.end, style):
                yield role + line
                role = " " * _GUTTER


def _sample_title(preview: Preview, pack: Pack, k: int, sample: Sample, style: Style) -> str:
    size = sample.end - sample.start
    if sample.source < 0:
        return style.paint(f"{_safe(sample.place)}: {_count(size, 'token')}", "faint")
    loss = sum(weight != 0 for weight in pack.weights[sample.start : sample.end])
    name = _safe(preview.sources[sample.source].name)
    differs = sum(turn.status == "differs" for turn in sample.turns)
    note = f", {differs} not as at inference" if differs else ""
    tail = f"{_count(size, 'token')}, {loss:,} supervised{note}"
    title = f"{k + 1} {_cut(name, style.width - 4)}"
    room = style.width - len(title) - len(tail) - 4
    place = _safe(sample.place)
    if room < min(len(place), 24):  # the counts go on a line of their own
        place, tail = _cut_left(place, style.width - len(title) - 2), f"\n  {tail}"
    else:
        place, tail = _cut_left(place, room), f"  {tail}"
    return (
        f"{style.paint(title, _source_style(sample.source))}  {place}{style.paint(tail, 'faint')}"
    )


def _token_lines(pack: Pack, start: int, end: int, style: Style) -> Iterator[str]:
    """Tokens of the row as lines that fit beside the gutter."""
    room = style.width - _GUTTER
    line, used = "", 0
    in_loss = False
    for first, stop in groups(pack, start, end):
        has_loss = pack.weights[first] != 0
        mark = ""
        if not style.color and has_loss != in_loss:
            mark = _LOSS_MARKS[0] if has_loss else _LOSS_MARKS[1]
            in_loss = has_loss
        name = _style_name(pack.pieces[first], has_loss)
        for part, breaks in _parts(pack.pieces[first], stop - first, mark, room):
            width = _columns(part)
            if used + width > room:
                yield line
                line, used = "", 0
            line += style.paint(part, name)
            used += width
            if breaks:
                yield line
                line, used = "", 0
    if in_loss:
        line += _LOSS_MARKS[1]
    if line:
        yield line


def _style_name(piece: Piece, has_loss: bool) -> str:
    kind = {"text": "", "special": "special", "bytes": "bytes", "unknown": "bytes"}[piece.kind]
    return f"{kind} loss".strip() if has_loss else kind


def _parts(piece: Piece, times: int, mark: str, room: int) -> Iterator[tuple[str, bool]]:
    """What to print of a token, in parts that may stand on different lines; whether one ends its line."""
    if times > 1:
        yield f"{mark}{_safe(piece.shown)}\u00d7{times:,}", False
        return
    if piece.kind == "bytes":
        shown = f"={_safe(piece.text)}" if piece.text else ""
        yield f"{mark}[{piece.shown}{shown}]", False
        return
    text = piece.shown
    if not text.strip(" \n"):
        text = text.replace(" ", "\u00b7")
    part = mark
    for character in text:
        if character == "\n":
            yield f"{part}\u21b5", True
            part = ""
            continue
        shown = "\u21e5" if character == "\t" else visible_character(character) or character
        if _columns(part) + _columns(shown) > room:
            yield part, False
            part = ""
        part += shown
    if part:
        yield part, False


def _safe(text: str) -> str:
    """One line without anything that a terminal would obey."""
    return "".join(
        "\u21b5" if c == "\n" else "\u21e5" if c == "\t" else visible_character(c) or c
        for c in text
    )


def _columns(text: str) -> int:
    """Columns that a terminal gives it."""
    if text.isascii():
        return len(text)
    return sum(
        0
        if unicodedata.combining(c) or unicodedata.category(c) in ("Mn", "Me")
        else 2
        if unicodedata.east_asian_width(c) in ("W", "F")
        else 1
        for c in text
    )


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "\u2026"


def _cut_left(text: str, width: int) -> str:
    return text if len(text) <= width else "\u2026" + text[len(text) - width + 1 :]


def _fit(cells: Sequence[str], style: Style, *, first: str = "") -> Iterator[str]:
    """Cells side by side, on as many lines as they need."""
    line = ""
    for cell in cells:
        if line and len(first) + len(line) + 2 + len(cell) > style.width:
            yield first + line
            line = ""
        line = f"{line}  {cell}" if line else cell
    if line:
        yield first + line


def _source_style(index: int) -> str:
    return f"source{index % _NUM_SOURCE_COLORS}"


def _share(count: int, total: int) -> str:
    return f"{count / total:.1%}" if total else "-"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
