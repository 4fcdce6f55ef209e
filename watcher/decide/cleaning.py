"""What can be removed: stale downloads, orphaned blobs, temporary files. Pure."""

from collections.abc import Iterable, Iterator

from watcher import model
from watcher.decide import blob_findings, conditions, findings, safety
from watcher.model import DAY, Action, ActionKind, Diagnosed, Evidence, Plan, Refusal, Rules, Spared
from watcher.ollama import names
from watcher.system import advice


def of_download(diagnosed: Diagnosed, evidence: Evidence) -> Iterator[model.Planned]:
    match conditions.row(diagnosed.condition).clean:
        case conditions.Step.REMOVE_SURPLUS:
            yield surplus(diagnosed, evidence)
        case conditions.Step.REMOVE:
            yield _removal(diagnosed, evidence, ActionKind.REMOVE_DOWNLOAD)


def surplus(diagnosed: Diagnosed, evidence: Evidence) -> model.Planned:
    """What is left of a download beside its finished blob."""
    blob = diagnosed.download.finished
    if diagnosed.download.data is None:
        return _removal(diagnosed, evidence, ActionKind.REMOVE_SURPLUS)
    if blob is not None and blob.sha256 == diagnosed.digest.lower():
        step = _removal(diagnosed, evidence, ActionKind.REMOVE_DOWNLOAD)
        return step._replace(relies_on=blob) if isinstance(step, Action) else step
    known = blob is not None and blob.sha256 is not None
    is_so = "corrupt" if known else "not yet verified"
    why = safety.Why(
        model.RefusalKind.UNPROVEN,
        f"the finished blob is {is_so}, so the partial data may be needed",
        "replace the blob first" if known else "verify the blob first",
        command=advice.watch(evidence, "repair", names.short(diagnosed.digest)),
    )
    ours = ActionKind.REMOVE_TRANSFER if diagnosed.download.ours else ActionKind.REMOVE_DOWNLOAD
    return why.of_download(diagnosed, ours)


def _removal(diagnosed: Diagnosed, evidence: Evidence, kind: ActionKind) -> model.Planned:
    download, forbids = diagnosed.download, safety.why_not_take
    if download.ours:
        kind, forbids = ActionKind.REMOVE_TRANSFER, safety.why_not_drop
    if (why := forbids(diagnosed, evidence)) is not None:
        return why.of_download(diagnosed, kind)._replace(frees=download.freed)
    words = conditions.row(diagnosed.condition).words
    because = f"{words}, no bytes for {advice.duration(diagnosed.age)}"
    return safety.action(diagnosed, evidence, kind, because)._replace(frees=download.freed)


def spared(diagnosed: Iterable[Diagnosed], evidence: Evidence, rules: Rules) -> tuple[Spared, ...]:
    """The downloads and orphaned blobs that are too young for `clean`, the oldest first."""
    found = [
        Spared(each.digest, each.download.models, each.age, each.download.freed)
        for each in diagnosed
        if not each.stale and conditions.is_cleanable(each)
    ]
    for entry in evidence.census.unnamed:
        age, digest = evidence.age_of(entry.changed_at), names.parse_blob(entry.name).digest
        if age < rules.settings.stale_after:
            found.append(Spared(digest, evidence.known_as.get(digest, ()), age, entry.freed))
    return tuple(sorted(found, key=lambda each: (-each.age, each.digest)))


def by_the_clock(diagnosed: Diagnosed, evidence: Evidence, rules: Rules) -> Iterator[Refusal]:
    """A download that only a clock which was set makes stale."""
    why = _clock_forbids(evidence)
    if why is None or diagnosed.stale or not conditions.is_cleanable(diagnosed):
        return
    download = diagnosed.download
    since = download.changed_at if download.progress_at is None else download.progress_at
    if since is not None and evidence.now - since >= rules.settings.stale_after:
        ours = ActionKind.REMOVE_TRANSFER if download.ours else ActionKind.REMOVE_DOWNLOAD
        yield why.of_download(diagnosed, ours)


def _clock_forbids(evidence: Evidence) -> safety.Why | None:
    """Why the wall clock makes nothing old: it has moved on, and the machine has not counted it."""
    clock = evidence.clock
    if clock is None or evidence.now - clock.certain <= model.CLOCK_TOLERANCE_SECONDS:
        return None
    left = max(0.0, model.CLOCK_SETTLED_SECONDS - clock.held)
    ahead = advice.duration(evidence.now - clock.certain)
    return safety.Why(
        model.RefusalKind.CLOCK,
        f"only the clock makes it old: the clock is {ahead} ahead of this machine's own count",
        f"the clock counts once it has been steady: try again in {advice.duration(left)}",
        left,
    )


