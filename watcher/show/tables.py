"""Reports for people: audits, what lies in quarantine, and what a verification found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from watcher.decide import conditions, findings, remaining, verifying
from watcher.decide.at_risk import fades
from watcher.decide.verifying import Verified
from watcher.model import (
    BlobCensus,
    BlobFault,
    Condition,
    Diagnosed,
    Diagnosis,
    Download,
    Evidence,
    Finding,
    Forecast,
    Kept,
    Ranges,
    Server,
    Severity,
    Unseen,
    Visibility,
)
from watcher.ollama import names, ranges
from watcher.reconcile import Report
from watcher.show import part_map
from watcher.show.text import (
    Line,
    Part,
    Span,
    command,
    count,
    more,
    name,
    part_of,
    size,
)
from watcher.state.event_log import clock
from watcher.system import advice, terminal

#: Of findings alike, so many are shown one by one.
_SHOWN_ALIKE = 10
#: So many downloads are drawn.
SHOWN_DRAWN = 20
#: What stands beside a word in the narrow column.
_INDENT = 11
_STYLE = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.INFO: "cyan"}
_NOTICES = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "notice"}
_VISIBILITY = {Visibility.NAMED: "names only", Visibility.PARTIAL: "limited"}


def row(word: str, text: str | tuple[Span, ...], style: str = "bold") -> Line:
    """A word in a narrow column, and what there is to say beside it."""
    return Line(text, _INDENT, label=(Span(word, style),))


def beside(text: str, style: str = "") -> Line:
    """More to say beside the word."""
    return Line(text, _INDENT, style)


# ---------------------------------------------------------------- the first line


def healthy(report: Report) -> Line:
    """The one line for a store with nothing to report."""
    census = report.evidence.census
    left = max(0, census.healthy - census.hashed)
    verify = advice.watch(report.evidence, "verify") if left else ""
    return Line(
        f"healthy: {name(report.evidence.place.path)}: {count(census.manifests, 'model')},"
        f" {count(census.healthy, 'blob')}, {size(census.healthy_bytes)}"
        f"{f'; {left:,} not yet verified.' if left else ''}",
        run=verify,
    )


def verdict(report: Report) -> Line:
    """What somebody came for: how much of which model is on disk, its risk, and what to run."""
    seen, diagnosis = report.evidence, report.diagnosis
    fates = _fates(seen, diagnosis)
    urgent, fate = min(fates, key=_urgency, default=(None, ""))
    other = next((each for each in diagnosis.findings if not _is_drawn(each)), None)
    is_well = urgent is None or (
        not fate and conditions.row(urgent.condition).severity is Severity.INFO
    )
    least = Severity.WARNING if urgent is None else Severity.ERROR
    if is_well and other is not None and other.severity.rank >= least.rank:
        return Line(_sentence(other.message), run=other.command)
    if urgent is None:
        return _nothing_wrong(report)
    alike = [each for each, _ in fates if each.download.models[:1] == urgent.download.models[:1]]
    return Line(
        (
            Span(f"{known_as(urgent)}:", "bold"),
            Span(f" {on_disk(alike if urgent.download.models else [urgent])}. "),
            Span(_sentence(fate or _state(urgent))),
        ),
        run=_step(urgent, seen, at_risk=bool(fate)),
    )


def _nothing_wrong(report: Report) -> Line:
    notices = len(report.diagnosis.findings)
    if not notices:
        return healthy(report)
    return Line(f"no unfinished downloads and no errors; {count(notices, 'notice')} (show: -v)")


def _fates(seen: Evidence, diagnosis: Diagnosis) -> list[tuple[Diagnosed, str]]:
    """Each download, and what the next server start does to it; "" where that is nothing."""
    doomed = findings.doomed(diagnosis.forecast) if diagnosis.forecast else {}
    if seen.next_start.watched:
        # A daemon protects downloads; where it can't, they are old by now.
        doomed = {path: at for path, at in doomed.items() if at <= seen.now}
    return [
        (
            each,
            ""
            if each.condition is Condition.LIVE or each.download.is_useless
            else findings.fate_of(each.download, seen.now, doomed),
        )
        for each in diagnosis.diagnosed
    ]


def _urgency(item: tuple[Diagnosed, str]) -> tuple[bool, bool, int, int, str]:
    """Orders downloads: what is worth keeping and at risk first, then the worst and largest."""
    each, fate = item
    return each.stale, not fate, *_badness(each)


def on_disk(alike: Sequence[Diagnosed]) -> str:
    """How much of a model is on disk, all its unfinished layers together."""
    unreadable = next((each.download.unreadable for each in alike), None)
    if unreadable is not None:
        return f"its files can't be read: {unreadable}"
    wrong = any(each.download.is_wrong for each in alike)
    present = sum(ranges.size(_usable(each.download)) for each in alike)
    totals = [each.download.total for each in alike]
    total = sum(each or 0 for each in totals)
    if None in totals or not total:
        return f"{size(present)} on disk of an unknown length"
    there = "usable" if wrong else "on disk"
    return f"{100 * present // total} % {there} ({part_of(present, total)})"


def _usable(download: Download) -> Ranges:
    """What is on disk, or, where that is known to be wrong, what of it can still be right."""
    return download.trust.trusted if download.is_wrong else download.trust.present


def known_as(diagnosed: Diagnosed) -> str:
    """What people know a download by."""
    return name(names.known_as(diagnosed.download.models, diagnosed.digest))


def _state(diagnosed: Diagnosed) -> str:
    if diagnosed.stale:
        return f"stale: no bytes for {advice.duration(diagnosed.age)}"
    if diagnosed.download.is_wrong:
        return diagnosed.because
    return conditions.row(diagnosed.condition).words


def _step(diagnosed: Diagnosed, seen: Evidence, *, at_risk: bool) -> str:
    """The one command to run; what is at risk needs protection before a pull."""
    is_left = diagnosed.condition is Condition.PAUSED and not diagnosed.stale
    if at_risk and is_left and fades(diagnosed.download.entries, seen.now):
        return findings.protects(diagnosed, seen)
    return findings.helps(diagnosed, seen)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


# ---------------------------------------------------------------- audit


def audit(report: Report, *, verbose: bool) -> Iterator[Part]:
    """A whole audit: its verdict, the store, the downloads drawn, the findings by severity."""
    seen, diagnosis = report.evidence, report.diagnosis
    yield verdict(report)
    yield ""
    yield from summary(seen)
    yield row("found", _counts(diagnosis))
    if diagnosis.diagnosed:
        yield ""
        yield Line("Unfinished downloads", style="bold")
        worst_first = sorted(diagnosis.diagnosed, key=_badness)
        shown = len(worst_first) if verbose else SHOWN_DRAWN
        for each in worst_first[:shown]:
            yield from _download(each, seen)
            yield ""
        if worst_first[shown:]:
            yield Line(left_out(worst_first[shown:]), 2)
        yield Line(part_map.LEGEND, 2, "dim")
    told = [
        finding
        for finding in diagnosis.findings
        if not _is_drawn(finding) and (verbose or finding.severity is not Severity.INFO)
    ]
    if told:
        yield ""
        yield Line("Findings", style="bold")
        yield from _findings(told, None if verbose else _SHOWN_ALIKE)
    if diagnosis.forecast is not None:
        yield from _forecast(diagnosis.forecast, seen)


def left_out(rest: Sequence[Diagnosed]) -> str:
    """Says of which conditions the downloads are that are not drawn."""
    words = Counter(conditions.row(each.condition).words for each in rest)
    kinds = ", ".join(f"{number:,} {word}" for word, number in words.items())
    return f"{more(len(rest))} ({kinds})"


def _badness(diagnosed: Diagnosed) -> tuple[int, int, str]:
    """Orders downloads: the worst condition first, the largest of them first."""
    rank = conditions.badness(diagnosed.condition)
    return -rank, -diagnosed.download.allocated, diagnosed.digest


def _forecast(foreseen: Forecast, seen: Evidence) -> Iterator[Part]:
    """What the next server start does; nothing where it does nothing."""
    shown = list(_foreseen(foreseen, seen))
    if shown:
        yield ""
        yield Line("The next server start", style="bold")
        yield from shown
        yield from map(beside, foreseen.why[:_SHOWN_ALIKE])


def _foreseen(foreseen: Forecast, seen: Evidence) -> Iterator[Line]:
    if foreseen.start_fails:
        yield row("fails", "the server can't start", "bold red")
    if foreseen.pruning_off:
        yield row("keeps", "pruning is off: nothing is deleted", "cyan")
    if foreseen.deletes:
        files = count(len(foreseen.deletes), "file")
        yield row("deletes", f"{files}, freeing {size(foreseen.freed)}:", "bold red")
        for each in foreseen.deletes[:_SHOWN_ALIKE]:
            yield beside(f"{name(each.path)}  {size(each.entry.allocated)}", "dim")
        if len(foreseen.deletes) > _SHOWN_ALIKE:
            yield beside(f"and {len(foreseen.deletes) - _SHOWN_ALIKE:,} more")
    if foreseen.later:
        first, _ = foreseen.later[0]
        freed = size(sum(located.entry.freed for _, located in foreseen.later))
        files = f"{count(len(foreseen.later), 'more file')} ({freed})"
        when = f"if it starts once they are one hour old: the first at {clock(first, seen.now)}"
        yield row("later", f"{files} {when}", "yellow")
    if foreseen.renames:
        files = count(len(foreseen.renames), "file")
        yield row("renames", f"{files} with names of older servers", "")


def _is_drawn(finding: Finding) -> bool:
    """Whether a finding says what the drawing of its download says."""
    beside = ("download_stale", "download_at_risk")
    return finding.kind.startswith("download_") and finding.kind not in beside


def summary(seen: Evidence) -> Iterator[Line]:
    """The store, the server and the visibility."""
    place, census = seen.place, seen.census
    yield row("store", f"{name(place.path)} (found by {place.found_by})")
    yield beside(
        f"{place.file_system or 'unknown file system'}, {size(place.free_bytes)} free;"
        f" {_models_of(census)}, {_blobs_of(census)}"
    )
    for server in seen.servers:
        yield row("server", _server(server))
    if not seen.servers:
        yield row("server", "not running on this store")
    if seen.view.visibility is not Visibility.FULL:
        yield row("visibility", f"{_VISIBILITY[seen.view.visibility]}: {seen.view.why}")


def _server(server: Server) -> str:
    version = f", version {server.version}" if server.version else ""
    whose = "" if server.ours else ", possibly of this store"
    return f"ollama serve, pid {server.pid}, {server.state.value}{version}{whose}"


def _models_of(census: BlobCensus) -> str:
    blind = any(path.startswith("manifests") for path in census.unlisted)
    if blind and not census.manifests:
        return "models unknown"
    return f"{count(census.manifests, 'model')}{' visible' * blind}"


def _blobs_of(census: BlobCensus) -> str:
    if "blobs" in census.unlisted:
        return "blobs/ can't be listed"
    return f"{count(census.entries, 'file')} in blobs/, {size(census.allocated)} on disk"


def _counts(diagnosis: Diagnosis) -> tuple[Span, ...]:
    counts = Counter(finding.severity for finding in diagnosis.findings)
    told: list[Span] = []
    for severity, word in _NOTICES.items():
        if counts[severity]:
            told += [Span(", ")] if told else []
            told.append(Span(count(counts[severity], word), _STYLE[severity]))
    return tuple(told)


def _download(diagnosed: Diagnosed, seen: Evidence) -> Iterator[Line]:
    yield from drawn(diagnosed)
    if diagnosed.condition is not Condition.LIVE:
        yield beside(_costs(diagnosed))
    words = "" if diagnosed.stale else findings.in_words(diagnosed)
    if words:
        yield beside(words)
    helps = findings.helps(diagnosed, seen)
    if helps and not diagnosed.stale:
        yield command(helps, _INDENT)


def drawn(diagnosed: Diagnosed, pace: str = "") -> Iterator[Line]:
    """A download: its condition and name, its bytes drawn, and its sizes in words."""
    download = diagnosed.download
    state = conditions.row(diagnosed.condition)
    live = diagnosed.condition is Condition.LIVE
    style = "green" if live else _STYLE[state.severity]
    head = [Span(known_as(diagnosed), "bold")]
    if download.models:
        head.append(Span(f"  {names.short(diagnosed.digest)}", "dim"))
    if diagnosed.stale:
        head.append(Span("  stale", "bold yellow"))
    yield row(state.word, tuple(head), style)
    trust, total = download.trust, download.total
    if total:
        cells = terminal.width() - _INDENT
        yield beside(part_map.drawing(trust, total, cells), style)
        yield beside(part_map.scale(total, cells), "dim")
    yield beside(f"{_sizes(diagnosed)}{pace}")
    yield beside(f"{state.words}: {diagnosed.because}")


def _costs(diagnosed: Diagnosed) -> str:
    """What another pull downloads."""
    alone, repaired = diagnosed.cost_alone, diagnosed.cost_repaired
    if alone is None:
        return "without repair: unknown, or it can't complete"
    if repaired is not None and repaired < alone:
        return f"without repair: {size(alone)} to download; after repair: {size(repaired)}"
    return f"still to download: {size(alone)}"


def _sizes(diagnosed: Diagnosed) -> str:
    trust, total = diagnosed.download.trust, diagnosed.download.total
    present = ranges.size(trust.present)
    beyond = ranges.size(ranges.difference(trust.present, trust.claimed))
    told = f"{part_of(present, total) if total else size(present)} on disk"
    if beyond:
        told += f" ({size(beyond)} not recorded by the server)"
    if diagnosed.condition is Condition.LIVE:
        return told
    return f"{told}; no bytes for {advice.duration(diagnosed.age)}"


def _findings(told: Sequence[Finding], most: int | None) -> Iterator[Line]:
    """Findings, of those alike at most so many one by one."""
    alike = Counter(finding.kind for finding in told)
    shown: Counter[str] = Counter()
    for finding in told:
        shown[finding.kind] += 1
        if most is None or shown[finding.kind] <= most:
            yield from _finding(finding)
        elif shown[finding.kind] == most + 1:
            every = sum(each.sizes.allocated for each in told if each.kind == finding.kind)
            rest = alike[finding.kind] - most
            yield beside(f"{more(rest, finding.kind)} ({size(every)} in all of them)")


def _finding(finding: Finding) -> Iterator[Line]:
    taken = finding.sizes.allocated
    on_disk = f", {size(taken)} on disk" if taken else ""
    yield row(_NOTICES[finding.severity], f"{finding.message}{on_disk}", _STYLE[finding.severity])
    if finding.path:
        yield beside(name(finding.path), "dim")
    without = f"without repair: {finding.alone}" if finding.alone else ""
    yield from map(beside, filter(None, (finding.evidence, without, finding.remedy)))
    if finding.command:
        yield command(finding.command, _INDENT)


# ---------------------------------------------------------------- quarantine, and what was hashed


def quarantine(report: Report, most: int | None) -> Iterator[Line]:
    """Every quarantined file with its whole label, which the other commands take."""
    kept = report.evidence.quarantine
    if kept:
        taken = size(sum(each.entry.size for each in kept))
        replaced = sum(each.replaced for each in kept)
        purge = advice.watch(report.evidence, "quarantine", "purge") if replaced else ""
        what = f"{replaced:,} replaced by valid blobs."
        yield Line(f"{count(len(kept), 'file')} in quarantine, {taken}; {what}", run=purge)
    for each in kept[:most]:
        what = f"{size(each.entry.size):>9}  {_place_of(each):<25}"
        yield Line(f"{what}  {names.printable(each.label)}", whole=True)
    if most is not None and kept[most:]:
        yield Line(more(len(kept) - most))


def _place_of(kept: Kept) -> str:
    """What has become of the place of a quarantined file."""
    if not kept.place_seen:
        return "its place is not visible"
    if kept.in_its_place:
        return "replaced by a valid blob" if kept.replaced else "its place is taken"
    return "its place is free"


def not_seen(found: Sequence[Unseen], diagnosis: Diagnosis) -> Iterator[Line]:
    """What could not be inspected, why, and what helps."""
    yield from _unseen("not inspected", found)
    yield from map(command, remaining.opening(found, diagnosis)[:_SHOWN_ALIKE])


def _unseen(what: str, found: Sequence[Unseen]) -> Iterator[Line]:
    for each in found[:_SHOWN_ALIKE]:
        yield Line(f"{what}: {name(each.path)}: {each.why}", style="red")
    if len(found) > _SHOWN_ALIKE:
        yield Line(f"and {len(found) - _SHOWN_ALIKE:,} more: use --json for all")


_WRONG = {
    BlobFault.CORRUPT: "corrupt",
    BlobFault.MISSING: "missing",
    BlobFault.DANGLING: "dangling",
    BlobFault.NO_FILE: "not regular",
}
_ASTRAY = "misplaced"


def verified_line(done: Verified) -> Line:
    """How many blobs a verification has compared with their names, and the result."""
    wrong = Counter(_WRONG[odd.fault] if odd.lies is None else _ASTRAY for odd in done.wrong)
    if wrong:
        words = (*_WRONG.values(), _ASTRAY)
        result = ", ".join(f"{wrong[word]:,} {word}" for word in words if wrong[word])
    elif done.unchecked:
        result = "the rest match" if done.checked else "unknown"
    else:
        result = "all match" if done.checked else "nothing to check"
    left = f"; {done.unchecked:,} not checked" if done.unchecked else ""
    return Line(
        f"{count(done.checked, 'blob')} checked: {done.read:,} read, {done.unchanged:,} unchanged;"
        f" {result}{left}"
    )


def verified(report: Report, done: Verified) -> Iterator[Line]:
    """What a verification has found, and what it could not check or write down."""
    yield verified_line(done)
    yield from _findings(verifying.told(report.diagnosis, done), _SHOWN_ALIKE)
    yield from _unseen("not checked", done.unseen)
    if done.left:
        yield Line(f"not checked: {count(done.left, 'blob')} (out of time); to continue:")
        yield command(advice.watch(report.evidence, "verify"))
    yield from (Line(each, style="yellow") for each in report.warnings)
