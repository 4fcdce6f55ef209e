"""Pulls while they go on: blocks drawn again on a terminal, lines in a pipe, or JSON lines."""

import sys
import threading
from typing import Any, Self

from watcher.ollama import names
from watcher.pull.account import Update, Waiting
from watcher.pull.driver import Pull
from watcher.show import documents
from watcher.show.text import size
from watcher.state import event_log, json_file
from watcher.state.records import State
from watcher.system import advice

_STYLE = {State.COMPLETED: "green", State.ERROR: "bold red", State.RESET: "yellow"}
_CELLS = 30
_STEP_PERCENT = 10.0  #: in a pipe a line is written when this much more is here


class Display:
    """Shows updates of pulls. Safe among threads. This one shows nothing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shown: dict[str, tuple[State, float]] = {}  #: as shown last

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def show(self, pull: Pull, update: Update) -> None:
        """Take up how a pull is now."""


class Lines(Display):
    """A line for each stage, each ten percent and each note; for pipes and logs."""

    def show(self, pull: Pull, update: Update) -> None:
        record, who = update.record, names.printable(pull.name.shown)
        with self._lock:
            if update.note:
                sys.stdout.write(f"{who}: {update.note}\n")
            state, percent = self._shown.get(who, (None, -_STEP_PERCENT))
            steps = record.progress_percent // _STEP_PERCENT > percent // _STEP_PERCENT
            begun = record.state not in (state, State.IDLE)
            if begun or (steps and record.state is State.DOWNLOADING):
                self._shown[who] = record.state, record.progress_percent
                more = f": {record.error}" if record.error else f" {_numbers(update)}"
                sys.stdout.write(f"{who}: {record.state.stage}{more.rstrip()}\n")


class JsonLines(Display):
    """One JSON object a line: with each state, each percent and each note."""

    def show(self, pull: Pull, update: Update) -> None:
        record, who = update.record, pull.name.shown
        now = record.state, int(record.progress_percent)
        with self._lock:
            if update.note or self._shown.get(who) != now:
                self._shown[who] = now
                sys.stdout.buffer.write(json_file.line(_document(pull, update)))


class Blocks(Display):
    """On a terminal: two lines for each model, drawn again in their place; notes stay above."""

    def __init__(self, *, color: bool) -> None:
        from rich.console import Console
        from rich.live import Live

        super().__init__()
        self._pulls: dict[str, Update] = {}
        console = Console(highlight=False, markup=False, emoji=False, no_color=not color)
        self._live = Live(console=console, refresh_per_second=8, get_renderable=self._drawn)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, pull: Pull, update: Update) -> None:
        who = names.printable(pull.name.shown)
        with self._lock:
            self._pulls[who] = update
        if update.note:
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
            drawn.append(Text.assemble((f"{who}  ", "bold"), (record.state.stage, style)))
            filled = int(_CELLS * record.progress_percent / 100)
            bar, rest = ("#" * filled, style), ("." * (_CELLS - filled), "dim")
            drawn.append(Text.assemble("  ", bar, rest, f" {_numbers(update)}"))
            # One line, however narrow: what is drawn again must not wrap.
            drawn[-1].no_wrap, drawn[-1].overflow = True, "ellipsis"
        return Group(*drawn)


def _numbers(update: Update) -> str:
    record = update.record
    if not record.total_bytes:
        return ""
    text = f"{record.progress_percent:.0f} % of {size(record.total_bytes)}"
    if record.state is State.VERIFYING and update.hashed_bytes is not None:
        text += f", {100 * update.hashed_bytes / record.total_bytes:.0f} % verified"
    if record.state is State.DOWNLOADING and round(record.bytes_per_second or 0):
        text += f", {size(round(record.bytes_per_second or 0))}/s"
        if update.seconds_left is not None:
            text += f", {advice.duration(update.seconds_left)} left"
    return text


def _document(pull: Pull, update: Update) -> dict[str, Any]:
    return {
        **documents.record(pull.name.shown, update.record),
        "present_bytes": update.record.present_bytes,
        "left_seconds": None if update.seconds_left is None else round(update.seconds_left, 1),
        "note": update.note,
        "by": pull.account.way,
        "by_reason": pull.account.why_server,
        "hashed_bytes": update.hashed_bytes,
        "waiting": update.waiting and _waiting(update.waiting),
        "cause": None if pull.end.cause is None else pull.end.cause.code,
    }


def _waiting(waiting: Waiting) -> dict[str, Any]:
    return {
        "for": waiting.awaited,
        "why": waiting.why,
        "attempt": waiting.attempt,
        "attempts": waiting.attempts,
        "until": None if waiting.until is None else event_log.rfc3339(waiting.until),
    }
