"""Plans and their outcomes for people."""

from collections.abc import Iterable, Iterator

from watcher.decide import actions
from watcher.decide.remaining import Remaining
from watcher.model import HOUR, Action, ActionKind, Finding, Plan, Planned, Refusal, Result
from watcher.ollama import names
from watcher.reconcile import Report
from watcher.show.text import Line, command, count, name, size

_SHOWN_ALIKE = 10  #: of what is alike so many are shown one by one


def plan(planned: Plan) -> Iterator[Line]:
    if planned.actions:
        number = count(len(planned.actions), "action")
        yield Line(f"To do: {number}{_gains(planned)}", style="bold")
    for action in planned.actions[:_SHOWN_ALIKE]:
        yield Line(f"{_does(action)}{_gains(action)}", 2)
        yield Line(action.because, 4, "dim")
    yield from _more(len(planned.actions))
    yield from _refused(planned.refusals)


def shortage(planned: Plan, left: int) -> Iterator[Line]:
    """What more it would take to have `left` bytes more."""
    yield Line(f"{size(left)} more to free. What could go:")
    for spared in planned.spared[:_SHOWN_ALIKE]:
        who = name(names.known_as(spared.models, spared.digest))
        hours, minutes = int(spared.age // HOUR), int(spared.age // 60)
        how = f"--stale-after {f'{hours}h' if hours else f'{minutes}m'}"
        yield Line(f"{size(spared.frees)}: {who}, not stale yet ({how})", 2)
    rest = planned.spared[_SHOWN_ALIKE:]
    if rest:
        yield Line(f"{size(sum(each.frees for each in rest))}: {len(rest)} more", 2)
    for refusal in planned.refusals[:_SHOWN_ALIKE]:
        if refusal.frees:
            yield Line(f"{size(refusal.frees)}: {_subject(refusal)}, refused (see above)", 2)
    yield Line("models use the rest; remove one with `ollama rm MODEL`", 2)


def outcomes(report: Report) -> Iterator[Line]:
    done = [outcome for outcome in report.outcomes if outcome.result is Result.DONE]
    freed = sum(outcome.freed for outcome in done)
    saved = sum(outcome.action.saves for outcome in done)
    if freed:
        yield Line(f"freed {size(freed)}", style="bold")
    if saved:
        yield Line(f"saved {size(saved)} of downloading", style="bold")
    for outcome in done[:_SHOWN_ALIKE]:
        hashed = outcome.action.kind in (ActionKind.HASH, ActionKind.PROVE)
        yield Line(f"{_subject(outcome.action)}: {outcome.message}" if hashed else outcome.message)
    yield from _more(len(done))
    for outcome in report.outcomes:
        if outcome.result is not Result.DONE:
            word = "Refused" if outcome.result is Result.REFUSED else "Failed"
            yield Line(f"{word}: {_subject(outcome.action)}: {outcome.message}", style="yellow")
            if outcome.refusal is not None:
                yield from _helps(outcome.refusal)
            elif outcome.command:
                yield command(outcome.command)
    yield from _refused(report.plan.refusals)
    yield from (Line(warning, style="yellow") for warning in report.warnings)


def remaining(left: Remaining) -> Iterator[Line]:
    for finding in left.findings[:_SHOWN_ALIKE]:
        evidence = f" ({finding.evidence})" if finding.evidence else ""
        yield Line(f"Not repaired: {finding.message}{evidence}", style="yellow")
        yield from _helps(finding)
    rest = len(left.findings) - _SHOWN_ALIKE
    if rest > 0:
        yield Line(f"and {rest:,} more: run `ollama-watch audit`", 2)


def _more(number: int) -> Iterator[Line]:
    if number > _SHOWN_ALIKE:
        yield Line(f"and {number - _SHOWN_ALIKE:,} more", 2)


def _does(item: Planned) -> str:
    return actions.does(item, _subject(item))


def _refused(refusals: Iterable[Refusal]) -> Iterator[Line]:
    for refusal in refusals:
        yield Line(f"Refused: {_does(refusal)}", style="yellow")
        yield Line(refusal.why, 2)
        yield from _helps(refusal)


def _helps(item: Refusal | Finding) -> Iterator[Line]:
    if item.remedy:
        yield Line(item.remedy, 2)
    if item.command:
        yield command(item.command, 2)


def _subject(item: Planned) -> str:
    return name(actions.subject(item))


def _gains(item: Plan | Action) -> str:
    gains = [f"frees {size(item.frees)}"] if item.frees else []
    if item.fetches:
        gains.append(f"fetches at most {size(item.fetches)}")
    if isinstance(item, Action) and item.needs:
        gains.append(f"needs {size(item.needs)} of the disk")
    if item.saves:
        gains.append(f"saves {size(item.saves)} of downloading")
    return f" ({', '.join(gains)})" if gains else ""
