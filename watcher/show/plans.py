"""Plans and what came of them: lines of text, so that no table of rich's has to be loaded."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import click
from rich.filesize import decimal

from watcher.decide.remaining import Remaining
from watcher.model import HOUR, Action, ActionKind, Outcome, Plan, Refusal, Result
from watcher.ollama import names
from watcher.reconcile import Report

_WIDTH = 80
#: Of what is alike so many are shown one by one.
_SHOWN_ALIKE = 10
_DOES = {
    ActionKind.REMOVE_DOWNLOAD: "remove the download of",
    ActionKind.REMOVE_SURPLUS: "remove left-over sidecars of",
    ActionKind.REMOVE_ORPHAN: "remove the orphan",
    ActionKind.REMOVE_TEMPORARY: "remove the left-over",
    ActionKind.WRITE_SIDECARS: "repair the download of",
    ActionKind.HASH: "hash",
    ActionKind.RESTORE: "restore from quarantine",
    ActionKind.PURGE: "remove from quarantine",
    ActionKind.ASK_REGISTRY: "ask the registry for",
    ActionKind.QUARANTINE_BLOB: "move to quarantine the blob of",
    ActionKind.REFRESH: "keep from the server's clean-up:",
}


class Line(NamedTuple):
    """A paragraph, so many columns further in."""

    text: str
    indent: int = 0
    bold: bool = False
    dim: bool = False
    color: str | None = None
    #: A command: it is never broken, so that it can be pasted.
    whole: bool = False


def render(lines: Iterable[Line], *, color: bool) -> str:
    """Text of 80 columns, with colour codes only where asked for."""
    shown: list[str] = []
    for line in lines:
        for row in _rows(line):
            styled = click.style(row, fg=line.color, bold=line.bold or None, dim=line.dim or None)
            shown.append(styled if color else row)
    return "".join(f"{row}\n" for row in shown)


def _rows(line: Line) -> list[str]:
    margin, text = " " * line.indent, names.sayable(line.text)
    if line.whole:
        return [margin + text]
    return textwrap.wrap(
        text, _WIDTH, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False
    )


def plan(planned: Plan) -> list[Line]:
    """What would be done, and what is refused."""
    shown: list[Line] = []
    if planned.actions:
        shown.append(Line(f"To do{_gains(planned.frees, planned.saves)}:", bold=True))
    for action in planned.actions[:_SHOWN_ALIKE]:
        gains = _gains(action.frees, action.saves)
        shown.append(Line(f"{_DOES[action.kind]} {_subject(action)}{gains}", indent=2))
        shown.append(Line(action.because, indent=4, dim=True))
    if len(planned.actions) > _SHOWN_ALIKE:
        shown.append(Line(f"and {len(planned.actions) - _SHOWN_ALIKE:,} more", indent=2))
    shown.extend(_refused(planned.refusals))
    return shown


def shortage(planned: Plan, left: int) -> list[Line]:
    """What more it would take to have `left` bytes more."""
    shown = [Line(f"{decimal(left)} more would have to be freed:")]
    for spared in planned.spared[:_SHOWN_ALIKE]:
        who = names.known_as(spared.models, spared.digest)
        hours, minutes = int(spared.age // HOUR), int(spared.age // 60)
        how = f"--stale-after {f'{hours}h' if hours else f'{minutes}m'}"
        shown.append(Line(f"{decimal(spared.frees)}: {who}, not stale yet ({how})", indent=2))
    if len(planned.spared) > _SHOWN_ALIKE:
        more = planned.spared[_SHOWN_ALIKE:]
        freed = sum(each.frees for each in more)
        shown.append(Line(f"{decimal(freed)}: {len(more)} more", indent=2))
    shown.extend(
        Line(f"{decimal(refusal.frees)}: {_subject(refusal)}, refused as above", indent=2)
        for refusal in planned.refusals[:_SHOWN_ALIKE]
        if refusal.frees
    )
    shown.append(Line("the rest is models, which `ollama rm` removes", indent=2))
    return shown


def outcomes(report: Report) -> list[Line]:
    """What was done, and what was not."""
    done = [outcome for outcome in report.outcomes if outcome.result is Result.DONE]
    shown = [Line(_done(outcome)) for outcome in done[:_SHOWN_ALIKE]]
    if len(done) > _SHOWN_ALIKE:
        shown.append(Line(f"and {len(done) - _SHOWN_ALIKE:,} more"))
    freed = sum(outcome.freed for outcome in done)
    saved = sum(outcome.action.saves for outcome in done)
    if freed:
        shown.append(Line(f"freed {decimal(freed)}", bold=True))
    if saved:
        shown.append(Line(f"saved a download of {decimal(saved)}", bold=True))
    for outcome in report.outcomes:
        if outcome.result is not Result.DONE:
            shown.extend(_undone(outcome))
    shown.extend(_refused(report.plan.refusals))
    shown.extend(Line(trouble, color="yellow") for trouble in report.warnings)
    return shown


def remaining(left: Remaining) -> list[Line]:
    """What is wrong still, and what could not be looked at."""
    shown: list[Line] = []
    for finding in left.findings[:_SHOWN_ALIKE]:
        evidence = f" ({finding.evidence})" if finding.evidence else ""
        shown.append(Line(f"Still wrong: {finding.message}{evidence}", color="yellow"))
        shown.extend(_helps(finding.remedy, finding.command))
    if len(left.findings) > _SHOWN_ALIKE:
        more = len(left.findings) - _SHOWN_ALIKE
        shown.append(Line(f"and {more:,} more: an audit has them all", indent=2))
    return shown


def _done(outcome: Outcome) -> str:
    hashed = outcome.action.kind is ActionKind.HASH
    return f"{_subject(outcome.action)}: {outcome.message}" if hashed else outcome.message


def _would_do(refusal: Refusal) -> str:
    """What is refused; one of many files has their number for a subject."""
    of_files = refusal.action in (ActionKind.REMOVE_ORPHAN, ActionKind.REMOVE_TEMPORARY)
    if of_files and refusal.entries and refusal.subject not in refusal.entries:
        return f"remove {refusal.subject}"
    return f"{_DOES[refusal.action]} {_subject(refusal)}"


def _undone(outcome: Outcome) -> Iterator[Line]:
    word = "Refused" if outcome.result is Result.REFUSED else "Failed"
    yield Line(f"{word}: {_subject(outcome.action)}: {outcome.message}", color="yellow")
    if outcome.refusal is not None:
        yield from _helps(outcome.refusal.remedy, outcome.refusal.command)


def _refused(refusals: Iterable[Refusal]) -> Iterator[Line]:
    for refusal in refusals:
        yield Line(f"Refused: {_would_do(refusal)}", color="yellow")
        yield Line(refusal.why, indent=2)
        yield from _helps(refusal.remedy, refusal.command)


def _helps(remedy: str, command: str) -> Iterator[Line]:
    """What helps, in words, and as a command on a line of its own."""
    if remedy:
        yield Line(remedy, indent=2)
    if command:
        yield Line(f"-> {command}", indent=2, whole=True)


def _subject(item: Action | Refusal) -> str:
    """What an action is about, as people know it."""
    if item.kind in (
        ActionKind.REMOVE_ORPHAN,
        ActionKind.REMOVE_TEMPORARY,
        ActionKind.RESTORE,
        ActionKind.PURGE,
    ):
        blob = names.is_blob(item.subject)
        return item.subject[:19] if blob else names.printable(item.subject)
    return names.known_as(item.models, item.subject.removeprefix("sha256-"))


def _gains(frees: int, saves: int) -> str:
    """What is won by it, in words."""
    gains = [f"frees {decimal(frees)}"] if frees else []
    if saves:
        gains.append(f"saves a download of {decimal(saves)}")
    return f" ({', '.join(gains)})" if gains else ""
