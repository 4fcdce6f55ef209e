"""The one renderer of text: it knows the terminal's width, its colors, and how values are written.

What is shown is `Line`s and `Table`s. A name is never broken: a path or a command that is longer
than a line stays in one piece.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import click
from rich.cells import cell_len
from rich.filesize import decimal, pick_unit_and_suffix

from watcher.ollama import names
from watcher.system import terminal

_LEAST_ROOM = 24  #: a last column that would be narrower than this stands below its row
_BELOW = 4
_UNITS = ["bytes", "kB", "MB", "GB", "TB", "PB"]
_GLUE = "\ue000"  #: a space within a name: `names.printable` escapes it
_WORDS = re.compile(" +|[^ ]+")
_DIGEST = re.compile(r"sha256[-:]([0-9a-f]{12})[0-9a-f]{52}(?![0-9a-f])(-?)")


class Span(NamedTuple):
    """A piece of a line; its style is in words, such as ``bold red``."""

    text: str
    style: str = ""


class Line(NamedTuple):
    """A paragraph that begins so many columns further in."""

    text: str | tuple[Span, ...] = ""
    indent: int = 0
    style: str = ""
    label: tuple[Span, ...] = ()  #: stands before the text, within its indent where it fits
    whole: bool = False  #: it is never broken and never shortened, so that it can be pasted
    run: str = ""  #: a command to run, which ends the paragraph in one piece


class Table(NamedTuple):
    """Rows in columns as wide as they need; the last column takes what is left, and wraps."""

    rows: Sequence[Sequence[str | Span]]
    heads: tuple[str, ...] = ()
    right: frozenset[int] = frozenset()  #: the columns whose text stands on the right


Part = str | Line | Table
Row = list[Span]

size = decimal


def part_of(part: int, whole: int) -> str:
    """Two sizes in one unit, such as ``36.0 of 40.0 GB``."""
    unit, suffix = pick_unit_and_suffix(whole, _UNITS, 1000)
    if unit == 1:
        return f"{part:,} of {size(whole)}"
    return f"{part / unit:,.1f} of {whole / unit:,.1f} {suffix}"


def count(number: int, what: str) -> str:
    """A number of things, in words: ``1 model``, ``2,000 models``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def more(number: int, of: str = "") -> str:
    """Says that so many are left out, and how to see them."""
    return f"and {number:,} more{f' {of}' if of else ''}; show all: -v"


def name(text: str) -> str:
    """A name from outside: safe to show, its digest shortened, never broken at a space."""
    return short_digests(names.printable(text)).replace(" ", _GLUE)


def short_digests(text: str) -> str:
    """A text with every digest in it as ``sha256-3102ddefe309``."""
    if "sha256" not in text:
        return text
    return _DIGEST.sub(lambda found: f"sha256-{found[1]}{'…-' if found[2] else ''}", text)


def plain(text: str | tuple[Span, ...]) -> str:
    """The text of a line on its own, for a document."""
    pieces = (text,) if isinstance(text, str) else (span.text for span in text)
    return names.sayable("".join(pieces).replace(_GLUE, " "))


def command(text: str, indent: int = 0) -> Line:
    return Line(f"-> {text}", indent, "bold", whole=True)


def render(parts: Iterable[Part], *, color: bool, columns: int | None = None) -> str:
    room = terminal.width() if columns is None else columns
    return "".join(f"{_painted(row, color)}\n" for part in parts for row in _rows_of(part, room))


def picture(text: str, command: str) -> str:
    """What a command prints as an SVG."""
    import io

    from rich.console import Console
    from rich.text import Text

    drawn = Text.from_ansi(text)
    widest = max(map(cells, drawn.plain.splitlines()), default=0)
    width = max(terminal.USUAL, widest)
    console = Console(file=io.StringIO(), width=width, record=True, force_terminal=True)
    console.print(drawn, highlight=False, markup=False, emoji=False)
    return console.export_svg(title=f"ollama-watch {command}", unique_id="ollama-watch")


def cells(text: str) -> int:
    return len(text) if text.isascii() else cell_len(text)


