"""Reports as text for people: 80 columns, colours only where the terminal wants them."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from watcher.decide import findings, remaining, verifying
from watcher.decide.verifying import Verified
from watcher.model import (
    BlobCensus,
    Condition,
    Diagnosed,
    Diagnosis,
    Evidence,
    Finding,
    Forecast,
    Kept,
    Severity,
    Unseen,
    Visibility,
)
from watcher.ollama import names, ranges
from watcher.reconcile import Report
from watcher.show import part_map
from watcher.show.lines import count, verified_line
from watcher.state.event_log import instant
from watcher.system import advice

WIDTH = 80
#: Of findings alike, so many are shown one by one.
_SHOWN_ALIKE = 10
_CELLS = 64
#: What stands beside the narrow column of a `_block`.
_INDENT = 11
#: So many downloads are drawn.
_SHOWN_DRAWN = 20
_STYLE = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.INFO: "cyan"}
_CONDITION_STYLE = {
    Condition.LIVE: "green",
    Condition.PAUSED: "cyan",
    Condition.BEHIND: "yellow",
    Condition.UNCLAIMED: "yellow",
    Condition.WHOLE: "yellow",
    Condition.REDUNDANT: "yellow",
}


class Command(Text):
    """A command that can be pasted: on a line of its own, which is never broken."""

    def __init__(self, command: str, indent: int = 0) -> None:
        super().__init__(f"{' ' * indent}-> {command}", style="bold")


def render(parts: Iterable[object], *, color: bool, width: int = WIDTH) -> str:
    """Text of rich's renderables, with colour codes only where asked for."""
    console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=color,
        no_color=not color,
        color_system="standard" if color else None,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=False,
    )
    with console.capture() as captured:
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, Command))
    return "\n".join(line.rstrip() for line in names.sayable(captured.get()).splitlines()) + "\n"


def picture(parts: Iterable[object], *, title: str) -> str:
    """The same as an SVG."""
    console = Console(
        file=io.StringIO(),
        width=WIDTH,
        record=True,
        force_terminal=True,
        highlight=False,
        markup=False,
        emoji=False,
    )
    for part in parts:
        console.print(part)
    return console.export_svg(title=title, unique_id="ollama-watch")


# ---------------------------------------------------------------- audit


def audit(report: Report, *, verbose: bool) -> list[object]:
    """A whole audit: the store, its downloads drawn, the findings by severity."""
    shown: list[object] = [_summary(report.evidence, report.diagnosis)]
    if report.diagnosis.diagnosed:
        shown.append(Text("\nUnfinished downloads", style="bold"))
        worst_first = sorted(report.diagnosis.diagnosed, key=_badness)
        for each in worst_first[:_SHOWN_DRAWN]:
            shown.extend((*_download(each, report.evidence), Text("")))
        if len(worst_first) > _SHOWN_DRAWN:
            conditions = Counter(each.condition.value for each in worst_first[_SHOWN_DRAWN:])
            more = ", ".join(f"{count:,} {condition}" for condition, count in conditions.items())
            shown.append(Text(f"  and {more}: --json has them all"))
        shown.append(Text(f"  {part_map.LEGEND}", style="dim"))
    told = [
        finding
        for finding in report.diagnosis.findings
        if not _told_by_drawing(finding) and (verbose or finding.severity is not Severity.INFO)
    ]
    if told:
        shown.append(Text("\nFindings", style="bold"))
        shown.extend(_findings(told))
    if report.diagnosis.forecast is not None:
        shown.extend(_forecast(report.diagnosis.forecast, report.evidence))
    return shown


def _badness(diagnosed: Diagnosed) -> tuple[int, int, str]:
    """Orders downloads: what can't go on first, the largest of them first."""
    order = list(_CONDITION_STYLE)
    rank = order.index(diagnosed.condition) if diagnosed.condition in order else len(order)
    return -rank, -diagnosed.download.allocated, diagnosed.digest


def _forecast(foreseen: Forecast, seen: Evidence) -> Iterable[object]:
    """What the next start of the server does; nothing where it does nothing."""
    table = _block()
    if foreseen.start_fails:
        table.add_row(Text("fails", style="bold red"), "the server can't start")
    if foreseen.pruning_off:
        table.add_row(Text("keeps", style="cyan"), "its clean-up is off: nothing is deleted")
    if foreseen.deletes:
        table.add_row(
            Text("deletes", style="bold red"),
            f"{count(len(foreseen.deletes), 'file')}, freeing {decimal(foreseen.freed)}:",
        )
        for each in foreseen.deletes[:_SHOWN_ALIKE]:
            size = decimal(each.entry.allocated)
            table.add_row("", Text(f"{_middle(each.path)}  {size}", style="dim"))
        if len(foreseen.deletes) > _SHOWN_ALIKE:
            table.add_row("", f"and {len(foreseen.deletes) - _SHOWN_ALIKE:,} more")
    if foreseen.later:
        first, _ = foreseen.later[0]
        freed = decimal(sum(located.entry.freed for _, located in foreseen.later))
        more = f"{count(len(foreseen.later), 'file')} more ({freed})"
        when = f"if it starts after they are an hour old: the first at {clock(first, seen.now)}"
        table.add_row(Text("later", style="yellow"), f"{more} {when}")
    if foreseen.renames:
        table.add_row("renames", f"{count(len(foreseen.renames), 'file')} of older servers")
    if table.row_count:
        for why in foreseen.why[:_SHOWN_ALIKE]:
            table.add_row("", why)
        yield Text("\nThe next start of the server", style="bold")
        yield table


