"""Reports for people: audits, what lies in quarantine, and what a verification found."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from watcher import model
from watcher.decide import at_risk, conditions, findings, remaining
from watcher.model import BlobFault, Condition, Diagnosed, Evidence, Severity, Visibility
from watcher.ollama import names, ranges
from watcher.reconcile import Report
from watcher.show.text import Line, Part, Span, command, count, more, name, part_of, size
from watcher.state.event_log import clock
from watcher.system import advice, terminal

_SHOWN_ALIKE = 10  #: of findings alike, so many are shown one by one
_SHOWN_DRAWN = 20  #: so many downloads are drawn
_INDENT = 11  #: what stands beside a word in the narrow column
_STYLE = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.INFO: "cyan"}
_NOTICES = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "notice"}
_VISIBILITY = {Visibility.NAMED: "names only", Visibility.PARTIAL: "limited"}


def row(word: str, text: str | tuple[Span, ...], style: str = "bold") -> Line:
    return Line(text, _INDENT, label=(Span(word, style),))


def beside(text: str, style: str = "") -> Line:
    return Line(text, _INDENT, style)


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
    severity = Severity.INFO if urgent is None else conditions.row(urgent.condition).severity
    is_well = not fate and severity is Severity.INFO
    least = Severity.WARNING if urgent is None else Severity.ERROR
    if is_well and other is not None and other.severity.rank >= least.rank:
        return Line(_sentence(other.message), run=other.command)
    if urgent is None:
        notices = count(len(diagnosis.findings), "notice")
        nothing = f"No unfinished downloads and no errors; {notices}, shown with -v."
        return Line(nothing) if diagnosis.findings else healthy(report)
    alike = [each for each, _ in fates if each.download.models[:1] == urgent.download.models[:1]]
    is_left = urgent.condition is Condition.PAUSED and not urgent.stale
    # What is at risk needs protection before a pull.
    protected = bool(fate) and is_left and at_risk.fades(urgent.download.entries, seen.now)
    helps = (findings.protects if protected else findings.helps)(urgent, seen)
    words = "" if helps else _sentence(findings.in_words(urgent))
    return Line(
        (
            Span(f"{known_as(urgent)}:", "bold"),
            Span(f" {on_disk(alike if urgent.download.models else [urgent])}. "),
            Span(f"{_sentence(fate or _state(urgent))} {words}".rstrip()),
        ),
        run=helps,
    )


def _fates(seen: Evidence, diagnosis: model.Diagnosis) -> list[tuple[Diagnosed, str]]:
    """Each download, and what the next server start does to it; "" where that is nothing."""
    doomed = findings.doomed(diagnosis.forecast) if diagnosis.forecast else {}
    fates = []
    for each in diagnosis.diagnosed:
        is_safe = each.condition is Condition.LIVE or each.download.is_needless
        when = at_risk.unwatched(at_risk.ends(each.download.entries, doomed), seen)
        fates.append((each, "" if is_safe else findings.fate_of(each.download, seen.now, when)))
    return fates


def _urgency(item: tuple[Diagnosed, str]) -> tuple[bool, bool, int, int, str]:
    """Orders downloads: what is worth keeping and at risk first, then the worst and largest."""
    each, fate = item
    return each.stale, not fate, *_badness(each)


def _badness(diagnosed: Diagnosed) -> tuple[int, int, str]:
    """Orders downloads: the worst condition first, the largest of them first."""
    rank = conditions.badness(diagnosed.condition)
    return -rank, -diagnosed.download.allocated, diagnosed.digest


def on_disk(alike: Sequence[Diagnosed]) -> str:
    """How much of a model is on disk, all its unfinished layers together."""
    unreadable = next((each.download.unreadable for each in alike), None)
    if unreadable is not None:
        return f"its files can't be read: {unreadable}"
    present = wrong = kept = 0
    for download in (each.download for each in alike):
        # Of what is known to be wrong, some can still be right.
        usable = download.trust.trusted if download.is_wrong else download.trust.present
        present += ranges.size(usable)
        wrong += download.is_wrong
        kept += download.discarded
    totals = [each.download.total for each in alike]
    total = sum(each or 0 for each in totals)
    if None in totals or not total:
        return f"{size(present)} on disk of an unknown length"
    if kept:
        return f"{part_of(present, total)} on disk, and it is not known which bytes are wrong"
    there = "usable" if wrong else "on disk"
    return f"{100 * present // total} % {there} ({part_of(present, total)})"


def known_as(diagnosed: Diagnosed) -> str:
    return name(names.known_as(diagnosed.download.models, diagnosed.digest))


def _state(diagnosed: Diagnosed) -> str:
    if diagnosed.stale:
        return f"stale: no bytes for {advice.duration(diagnosed.age)}"
    download = diagnosed.download
    if download.discarded:
        return "the server discarded it after a checksum mismatch"
    if download.is_wrong or download.may_be_right:
        return diagnosed.because
    words = conditions.row(diagnosed.condition).words
    return f"{words}: {diagnosed.because}" if diagnosed.condition is Condition.REDUNDANT else words


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def audit(report: Report, *, verbose: bool) -> Iterator[Part]:
    """A whole audit: its verdict, the store, the downloads drawn, the findings by severity."""
    seen, diagnosis = report.evidence, report.diagnosis
    yield verdict(report)
    yield ""
    yield from summary(seen)
    counts = Counter(finding.severity for finding in diagnosis.findings)
    spans: list[Span] = []
    for severity, word in _NOTICES.items():
        if counts[severity]:
            spans += [Span(", "), Span(count(counts[severity], word), _STYLE[severity])]
    yield row("found", tuple(spans[1:]))
    if diagnosis.diagnosed:
        yield ""
        yield Line("Unfinished downloads", style="bold")
        worst_first = sorted(diagnosis.diagnosed, key=_badness)
        yield from downloads(worst_first, lambda each: _download(each, seen), verbose=verbose)
    undrawn = (each for each in diagnosis.findings if not _is_drawn(each))
    shown = [each for each in undrawn if verbose or each.severity is not Severity.INFO]
    if shown:
        yield ""
        yield Line("Findings", style="bold")
        yield from _findings(shown, None if verbose else _SHOWN_ALIKE)
    start = [] if diagnosis.forecast is None else list(_forecast(diagnosis.forecast, seen))
    if start:
        yield ""
        yield Line("The next server start", style="bold")
        yield from start


def _forecast(foreseen: model.Forecast, seen: Evidence) -> Iterator[Line]:
    does: list[Line] = []
    if foreseen.start_fails:
        does.append(row("fails", "the server can't start", "bold red"))
    if foreseen.pruning_off:
        does.append(row("keeps", "every file: pruning is off", "cyan"))
    if foreseen.deletes:
        files = count(len(foreseen.deletes), "file")
        does.append(row("deletes", f"{files}, freeing {size(foreseen.freed)}:", "bold red"))
        some = foreseen.deletes[:_SHOWN_ALIKE]
        texts = (f"{name(each.path)}  {size(each.entry.allocated)}" for each in some)
        does += [beside(text, "dim") for text in texts]
        if len(foreseen.deletes) > _SHOWN_ALIKE:
            does.append(beside(f"and {len(foreseen.deletes) - _SHOWN_ALIKE:,} more"))
    if foreseen.later:
        first, _ = foreseen.later[0]
        freed = size(sum(located.entry.freed for _, located in foreseen.later))
        what = "more file" if foreseen.deletes else "file"
        files = f"{count(len(foreseen.later), what)} ({freed})"
        when = f"once they are one hour old, the first of them at {clock(first, seen.now)}"
        does.append(row("later", f"{files} {when}", "yellow"))
    if foreseen.renames:
        files = count(len(foreseen.renames), "file")
        does.append(row("renames", f"{files} with names of older servers", ""))
    yield from does
    if does:
        yield from map(beside, foreseen.why[:_SHOWN_ALIKE])


def _is_drawn(finding: model.Finding) -> bool:
    beside = ("download_stale", "download_at_risk")
    return finding.kind.startswith("download_") and finding.kind not in beside


def summary(seen: Evidence) -> Iterator[Line]:
    place, census = seen.place, seen.census
    yield row("store", f"{name(place.path)} (from {place.found_by})")
    blind = any(path.startswith("manifests") for path in census.unlisted)
    models = f"{count(census.manifests, 'model')}{' visible' * blind}"
    if blind and not census.manifests:
        models = "models unknown"
    blobs = f"{count(census.entries, 'file')} in blobs/, {size(census.allocated)} on disk"
    if "blobs" in census.unlisted:
        blobs = "blobs/ can't be listed"
    free = f"{place.file_system or 'unknown file system'}, {size(place.free_bytes)} free"
    yield beside(f"{free}; {models}, {blobs}")
    for server in seen.servers:
        version = f", version {server.version}" if server.version else ""
        whose = "" if server.ours else ", possibly of this store"
        state = f"{server.state.value}{version}{whose}"
        yield row("server", f"ollama serve, pid {server.pid}, {state}")
    if not seen.servers:
        yield row("server", "not running on this store")
    if seen.view.visibility is not Visibility.FULL:
        yield row("visibility", f"{_VISIBILITY[seen.view.visibility]}: {seen.view.why}")


def _findings(found: Sequence[model.Finding], most: int | None) -> Iterator[Line]:
    alike = Counter(finding.kind for finding in found)
    shown: Counter[str] = Counter()
    for finding in found:
        shown[finding.kind] += 1
        if most is None or shown[finding.kind] <= most:
            yield from _finding(finding)
        elif shown[finding.kind] == most + 1:
            every = sum(each.sizes.allocated for each in found if each.kind == finding.kind)
            rest = alike[finding.kind] - most
            yield beside(f"{more(rest, finding.kind)} ({size(every)} in all of them)")


def _finding(finding: model.Finding) -> Iterator[Line]:
    taken = finding.sizes.allocated
    on_disk = f", {size(taken)} on disk" if taken else ""
    yield row(_NOTICES[finding.severity], f"{finding.message}{on_disk}", _STYLE[finding.severity])
    if finding.path:
        yield beside(name(finding.path), "dim")
    without = f"without repair: {finding.alone}" if finding.alone else ""
    yield from map(beside, filter(None, (finding.evidence, without, finding.remedy)))
    if finding.command:
        yield command(finding.command, _INDENT)


CLAIMED = "#"
PRESENT = "+"
MISSING = "."
_LEGEND = f"{CLAIMED} recorded   {PRESENT} on disk, not recorded   {MISSING} missing"


def downloads(
    found: Sequence[Diagnosed], detail: Callable[[Diagnosed], Iterable[Line]], *, verbose: bool
) -> Iterator[Part]:
    """Downloads drawn by `detail`, only the first ones unless `verbose`, and a legend."""
    shown = len(found) if verbose else _SHOWN_DRAWN
    for each in found[:shown]:
        yield from detail(each)
        yield ""
    if rest := found[shown:]:
        words = Counter(conditions.row(each.condition).words for each in rest)
        kinds = ", ".join(f"{number:,} {word}" for word, number in words.items())
        yield Line(f"{more(len(rest))} ({kinds})", 2)
    yield Line(_LEGEND, 2, "dim")


def _download(diagnosed: Diagnosed, seen: Evidence) -> Iterator[Line]:
    yield from drawn(diagnosed)
    if diagnosed.condition is not Condition.LIVE:
        alone, repaired = diagnosed.cost_alone, diagnosed.cost_repaired
        if alone is None:
            fails = conditions.alone(diagnosed.condition, diagnosed.download)
            yield beside(f"without repair: {fails}")
        elif diagnosed.download.ours:
            yield beside(f"still to download: {size(alone if repaired is None else repaired)}")
        elif repaired is not None and repaired < alone:
            after = f"after repair: {size(repaired)}"
            yield beside(f"without repair: {size(alone)} to download; {after}")
        else:
            yield beside(f"still to download: {size(alone)}")
    if diagnosed.stale:
        return
    if words := findings.in_words(diagnosed):
        yield beside(words)
    if helps := findings.helps(diagnosed, seen):
        yield command(helps, _INDENT)


def drawn(diagnosed: Diagnosed, pace: str = "") -> Iterator[Line]:
    """A download: its condition and name, its bytes drawn, and its sizes in words."""
    trust, total = diagnosed.download.trust, diagnosed.download.total
    state = conditions.row(diagnosed.condition)
    live = diagnosed.condition is Condition.LIVE
    style = "green" if live else _STYLE[state.severity]
    head = [Span(known_as(diagnosed), "bold")]
    if diagnosed.download.models:
        head.append(Span(f"  {names.short(diagnosed.digest)}", "dim"))
    if diagnosed.stale:
        head.append(Span("  stale", "bold yellow"))
    yield row(state.word, tuple(head), style)
    if total:
        cells = terminal.width() - _INDENT
        yield beside(part_map(trust, total, cells), style)
        # Where the drawing begins, its middle, and its end.
        middle, end = size(total // 2), size(total)
        left = f"{0:<{max(2, (cells - len(middle)) // 2)}}{middle}"
        yield beside(f"{left}{end:>{max(len(end) + 1, cells - len(left))}}", "dim")
    present = ranges.size(trust.present)
    beyond = ranges.size(ranges.difference(trust.present, trust.claimed))
    text = f"{part_of(present, total) if total else size(present)} on disk"
    if beyond and not diagnosed.download.ours:
        text += f" ({size(beyond)} not recorded by the server)"
    if not live:
        text += f"; no bytes for {advice.duration(diagnosed.age)}"
    yield beside(f"{text}{pace}")
    yield beside(f"{state.words}: {diagnosed.because}")


def part_map(trust: model.Trust, total: int, cells: int) -> str:
    """`cells` characters for `total` bytes, each for what most of its bytes are."""
    drawn: list[str] = []
    real = ranges.intersection(trust.claimed, trust.present)
    for cell in range(cells):
        start = total * cell // cells
        piece: model.Ranges = ((start, max(start + 1, total * (cell + 1) // cells)),)
        half = ranges.size(piece) / 2
        if ranges.size(ranges.intersection(piece, real)) > half:
            drawn.append(CLAIMED)
        elif ranges.size(ranges.intersection(piece, trust.present)) > half:
            drawn.append(PRESENT)
        else:
            drawn.append(MISSING)
    return "".join(drawn)


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
        place = "its place is taken" if each.there else "its place is free"
        if not each.place_seen:
            place = "its place is not visible"
        elif each.replaced:
            place = "replaced by a valid blob"
        what = f"{size(each.entry.size):>9}  {place:<25}"
        yield Line(f"{what}  {names.printable(each.label)}", whole=True)
    if most is not None and kept[most:]:
        yield Line(more(len(kept) - most))


def not_seen(found: Sequence[model.Unseen], diagnosis: model.Diagnosis) -> Iterator[Line]:
    """What could not be inspected, why, and what helps."""
    yield from _unseen("not inspected", found)
    yield from map(command, remaining.opening(found, diagnosis)[:_SHOWN_ALIKE])


def _unseen(what: str, found: Sequence[model.Unseen]) -> Iterator[Line]:
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


def verified_line(done: remaining.Verified) -> Line:
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
    of_these = f"({done.read:,} read, {done.unchanged:,} unchanged)"
    return Line(f"{count(done.checked, 'blob')} checked: {result}{left} {of_these}")


def verified(report: Report, done: remaining.Verified) -> Iterator[Line]:
    """What a verification has found, and what it could not check or write down."""
    yield verified_line(done)
    yield from _findings(remaining.of_verified(report.diagnosis, done), _SHOWN_ALIKE)
    yield from _unseen("not checked", done.unseen)
    if done.left:
        yield Line(f"not checked: {count(done.left, 'blob')} (out of time); to continue:")
        yield command(advice.watch(report.evidence, "verify"))
    yield from (Line(each, style="yellow") for each in report.warnings)