def _rows_of(part: Part, room: int) -> Iterator[Row]:
    if isinstance(part, Table):
        yield from _rows_of_table(part, room)
        return
    line = Line(part) if isinstance(part, str) else part
    margin = Span(" " * line.indent)
    if line.whole:
        yield [margin, Span(str(line.text), line.style)]
        return
    spans = (Span(line.text, line.style),) if isinstance(line.text, str) else line.text
    label = _width(line.label)
    first = [*line.label, Span(" " * (line.indent - label))]
    broken = _wrapped(spans, room - max(line.indent, label))
    rows = [first + broken[0], *([margin, *row] for row in broken[1:])]
    if line.run:
        run = Span(f"Run: {line.run}", "bold")
        fits = _width(rows[-1]) + 1 + cells(run.text) <= room
        rows[-1:] = [[*rows[-1], Span(" "), run]] if fits else [rows[-1], [margin, run]]
    yield from rows


def _rows_of_table(table: Table, room: int) -> Iterator[Row]:
    rows = [[each if isinstance(each, Span) else Span(each) for each in row] for row in table.rows]
    if table.heads and rows:
        rows.insert(0, [Span(each, "bold") for each in table.heads])
    widths = [max(cells(each.text) for each in column) for column in zip(*rows, strict=True)]
    ends = list(itertools.accumulate(wide + 2 for wide in widths[:-1]))
    # So many of the first columns fit beside each other.
    beside = max(min(1, len(ends)), sum(end <= room for end in ends))
    before = ends[beside - 1] if beside else 0
    below = beside < len(widths) - 1 or room - before < min(_LEAST_ROOM, widths[-1])
    for row in rows:
        first: Row = []
        for number, (span, wide) in enumerate(zip(row[:beside], widths, strict=False)):
            pad = Span(" " * (wide - cells(span.text)))
            first += [pad, span] if number in table.right else [span, pad]
            first.append(Span("  "))
        if not below:
            start, *rest = _wrapped(row[beside:], room - before)
            yield first + start
            yield from ([Span(" " * before), *each] for each in rest)
            continue
        yield first
        more = [piece for span in row[beside:] if span.text for piece in (Span("  "), span)][1:]
        yield from ([Span(" " * _BELOW), *each] for each in _wrapped(more, room - _BELOW))


def _wrapped(spans: Iterable[Span], room: int) -> list[Row]:
    """Rows of words; one that is wider than the room has a row of its own."""
    spans = [Span(short_digests(each.text.replace("\n", " ")), each.style) for each in spans]
    if _width(spans) <= room:
        return [spans]
    if len(spans) == 1 and spans[0].text.isascii():
        return [[Span(row, spans[0].style)] for row in wrapped(spans[0].text, room)]
    broken: list[Row] = [[]]
    used, gap = 0, Span("")
    for word in _words(spans):
        if word[0].text.isspace():
            gap = word[0]
            continue
        wide = _width(word)
        if broken[-1] and used + cells(gap.text) + wide > room:
            broken.append([])
            used, gap = 0, Span("")
        broken[-1] += [gap, *word]
        used += cells(gap.text) + wide
        gap = Span("")
    return broken


def wrapped(text: str, room: int) -> list[str]:
    """The same rows of ASCII alone, which is most of what is shown."""
    rows: list[str] = []
    text, room = text.rstrip(" "), max(1, room)
    while len(text) > room:
        begin = len(text) - len(text.lstrip(" "))
        at = text.rfind(" ", begin, room + 1)
        at = at if at >= 0 else text.find(" ", max(begin, room))
        if at < 0:
            break
        rows.append(text[:at].rstrip(" "))
        text = text[at:].lstrip(" ")
    return [*rows, text]


def _words(spans: Iterable[Span]) -> Iterator[Row]:
    """Words, which may go over several spans, and the spaces between them."""
    word: Row = []
    for span in spans:
        for piece in _WORDS.findall(span.text):
            if piece[0] != " ":
                word.append(Span(piece, span.style))
                continue
            if word:
                yield word
            word = []
            yield [Span(piece, span.style)]
    if word:
        yield word


def _width(spans: Iterable[Span]) -> int:
    return sum(cells(each.text) for each in spans)


def _painted(row: Row, color: bool) -> str:
    texts = [text if text.isascii() else names.sayable(text.replace(_GLUE, " ")) for text, _ in row]
    if not color:
        return "".join(texts).rstrip(" ")
    end = len("".join(texts).rstrip(" "))
    shown = ""
    for text, span in zip(texts, row, strict=True):
        shown += styled(text[: max(0, end)], span.style)
        end -= len(text)
    return shown


def styled(text: str, style: str) -> str:
    if not style or not text:
        return text
    words = style.split()
    color = next((word for word in words if word not in ("bold", "dim")), None)
    return click.style(text, color, bold="bold" in words or None, dim="dim" in words or None)
