"""Pulls while they go on: blocks drawn again on a terminal, lines in a pipe, or JSON lines."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import orjson

from watcher.ollama import names
from watcher.pull.driver import Pull, Update, Waiting
from watcher.show.text import size
from watcher.state import event_log
from watcher.state.records import State
from watcher.system import advice

if TYPE_CHECKING:
    from rich.live import Live

_STYLE = {State.COMPLETED: "green", State.ERROR: "bold red", State.RESET: "yellow"}
_CELLS = 30
#: In a pipe a line is written when this much more is here.
_STEP_PERCENT = 10.0


class Display(Protocol):
    """Shows updates of pulls. Safe among threads."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
    def show(self, pull: Pull, update: Update) -> None:
        """Take up how a pull is now."""


class Lines:
    """A line for each stage, each ten percent and each note; for pipes and logs."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write, self._lock = write, threading.Lock()
        self._shown: dict[str, tuple[State, float]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def show(self, pull: Pull, update: Update) -> None:
        """Write what is new."""
        record, who = update.record, names.printable(pull.name.shown)
        with self._lock:
            if update.note:
                self._write(f"{who}: {update.note}\n")
            state, percent = self._shown.get(who, (None, -_STEP_PERCENT))
            steps = record.progress_percent // _STEP_PERCENT > percent // _STEP_PERCENT
            begun = record.state not in (state, State.IDLE)
            if begun or (steps and record.state is State.DOWNLOADING):
                self._shown[who] = record.state, record.progress_percent
                self._write(f"{who}: {line(update)}\n")


class JsonLines:
    """One JSON object a line: with each state, each percent and each note."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write, self._lock = write, threading.Lock()
        self._shown: dict[str, tuple[State, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def show(self, pull: Pull, update: Update) -> None:
        """Write what is new."""
        record, who = update.record, pull.name.shown
        now = record.state, int(record.progress_percent)
        with self._lock:
            if update.note or self._shown.get(who) != now:
                self._shown[who] = now
                self._write(orjson.dumps(document(pull, update), option=orjson.OPT_APPEND_NEWLINE))


class Blocks:
    """On a terminal: two lines for each model, drawn again in their place; notes stay above."""

    def __init__(self, *, color: bool) -> None:
        self._color, self._lock = color, threading.Lock()
        self._pulls: dict[str, Update] = {}
        self._live: Live | None = None

    def __enter__(self) -> Self:
        from rich.console import Console
        from rich.live import Live

        console = Console(
            highlight=False, markup=False, emoji=False, no_color=not self._color, soft_wrap=False
        )
        self._live = Live(console=console, refresh_per_second=8, get_renderable=self._drawn)
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, pull: Pull, update: Update) -> None:
        """Take up how a pull is now; it is drawn a little later."""
        who = names.printable(pull.name.shown)
        with self._lock:
            self._pulls[who] = update
        if update.note and self._live is not None:
            self._live.console.print(f"{who}: {update.note}")

    def _drawn(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        drawn = []
        with self._lock:
            shown = dict(self._pulls)
        for who, update in shown.items():
            record = update.record
            style = _STYLE.get(record.state, "cyan")
            drawn.append(Text.assemble((f"{who}  ", "bold"), (record.stage, style)))
            filled = int(_CELLS * record.progress_percent / 100)
            bar = Text.assemble(
                "  ",
                ("#" * filled, style),
                ("." * (_CELLS - filled), "dim"),
                f" {_numbers(update)}",
            )
            # One line, however narrow: what is drawn again must not wrap.
            bar.no_wrap, bar.overflow = True, "ellipsis"
            drawn.append(bar)
        return Group(*drawn)


def line(update: Update) -> str:
    """Stage, percent, bytes, rate and time left in a line; of an error its reason."""
    record = update.record
    told = f": {record.error}" if record.error else f" {_numbers(update)}"
    return f"{record.stage}{told}".rstrip()


def _numbers(update: Update) -> str:
    record = update.record
    if not record.total_bytes:
        return ""
    told = f"{record.progress_percent:.0f} % of {size(record.total_bytes)}"
    if record.state is State.DOWNLOADING and round(record.bytes_per_second or 0):
        told += f", {size(round(record.bytes_per_second or 0))}/s"
        if update.seconds_left is not None:
            told += f", {advice.duration(update.seconds_left)} left"
    return told


def document(pull: Pull, update: Update) -> dict[str, Any]:
    """One line of ``pull --json``."""
    record = update.record
    return {
        "model": pull.name.shown,
        "status": record.state.value,
        "stage": record.stage,
        "progress_percent": round(record.progress_percent, 2),
        "downloaded_bytes": record.downloaded_bytes,
        "present_bytes": record.present_bytes,
        "total_bytes": record.total_bytes,
        "per_second_bytes": record.bytes_per_second and round(record.bytes_per_second),
        "left_seconds": None if update.seconds_left is None else round(update.seconds_left, 1),
        "note": update.note,
        "waiting": update.waiting and _waiting(update.waiting),
        "error": record.error,
        "cause": None if pull.end.cause is None else pull.end.cause.value,
    }


def _waiting(waiting: Waiting) -> dict[str, Any]:
    return {
        "for": waiting.awaited,
        "why": waiting.why,
        "attempt": waiting.attempt,
        "attempts": waiting.attempts,
        "until": None if waiting.until is None else event_log.rfc3339(waiting.until),
    }


def display(*, json: bool, quiet: bool, color: bool) -> Display:
    """The one that fits where the output goes."""
    if json:
        return JsonLines(sys.stdout.buffer.write)
    if quiet:
        return Lines(lambda _: None)
    if sys.stdout.isatty():
        return Blocks(color=color)
    return Lines(sys.stdout.write)