def clock(at: float, now: float) -> str:
    """An instant as people say it: the local time, and the day where it is not today."""
    when, today = (instant(each).astimezone() for each in (at, now))
    return when.strftime("%H:%M" if when.date() == today.date() else "%Y-%m-%d %H:%M")


def _middle(path: str) -> str:
    """A path whose digest is cut short so that it fits on a line."""
    shown = names.printable(path)
    return shown if len(shown) <= _CELLS - 8 else f"{shown[:30]}…{shown[-18:]}"


def _block() -> Table:
    """A word in a narrow column, and what there is to say beside it."""
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(width=9)
    table.add_column(ratio=1, overflow="fold")
    return table


def _told_by_drawing(finding: Finding) -> bool:
    beside = ("download_stale", "download_at_risk")
    return finding.kind.startswith("download_") and finding.kind not in beside


def _summary(seen: Evidence, diagnosis: Diagnosis) -> Table:
    table = summary(seen)
    table.add_row(Text("found", style="bold"), _counts(diagnosis))
    return table


def summary(seen: Evidence) -> Table:
    """The store, the server and the sight: a word in bold, and what there is to say beside it."""
    place, census = seen.place, seen.census
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row(
        Text("store", style="bold"), f"{names.printable(place.path)} (found by {place.found_by})"
    )
    table.add_row(
        "",
        f"{place.file_system or 'unknown file system'}, {decimal(place.free_bytes)} free; "
        f"{_models_of(census)}, {_blobs_of(census)}",
    )
    for server in seen.servers:
        version = f", version {server.version}" if server.version else ""
        whose = "" if server.ours else ", perhaps of this store"
        table.add_row(
            Text("server", style="bold"),
            f"ollama serve, pid {server.pid}, {server.state.value}{version}{whose}",
        )
    if not seen.servers:
        table.add_row(Text("server", style="bold"), "none runs on this store")
    if seen.view.visibility is not Visibility.FULL:
        table.add_row(Text("sight", style="bold"), f"{seen.view.visibility.value}: {seen.view.why}")
    return table


def _models_of(census: BlobCensus) -> str:
    blind = any(path.startswith("manifests") for path in census.unlisted)
    if blind and not census.manifests:
        return "which models is not known"
    return f"{count(census.manifests, 'model')}{' that can be seen' * blind}"


def _blobs_of(census: BlobCensus) -> str:
    if "blobs" in census.unlisted:
        return "blobs/ can't be listed"
    return f"{count(census.entries, 'file')} in blobs/, {decimal(census.allocated)} on disk"


def _counts(diagnosis: Diagnosis) -> Text:
    counts = Counter(finding.severity for finding in diagnosis.findings)
    told = [
        (f"{count(counts[severity], severity.value)}", _STYLE[severity])
        for severity in (Severity.ERROR, Severity.WARNING)
        if counts[severity]
    ]
    if counts[Severity.INFO]:
        told.append((f"{counts[Severity.INFO]} for information", _STYLE[Severity.INFO]))
    joined = Text()
    for at, (text, style) in enumerate(told):
        joined.append(", " if at else "")
        joined.append(text, style=style)
    return joined


def _download(diagnosed: Diagnosed, seen: Evidence) -> Iterator[object]:
    table = drawn(diagnosed)
    table.add_row("", diagnosed.because)
    table.add_row("", _costs(diagnosed))
    words = "" if diagnosed.stale else findings.in_words(diagnosed)
    if words:
        table.add_row("", words)
    yield table
    helps = findings.helps(diagnosed, seen)
    if helps and not diagnosed.stale:
        yield Command(helps, _INDENT)


def drawn(diagnosed: Diagnosed, more: str = "") -> Table:
    """A download: its condition and name, its bytes drawn, and its sizes in words and `more`."""
    download = diagnosed.download
    style = _CONDITION_STYLE.get(diagnosed.condition, "bold red")
    table = _block()
    state = Text(diagnosed.condition.value, style=style)
    head = Text(names.known_as(download.models, diagnosed.digest), style="bold")
    if download.models:
        head.append(f"  {names.short(diagnosed.digest)}", style="dim")
    if diagnosed.stale:
        head.append("  stale", style="bold yellow")
    table.add_row(state, head)
    trust, total = download.trust, download.total
    if total:
        table.add_row("", Text(part_map.drawing(trust, total, _CELLS), style=style))
    table.add_row("", f"{_sizes(diagnosed)}{more}")
    return table


