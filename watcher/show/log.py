"""Lines of the event log for people: 80 columns, a heading for each day."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import click

from watcher.ollama import names
from watcher.state.event_log import instant
from watcher.state.history import Line
from watcher.system import advice

_WIDTH = 80
_TYPE_WIDTH = 20
_STYLE = {
    **dict.fromkeys(("error", "blob_corrupt", "store_problem", "pull_failed"), "red"),
    **dict.fromkeys(
        ("download_interrupted", "download_stalled", "partial_stale", "refused", "quarantined"),
        "yellow",
    ),
    **dict.fromkeys(
        ("download_completed", "download_repaired", "restored", "pull_completed"), "green"
    ),
}
#: Details of the event that ends a pull.
_PACE = frozenset({"arrived_bytes", "max_bytes_per_second", "resets", "stalls", "lost_bytes"})


def teller(*, color: bool) -> Callable[[Line], str]:
    """A function from each line in turn to its text; it begins each day with the date."""
    day = ""

    def tell(line: Line) -> str:
        nonlocal day
        at = instant(line.at).astimezone()
        begins, day = day, f"{at:%Y-%m-%d}"
        heading = "" if day == begins else f"{click.style(day, bold=True) if color else day}\n"
        kind = f"{_plain(line.event_type):<{_TYPE_WIDTH}}"
        indent = len("00:00:00") + 2 + len(kind) + 2
        said = _plain(line.message) + _speed(line.details)
        room = max(_WIDTH - indent, 20)
        first, *more = _wrapped(said, room)
        shown = click.style(kind, fg=_STYLE.get(line.event_type, "cyan")) if color else kind
        rest = "".join(f"{' ' * indent}{each}\n" for each in more)
        return f"{heading}{f'{at:%H:%M:%S}  {shown}  {first}'.rstrip()}\n{rest}"

    return tell


def _wrapped(text: str, room: int) -> list[str]:
    """The lines of a text, one at least, broken at spaces where that can be."""
    lines: list[str] = []
    text = text.rstrip()
    while len(text) > room:
        space = text.rfind(" ", 0, room + 1)
        end = space if space > 0 else room
        lines.append(text[:end].rstrip())
        text = text[end:].lstrip()
    return [*lines, text]


def losses(resets: int, stalls: int, lost: int) -> list[str]:
    """What was in the way of a pull, in words."""
    from rich.filesize import decimal

    told = [(resets, "reset"), (stalls, "stall")]
    words = [f"{number} {what}{'' if number == 1 else 's'}" for number, what in told if number]
    return [*words, *([f"{decimal(lost)} lost"] if lost else [])]


def _speed(details: Mapping[str, object]) -> str:
    """How a pull went that has ended, where its event says so."""
    if _PACE.isdisjoint(details):
        return ""
    from rich.filesize import decimal

    def number(key: str) -> float:
        value = details.get(key)
        return value if isinstance(value, int | float) and value > 0 else 0

    arrived, seconds = round(number("arrived_bytes")), number("seconds")
    slow, usual, fast = (
        f"{decimal(round(number(f'{each}_bytes_per_second')))}/s"
        for each in ("min", "median", "max")
    )
    words = [f"{decimal(arrived)} came in {advice.duration(seconds)}"] if arrived else []
    if number("max_bytes_per_second"):
        words.append(f"{usual}, from {slow} to {fast}")
    words += losses(*(round(number(key)) for key in ("resets", "stalls", "lost_bytes")))
    return f"; {'; '.join(words)}" if words else ""


def _plain(text: str) -> str:
    """What a log says may come from anywhere: nothing of it may drive the terminal."""
    return text if text.isprintable() else names.printable(text)
