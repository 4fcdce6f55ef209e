"""The findings about downloads and about the store itself, and what all findings share. Pure."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

from rich.filesize import decimal

from watcher import model
from watcher.decide import at_risk, conditions
from watcher.decide.conditions import NextPull, Step
from watcher.decide.finding_kinds import CHECK_DISK, found
from watcher.model import Condition, Diagnosed, Download, Entry, Evidence, Finding, Rules, Sizes
from watcher.ollama import names, ranges
from watcher.state.event_log import clock
from watcher.state.folders import NO_FOLDER
from watcher.state.memory import FOLDER as OURS
from watcher.system import advice

#: How the model of a download is found out.
NAMED = "run `ollama-watch repair MODEL` with the name of its model"


def sizes(entries: Iterable[Entry]) -> Sizes:
    each_has = [(entry.size, entry.allocated, entry.freed) for entry in entries]
    return Sizes(*map(sum, zip(*each_has, strict=True)))


def of_download(
    diagnosed: Diagnosed, evidence: Evidence, rules: Rules, doomed: at_risk.Doomed
) -> Iterator[Finding]:
    """The findings about one download; `doomed`: what the next server start deletes, and when."""
    download, condition = diagnosed.download, diagnosed.condition
    who = names.known_as(download.models, download.digest)
    path = next(iter(download.paths), "blobs")
    when = at_risk.ends(download.entries, doomed)
    fate = fate_of(download, evidence.now, when)
    is_left = download.discarded and condition is Condition.TRANSFER
    word = "discarded" if is_left else condition.value
    finding = found(f"download_{word}", path, who=who)._replace(
        evidence=diagnosed.because,
        alone="; ".join(filter(None, (conditions.alone(condition, download), fate))),
        command=helps(diagnosed, evidence),
        sizes=sizes(download.entries),
        models=download.models,
        remedy=in_words(diagnosed),
    )
    yield finding
    if diagnosed.stale:
        stale = found("download_stale", path, who=who, age=advice.duration(diagnosed.age))
        after = f"stale after {advice.duration(rules.settings.stale_after)}"
        stale = stale._replace(evidence=after, alone=fate, command=finding.command)
        yield stale._replace(sizes=finding.sizes, models=finding.models)
    elif at_risk.is_needed(diagnosed) and (risky := at_risk.unwatched(when, evidence)):
        usual = found("download_at_risk", path, who=who)
        usual = usual._replace(sizes=finding.sizes, models=download.models)
        yield at_risk.finding(usual, download.entries, risky, who, evidence)


def helps(diagnosed: Diagnosed, evidence: Evidence) -> str:
    """The command that helps a download on, or clears it away; "" where none does."""
    download, row = diagnosed.download, conditions.row(diagnosed.condition)
    if row.clean is Step.NOTHING:
        return ""
    if diagnosed.stale:
        short, owner = names.short(diagnosed.digest), _owner(download)
        return advice.watch(evidence, "clean", short, owner=owner)
    if download.by_server and download.models and diagnosed.condition is Condition.TRANSFER:
        return advice.watch(evidence, "repair", "--fetch", names.short(diagnosed.digest))
    if row.next_pull is NextPull.OURS:
        return advice.pull(evidence, download.models[0]) if download.models else ""
    if row.repair is Step.NOTHING or _is_recorded(diagnosed):
        return advice.pull(evidence, download.models[0], by_server=True) if download.models else ""
    if row.repair is Step.WRITE_SIDECARS and not (download.total or download.models):
        return ""  # no repair can find out how long it is
    return protects(diagnosed, evidence)


def _is_recorded(diagnosed: Diagnosed) -> bool:
    """Whether whole data is recorded as far as a repair would do it."""
    download, whole = diagnosed.download, ((0, diagnosed.download.total),)
    is_set = bool(download.sidecars) and not download.faults
    if diagnosed.condition is not Condition.WHOLE or download.data is None or not is_set:
        return False
    trust, hashed = download.trust, download.data.sha256
    if hashed == diagnosed.digest.lower():
        return trust.claimed == whole
    return trust.claimed == trust.trusted and (trust.trusted == whole or hashed is not None)


def protects(diagnosed: Diagnosed, evidence: Evidence) -> str:
    """The command that repairs a download, and makes it too young for the server to prune."""
    download = diagnosed.download
    known_as = names.known_as(download.models, diagnosed.digest)
    return advice.watch(evidence, "repair", known_as, owner=_owner(download))


def _owner(download: Download) -> int | None:
    """The user whose files they are; None where they have none, or several."""
    owners = {entry.uid for entry in download.entries}
    return owners.pop() if len(owners) == 1 else None


def in_words(diagnosed: Diagnosed) -> str:
    """What helps besides the command, or in its place."""
    download, step = diagnosed.download, conditions.row(diagnosed.condition).repair
    if download.models or step in (Step.WAIT, Step.REMOVE_SURPLUS):
        return ""
    named = NAMED.replace("repair", "repair --fetch") if download.by_server else NAMED
    return f"its model is unknown; {named}"


def doomed(foreseen: model.Forecast) -> dict[str, float]:
    """The paths that a start of the server deletes, each with when it is old enough to go."""
    return {located.path: 0.0 for located in foreseen.deletes} | {
        located.path: at for at, located in foreseen.later
    }


def fate_of(download: Download, now: float, when: list[float]) -> str:
    """What the next server start does to its files, which go from `when` on; "" for nothing."""
    gone, files = bisect_right(when, now), len(download.entries)
    if gone and gone == files:
        return "the next server start deletes it"
    if gone:
        return f"the next server start deletes {gone} of its {files} files and breaks it"
    return f"the next server start after {clock(when[0], now)} deletes it" if when else ""


def given_to(owner: int, entries: Iterable[Entry], evidence: Evidence) -> str:
    """The command that gives some of a download's files, and nothing else, to a user."""
    if is_led_away("blobs", evidence):
        return ""
    names_of = (each.name if "/" in each.name else f"blobs/{each.name}" for each in entries)
    paths = (path_of(evidence, each) for each in names_of)
    # Never through a link: who may write there may put one in a file's place.
    return advice.shell(evidence, "chown", "-h", str(owner), *paths)


