"""Lines of the event log for people, with a heading for each day."""

import time
from collections.abc import Callable, Mapping

from watcher.ollama import names
from watcher.show import text
from watcher.show.text import Line, Span, count, size
from watcher.state.event_log import Event, EventType, Tone, clock, instant
from watcher.system import advice, terminal

_TYPE_WIDTH = 20
_STYLE = {Tone.BAD: "red", Tone.WARNING: "yellow", Tone.GOOD: "green", Tone.PLAIN: "cyan"}
_TONES = {str(each): each.tone for each in EventType}
#: Details of the event that ends a pull.
_PACE = frozenset({"arrived_bytes", "max_bytes_per_second", "resets", "stalls", "lost_bytes"})


def printer(*, color: bool) -> Callable[[Event], str]:
    """A function from each line in turn to its text; it begins each day with the date."""
    day, columns = "", terminal.width()

    def render(line: Event) -> str:
        nonlocal day
        at = instant(line.at).astimezone().isoformat(" ", "seconds")
        before, day, moment = day, at[:10], at[11:19]
        heading = "" if day == before else text.render([Line(day, style="bold")], color=color)
        kind = f"{_plain(line.event_type):<{_TYPE_WIDTH}}"
        style = _STYLE[_TONES.get(line.event_type, Tone.PLAIN)]
        message = text.short_digests(f"{_plain(line.message)}{_speed(line.details)}")
        indent = len(moment) + 2 + len(kind) + 2
        if message.isascii() and kind.isascii():  # as most are: a log may have a million lines
            shown = text.styled(kind, style) if color else kind
            rows = f"\n{' ' * indent}".join(text.wrapped(message, columns - indent))
            return f"{heading}{f'{moment}  {shown}  {rows}'.rstrip()}\n"
        label = (Span(f"{moment}  "), Span(kind, style), Span("  "))
        paragraph = Line(message, indent, label=label)
        return heading + text.render([paragraph], color=color, columns=columns)

    return render


def verdict(number: int, of: str, span: tuple[float, float] | None) -> Line:
    """How many events are shown, `of` what, and from when until when they were logged."""
    about = names.printable(of)
    if span is None:
        return Line(f"No events{about}.")
    first, last = (clock(each, time.time()) for each in span)
    when = f"at {first}" if first == last else f"from {first} to {last}"
    return Line(f"{count(number, 'event')}{about}, {when}.")


def losses(resets: int, stalls: int, lost: int) -> list[str]:
    """What was in the way of a pull, in words."""
    words = [count(resets, "reset")] if resets else []
    words += [count(stalls, "stall")] if stalls else []
    return words + ([f"{size(lost)} lost"] if lost else [])


def _speed(details: Mapping[str, object]) -> str:
    if _PACE.isdisjoint(details):
        return ""

    def number(key: str) -> float:
        value = details.get(key)
        return value if isinstance(value, int | float) and value > 0 else 0

    arrived, seconds = round(number("arrived_bytes")), number("seconds")
    words = [f"{size(arrived)} downloaded in {advice.duration(seconds)}"] if arrived else []
    if number("max_bytes_per_second"):
        slow, usual, fast = (
            f"{size(round(number(f'{each}_bytes_per_second')))}/s"
            for each in ("min", "median", "max")
        )
        words.append(usual if slow == fast else f"{usual}, from {slow} to {fast}")
    words += losses(*(round(number(key)) for key in ("resets", "stalls", "lost_bytes")))
    return f"; {'; '.join(words)}" if words else ""


def _plain(text: str) -> str:
    """A text that can't control the terminal, wherever it comes from."""
    return text if text.isprintable() else names.printable(text)