def orphans(evidence: Evidence, rules: Rules) -> Iterator[model.Planned]:
    """Finished blobs that no manifest names, and that no unfinished pull counts on any more."""
    changed = [(entry.changed_at, entry) for entry in evidence.census.unnamed]
    yield from _old_files(changed, rules.settings.stale_after, evidence, ActionKind.REMOVE_ORPHAN)


def temporaries(evidence: Evidence) -> Iterator[model.Planned]:
    """Files that ``ollama create`` or an upload left behind."""
    changed = [(each.entry.mtime, each.entry) for each in evidence.census.temporaries]
    yield from _old_files(changed, model.HOUR, evidence, ActionKind.REMOVE_TEMPORARY)


def _old_files(
    changed: list[tuple[float, model.Entry]], enough: float, evidence: Evidence, kind: ActionKind
) -> Iterator[model.Planned]:
    """The files that have not changed for long enough. A refusal is about all of them."""
    is_orphan = kind is ActionKind.REMOVE_ORPHAN
    files = [(at, entry) for at, entry in changed if entry.kind is model.Kind.FILE]
    old = [(at, entry) for at, entry in files if evidence.age_of(at) >= enough]
    why = _clock_forbids(evidence)
    young = [entry for at, entry in files if evidence.age_of(at) < enough <= evidence.now - at]
    if why is not None and young:
        yield _refused_all(why, kind, young)
    if not old:
        return
    why = orphans_forbidden(evidence) if is_orphan else safety.idle_forbids(evidence)
    if why is not None:
        yield _refused_all(why, kind, [entry for _, entry in old])
        return
    for at, entry in old:
        because = "a temporary file of ollama create"
        if is_orphan:
            because = f"no manifest names it, {evidence.age_of(at) / DAY:.0f} days old"
        yield Action(kind, entry.name, because, (entry,), entry.freed)


def _refused_all(why: safety.Why, kind: ActionKind, files: list[model.Entry]) -> Refusal:
    s = "s" if len(files) > 1 else ""
    subject = f"{len(files)} temporary file{s} of ollama create"
    if kind is ActionKind.REMOVE_ORPHAN:
        subject = f"{len(files)} orphaned blob{s}"
    return why.refusal(subject, kind)._replace(
        entries=tuple(entry.name for entry in files), frees=sum(entry.freed for entry in files)
    )


def orphans_forbidden(evidence: Evidence) -> safety.Why | None:
    """Why no finished blob may be removed: something may name it, or be about to."""
    census, kind = evidence.census, model.RefusalKind.MANIFESTS
    for odd in census.odd_manifests:
        if odd.fault in model.BLINDING:
            who = odd.model or names.printable(odd.path)
            why = f"the manifest of {who} is {odd.fault.value}: it may name any blob"
            command = blob_findings.odd_manifest(odd, evidence).command
            return safety.Why(kind, why, "fix that manifest first", command=command)
    for path in (*census.unlisted, *(each.path for each in census.unseen)):
        why = f"{names.printable(path)} can't be listed: a manifest in it may name any blob"
        command = findings.made_listable(path, evidence)
        return safety.Why(kind, why, "make that folder readable first", command=command)
    for path in evidence.sharing.unread:
        where = f"{names.printable(path)} of another store, which shares the folder of its blobs,"
        why = f"{where} can't be read: it may name any blob"
        return safety.Why(kind, why, "run it as a user who can read it")
    if census.manifests == 0:
        why = "the store has no manifest: manifests/ is probably missing"
        return safety.Why(kind, why, "restore manifests/, or remove the store by hand")
    return safety.idle_forbids(evidence)


def until_free(planned: Plan, wanted: int) -> Plan:
    """The part of a plan that leaves `wanted` bytes free, the oldest first, or all of it."""

    def least_needed_first(action: Action) -> tuple[int, int, str]:
        # By the day of the last change, so that the size counts among those of a day.
        changed = max((entry.changed_at for entry in action.expects), default=0.0)
        return int(changed // DAY), -action.frees, action.subject

    chosen: set[Action] = set()
    free = planned.free
    for action in sorted(planned.actions, key=least_needed_first):
        if free >= wanted:
            break
        if action.frees:
            chosen.add(action)
            free += action.frees
    return planned.filtered(lambda each: each in chosen)