def is_led_away(path: str, evidence: Evidence) -> bool:
    """Whether another user's symlink lies on the way to a path below the store.

    No command about it is printed: root would paste it, and do it wherever the symlink leads.
    """
    behind = evidence.census.behind_foreign
    leads = any(f"{path}/".startswith(f"{each}/") for each in behind)
    return leads or evidence.place.foreign is not None


def path_of(evidence: Evidence, path: str) -> str:
    """The whole path of what lies at `path` below the store."""
    return f"{evidence.place.path}/{path}"


def of_store(
    evidence: Evidence, diagnosed: tuple[Diagnosed, ...], foreseen: model.Forecast, rules: Rules
) -> Iterator[Finding]:
    yield from _state(evidence)
    if foreseen.start_fails:
        yield found("store_start_fails", "")._replace(evidence="; ".join(foreseen.why[:3]))
    yield from _not_seen(evidence)
    yield from _place(evidence)
    yield from _foreign_intents(evidence)
    yield from _no_room(evidence, diagnosed, rules)
    for each in diagnosed:
        download = each.download
        unfinished = each.condition is not Condition.LIVE and each.cost_repaired != 0
        if unfinished and download.data and download.sidecars and not download.trust.has_holes:
            who = names.known_as(download.models, download.digest)
            path = f"blobs/{download.data.name}"
            yield found("download_no_holes", path, who=who)._replace(
                evidence="it is a copy, or the file system has no holes; the last non-zero byte of "
                "each part counts as its end",
                models=download.models,
            )


def _state(evidence: Evidence) -> Iterator[Finding]:
    """Whether our own folder is whose it has to be, and what was remembered is known."""
    if evidence.forgotten:
        yield found("state_forgotten", f"{OURS}/state.json")._replace(
            evidence=evidence.forgotten, command=advice.watch(evidence, "verify")
        )
    if evidence.place.state_owner is not None:
        owner, (user, group), foreign = evidence.place.state_owner
        seen = f"user id {user} can't write there, so nothing is remembered or changed"
        path = path_of(evidence, OURS)
        yield found("state_owner", OURS, path=OURS, found=owner, user=user)._replace(
            evidence="its content is ignored, and nothing is changed" if foreign else seen,
            command=advice.shell(evidence, "chown", "-hR", f"{user}:{group}", path),
            remedy="check its content first; if it is yours:" if foreign else "",
        )


def _foreign_intents(evidence: Evidence) -> Iterator[Finding]:
    """Changes that ollama-watch has not begun so, whoever claims it; they are kept."""
    for odd in evidence.intents:
        here = path_of(evidence, odd.path)
        aside = path_of(evidence, odd.path.replace("/intents/", "/foreign-intent-"))
        owner = evidence.place.owner
        yield found("store_foreign_intent", odd.path, path=odd.path, why=odd.why)._replace(
            evidence="it is left alone",
            command=advice.shell(evidence, "mv", "-n", here, aside, owner=owner),
        )