def _costs(diagnosed: Diagnosed) -> str:
    """What another pull would fetch."""
    if diagnosed.condition is Condition.LIVE:
        return ""
    if diagnosed.cost_alone is None:
        return "Ollama alone: it can't arrive, or what it would cost is not known"
    told = f"Ollama alone still downloads {decimal(diagnosed.cost_alone)}"
    if diagnosed.cost_repaired is not None and diagnosed.cost_repaired < diagnosed.cost_alone:
        told += f"; {decimal(diagnosed.cost_repaired)} would do"
    return told


def _sizes(diagnosed: Diagnosed) -> str:
    download = diagnosed.download
    trust, total = download.trust, download.total
    present = ranges.size(trust.present)
    beyond = ranges.size(ranges.difference(trust.present, trust.claimed))
    of = f" of {decimal(total)}" if total else ""
    told = f"{decimal(present)}{of} here"
    if beyond:
        told += f", {decimal(beyond)} of that not claimed"
    told += f"; {decimal(download.allocated)} on disk"
    if diagnosed.condition is Condition.LIVE:
        return told
    return f"{told}; no progress for {advice.duration(diagnosed.age)}"


def _findings(told: list[Finding]) -> Iterable[object]:
    alike = Counter(finding.kind for finding in told)
    shown: Counter[str] = Counter()
    for finding in told:
        shown[finding.kind] += 1
        if shown[finding.kind] <= _SHOWN_ALIKE:
            yield from _finding(finding)
        elif shown[finding.kind] == _SHOWN_ALIKE + 1:
            more = alike[finding.kind] - _SHOWN_ALIKE
            total = sum(each.sizes.allocated for each in told if each.kind == finding.kind)
            yield Text(
                f"           and {more:,} more {finding.kind}; {decimal(total)} in all of them"
            )


def _finding(finding: Finding) -> Iterator[object]:
    table = _block()
    message = Text(finding.message)
    if finding.sizes.allocated:
        message.append(f", {decimal(finding.sizes.allocated)} on disk")
    table.add_row(Text(finding.severity.value, style=_STYLE[finding.severity]), message)
    if finding.path:
        table.add_row("", Text(_middle(finding.path), style="dim"))
    if finding.evidence:
        table.add_row("", finding.evidence)
    if finding.alone:
        table.add_row("", f"Ollama alone: {finding.alone}")
    if finding.remedy:
        table.add_row("", finding.remedy)
    yield table
    if finding.command:
        yield Command(finding.command, _INDENT)


# ---------------------------------------------------------------- quarantine, and what was hashed


def quarantine(report: Report) -> list[object]:
    """What lies in quarantine, and what has become of its place."""
    table = Table.grid(padding=(0, 2))
    for kept in report.evidence.quarantine:
        table.add_row(Text(_middle(kept.label)), decimal(kept.entry.size), _place_of(kept))
    return [table]


def not_seen(found: Sequence[Unseen], diagnosis: Diagnosis) -> Iterator[object]:
    """What could not be looked at, why, and what helps."""
    for each in found[:_SHOWN_ALIKE]:
        told = f"could not be looked at: {names.printable(each.path)}: {each.why}"
        yield Text(told, style="red")
    if len(found) > _SHOWN_ALIKE:
        yield Text(f"and {len(found) - _SHOWN_ALIKE:,} more: --json has them all")
    for command in remaining.opening(found, diagnosis)[:_SHOWN_ALIKE]:
        yield Command(command)


def _place_of(kept: Kept) -> str:
    """What has become of the place of a file in quarantine."""
    if not kept.place_seen:
        return "its place can't be seen"
    if kept.in_its_place:
        return "a good one is in its place" if kept.replaced else "something is in its place"
    return "its place is empty"


def verified(report: Report, done: Verified) -> list[object]:
    """What a verification has found, and what it could not check or write down."""
    shown = list(_findings(verifying.told(report.diagnosis, done)))
    for unseen in done.unseen[:_SHOWN_ALIKE]:
        told = f"not checked: {names.printable(unseen.path)}: {unseen.why}"
        shown.append(Text(told, style="red"))
    if len(done.unseen) > _SHOWN_ALIKE:
        shown.append(Text(f"and {len(done.unseen) - _SHOWN_ALIKE:,} more: --json has them all"))
    if done.left:
        told = f"not checked: {count(done.left, 'blob')}, for want of time; to go on there:"
        shown.append(Text(told))
        shown.append(Command(advice.watch(report.evidence, "verify")))
    shown.extend(Text(trouble, style="yellow") for trouble in report.warnings)
    shown.append(Text(verified_line(done).rstrip()))
    return shown