def _place(evidence: Evidence) -> Iterator[Finding]:
    place, census = evidence.place, evidence.census
    if census.unnamed and not census.manifests and not is_blind(evidence):
        yield found("store_no_manifests", "manifests")
    if place.globbed:
        yield found("store_globbed", "", path=names.printable(place.path))
    if place.foreign is not None:
        target = names.printable(place.foreign.target)
        foreign = found("store_foreign", "", link=names.of_link(place.foreign))
        yield foreign._replace(evidence=f"it leads to {target}")
    if census.elsewhere:
        yield found("store_shared", "blobs", count=len(census.elsewhere))._replace(
            evidence=", ".join(map(names.printable, evidence.sharing.stores)),
            sizes=sizes(census.elsewhere),
        )
    ours = [str(server.pid) for server in evidence.servers if server.ours]
    if len(ours) > 1:
        yield found("store_two_servers", "", count=len(ours), pids=", ".join(ours))
    if place.network:
        network = found("store_network", "", file_system=place.file_system)
        yield network._replace(evidence="writers on other machines are not visible")


def _not_seen(evidence: Evidence) -> Iterator[Finding]:
    """The folders that we can't list, and that the server's user may; names; the quarantine."""
    census = evidence.census
    failing = {each.path: each.why for each in census.failing}
    for path in census.unlisted:
        if path in census.unlisted_by_server:
            continue  # reported with what keeps the server from it
        why, remedy = failing.get(path, ""), CHECK_DISK
        if not why:
            alone, remedy = "nothing: the server's user can list it", ""
        elif path.startswith("manifests"):
            alone = "the next server start deletes blobs that only its manifests name"
        else:
            alone = "the start of the server fails there"
        if why in NO_FOLDER.values():
            remedy = "mount what it leads to, or restore the folder"
        yield found("store_unlisted", path, path=names.printable(path))._replace(
            evidence=why or "this user can't list it",
            alone=alone,
            command=made_listable(path, evidence),
            remedy=remedy,
        )
    for unseen in census.unseen:
        path = names.printable(unseen.path)
        yield found("store_unseen", path, path=path)._replace(evidence=unseen.why)
    if (hidden := evidence.transfers_unseen) is not None:
        unlisted = found("store_unseen", hidden.path, path=hidden.path)
        yield unlisted._replace(evidence=hidden.why, alone="nothing: the server ignores it")
    aside, ours = evidence.quarantine_unseen, evidence.place.state_owner
    if aside is not None and not (ours is not None and ours[2]):  # else reported with whose it is
        yield found("store_unseen", aside.path, path="")._replace(
            message="the quarantine can't be listed",
            evidence=f"{aside.path}: {aside.why}",
            alone="nothing: the server ignores it",
            command=made_listable(aside.path, evidence) if aside.forbidden else "",
            remedy="" if aside.forbidden else CHECK_DISK,
        )


def is_blind(evidence: Evidence) -> bool:
    """Whether some manifest may name blobs that are unknown."""
    census = evidence.census
    blinding = (odd for odd in census.odd_manifests if odd.fault in model.BLINDING)
    return census.hides_manifests or any(odd.model not in census.models for odd in blinding)


def made_listable(path: str, evidence: Evidence) -> str:
    """The command that lets a folder of the store be listed; "" where none does."""
    census, owner = evidence.census, evidence.place.owner
    fails = any(each.path == path for each in (*census.failing, *census.unseen))
    if fails or is_led_away(path, evidence):
        return ""
    if path not in census.unlisted_by_server and evidence.caller.uid not in (0, owner):
        return advice.watch(evidence, "audit", root=True)
    return advice.shell(evidence, "chmod", "u+rx", path_of(evidence, path), owner=owner)


def lacking(diagnosed: Iterable[Diagnosed]) -> int:
    """Bytes that unfinished layers still have to bring to the disk; stale ones count no more."""
    missing: dict[str, int] = {}
    for each in diagnosed:
        download = each.download
        if download.total is None or each.stale or each.condition is Condition.REDUNDANT:
            continue
        # Of a transfer of ours and a server's download, one is finished.
        left = download.total - ranges.size(download.trust.present)
        missing[each.digest] = min(left, missing.get(each.digest, left))
    return sum(missing.values())


def _no_room(evidence: Evidence, diagnosed: Sequence[Diagnosed], rules: Rules) -> Iterator[Finding]:
    """The disk has no room for the rest of all unfinished downloads together."""
    missing, free, census = lacking(diagnosed), evidence.place.free_bytes, evidence.census
    if missing <= free:
        return
    old = (entry for entry in census.unnamed if not at_risk.is_young(entry, evidence, rules))
    cleanable = (
        any(each.stale and conditions.is_cleanable(each) for each in diagnosed)
        or any(entry.kind is model.Kind.FILE for entry in old)
        or any(is_old_temporary(each, evidence) for each in census.temporaries)
        or any(kept.replaced for kept in evidence.quarantine)
    )
    yield found("store_no_room", "")._replace(
        evidence=f"{decimal(missing)} to download, {decimal(free)} free",
        command=advice.watch(evidence, "clean") if cleanable else "",
    )


def is_old_temporary(left: model.Located, evidence: Evidence) -> bool:
    """Whether `clean` would remove it."""
    return left.entry.kind is model.Kind.FILE and evidence.age_of(left.entry.mtime) >= model.HOUR
