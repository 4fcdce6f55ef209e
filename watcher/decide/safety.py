"""When names under ``blobs/`` may be changed, and why not. Pure.

Adding or replacing takes less than taking away: a server that reads while we write fails once at
the guard, while a name taken from under it is lost to it.
"""

from typing import NamedTuple

from watcher import model
from watcher.model import ActionKind, Blind, Diagnosed, Evidence, Refusal, RefusalKind, Visibility
from watcher.ollama import names
from watcher.system import advice

#: A server reads the sidecars before it opens the data; it must have met the guard by then.
GUARD_SECONDS = 2.0
_SETTING = "set writers_visible = true in the settings"
STOP = "stop the server and other Ollama processes"

#: File systems without hard links: the sidecar in the guard's place can only be kept as a copy.
_NO_LINKS = frozenset({"vfat", "msdos", "exfat"})
#: A file that is moved, or read again, may have another inode there.
_LOOSE = _NO_LINKS | {"overlay", "cifs", "smb3", "smbfs", "vboxsf", "fuseblk", "fuse"}


class Why(NamedTuple):
    """Why something can't be done, and what would make it possible."""

    kind: RefusalKind
    reason: str
    remedy: str  #: in words, always; and as a command, where one does it
    left: float | None = None  #: seconds left where time helps
    command: str = ""

    def refusal(self, subject: str, action: ActionKind, models: tuple[str, ...] = ()) -> Refusal:
        words = self.reason, self.remedy, self.left
        return Refusal(self.kind, subject, action, *words, models, command=self.command)

    def of_download(self, diagnosed: Diagnosed, action: ActionKind) -> Refusal:
        return self.refusal(diagnosed.digest, action, diagnosed.download.models)


def action(
    diagnosed: Diagnosed, evidence: Evidence, kind: ActionKind, because: str
) -> model.Action:
    """What is done with a download; it waits for a server that may have read the sidecars."""
    download, unseen = diagnosed.download, evidence.view.visibility is Visibility.PARTIAL
    return model.Action(
        kind,
        diagnosed.digest,
        because,
        download.entries,
        models=download.models,
        wait_seconds=GUARD_SECONDS if evidence.servers or unseen else 0.0,
    )


def is_pulled(diagnosed: Diagnosed, evidence: Evidence) -> bool:
    """Whether a server is at a download: somebody has it open, or may have unseen."""
    download, is_unseen = diagnosed.download, evidence.view.visibility is Visibility.PARTIAL
    is_live = is_unseen and diagnosed.condition is model.Condition.LIVE
    return not download.ours and (bool(download.writers) or is_live)


def pulled(digest: str, diagnosed: tuple[Diagnosed, ...], evidence: Evidence) -> Why | None:
    """Why no file of ours may get a layer's name now: a server would replace it by its own.

    If that is wrong, it removes it, and the right one would be gone.
    """
    if any(each.digest == digest and is_pulled(each, evidence) for each in diagnosed):
        return Why(RefusalKind.LIVE, "the server downloads it", "wait until it ends")
    return None


def alone(evidence: Evidence) -> bool:
    """Whether no process of Ollama's runs, and none can be unseen."""
    seen = evidence.view.visibility is Visibility.FULL
    return seen and not (evidence.servers or evidence.others)


def is_loose(place: model.Place) -> bool:
    """Whether a file may have another inode once it was moved, or is read again."""
    return place.file_system in _LOOSE or place.file_system.startswith("fuse.")


def why_not_take(diagnosed: Diagnosed, evidence: Evidence) -> Why | None:
    """Why no name of a download may be taken away now: full visibility and 90 s, else an hour."""
    full = evidence.view.visibility is Visibility.FULL
    needed = model.QUIET_SECONDS if full else model.QUIET_UNSEEN_SECONDS
    why = _held(diagnosed.download.holders, evidence) or _why_not(diagnosed, evidence, needed, full)
    return why or another_is_live(diagnosed, evidence)


def why_not_add(diagnosed: Diagnosed, evidence: Evidence) -> Why | None:
    """Why no sidecar may be replaced or added now: `NAMED` visibility, or an hour's quiet.

    A process that only reads the download, such as a backup, prevents no writing.
    """
    named = evidence.view.visibility is not Visibility.PARTIAL
    needed = model.QUIET_SECONDS if evidence.servers else 0.0
    needed = needed if named else model.QUIET_UNSEEN_SECONDS
    held = tuple(filter(minds_sidecars, diagnosed.download.holders))
    return _held(held, evidence) or _why_not(diagnosed, evidence, needed, named)


def why_not_drop(diagnosed: Diagnosed, evidence: Evidence) -> Why | None:
    """Why a transfer of ours that nobody has the lock of may not go: no server sees it."""
    if diagnosed.condition is model.Condition.REDUNDANT and _beside(diagnosed, evidence):
        why = "a server's download of this layer may still take the name from the finished blob"
        return Why(RefusalKind.LIVE, why, "try again when that is gone")
    return _of_a_pull(diagnosed, evidence) or place_forbids(evidence)


def why_not_give_back(diagnosed: Diagnosed, evidence: Evidence) -> Why | None:
    """Why a transfer of ours may not become a download of the server's now."""
    if diagnosed.download.holders:
        return Why(RefusalKind.HELD, diagnosed.because, "wait until it ends, or stop it")
    if _beside(diagnosed, evidence):
        why = "a download of the server's own of this layer lies in blobs/"
        return Why(RefusalKind.CHANGED, why, "finish that one, or remove it")
    return _of_a_pull(diagnosed, evidence) or why_not_add(diagnosed, evidence)


def _of_a_pull(diagnosed: Diagnosed, evidence: Evidence) -> Why | None:
    """Why a layer stays that waits for its name: its pull fetches another one."""
    models = frozenset(diagnosed.download.models)
    for each in evidence.downloads:
        if each.ours and each.holders and (shared := models.intersection(each.models)):
            process, pid = each.holders[0].process, each.holders[0].pid
            why = f"{process} ({pid}) fetches another layer of {min(shared)}"
            return Why(RefusalKind.HELD, why, "wait until it ends, or stop it")
    return None


def why_not_take_over(diagnosed: Diagnosed, evidence: Evidence) -> Why | None:
    """Why a server's download may not become a transfer of ours now: nothing of it is lost."""
    return _held(diagnosed.download.holders, evidence) or why_not_add(diagnosed, evidence)


def _beside(diagnosed: Diagnosed, evidence: Evidence) -> bool:
    """Whether a server's download of the same layer is there."""
    digest = diagnosed.digest.lower()
    return any(each.digest.lower() == digest and not each.ours for each in evidence.downloads)


def minds_sidecars(holder: model.Holder) -> bool:
    """Whether who has an entry open writes, or, as Ollama's may, goes by what it has read."""
    return holder.writes or holder.process.startswith("ollama")


def another_is_live(diagnosed: Diagnosed, evidence: Evidence) -> Why | None:
    """Why to wait for another: within one pull a later layer may lie untouched for hours."""
    others = evidence.pulling - {diagnosed.download.key}
    if not others or not (evidence.servers or evidence.view.visibility is Visibility.PARTIAL):
        return None
    return Why(
        RefusalKind.LIVE,
        f"{names.short(min(others))} is in use, and this may be another layer of the same model",
        "try again when that pull ends",
        model.LIVE_LOOK_SECONDS,
    )


def _held(holders: tuple[model.Holder, ...], evidence: Evidence) -> Why | None:
    if not holders:
        return None
    first = next((each for each in holders if each.writes), holders[0])
    process = f"{first.process} ({first.pid})"
    if any(first.pid == server.pid for server in evidence.servers):
        remedy = f"wait until the pull ends, or {STOP}"
    else:  # nobody is asked to kill what only reads
        or_end = ", or end that process" if first.writes else ""
        remedy = f"wait until {process} closes it{or_end}"
    why = f"{process} has {names.printable(first.entry)} open{first.doubt}"
    return Why(RefusalKind.HELD, why, remedy)


def _why_not(
    diagnosed: Diagnosed, evidence: Evidence, needed: float, enough_sight: bool
) -> Why | None:
    download, servers = diagnosed.download, evidence.servers
    unsafe = store_forbids(evidence)
    if unsafe is None and download.has_old_names:
        unsafe = Why(
            RefusalKind.OLD_NAMES,
            "its files have names of older servers (sha256:…), which no pull finds",
            "rename them (the next server start does, too, but deletes old ones)",
            command=advice.new_spellings(evidence),
        )
    unsafe = unsafe or _links_forbid(diagnosed, evidence)
    if unsafe is not None:
        return unsafe
    if diagnosed.quiet < needed:
        left, seen = needed - diagnosed.quiet, advice.duration(diagnosed.quiet)
        if not enough_sight:
            return unseen(evidence, left)
        why = f"it changed {seen} ago"
        if download.changed_at is not None and download.changed_at > evidence.now:
            times = "its files have times in the future"
            why = f"{times}; it has been unchanged for {seen} since it was first scanned"
        return Why(RefusalKind.NOT_QUIET, why, f"try again in {advice.duration(left)}", left)
    connected = any(server.connections != 0 for server in servers)
    is_new = diagnosed.condition in (model.Condition.UNCLAIMED, model.Condition.TRANSFER)
    if is_new and connected:
        why = "a client is connected to the server: a pull may be about to write progress files"
        return Why(RefusalKind.SERVER_RUNS, why, STOP, command=advice.stop(evidence))
    return None


def _links_forbid(diagnosed: Diagnosed, evidence: Evidence) -> Why | None:
    """Without hard links a guard takes a sidecar's place safely only while nobody else acts."""
    guard = names.sidecar(diagnosed.digest, 0)
    guarded = any(entry.name == guard for entry in diagnosed.download.entries)
    system = evidence.place.file_system
    if system not in _NO_LINKS or not guarded or alone(evidence):
        return None
    only = "files are changed only while no Ollama process runs and every process is visible"
    why = f"{system} has no hard links: {only}"
    if evidence.servers or evidence.others:
        return Why(RefusalKind.SERVER_RUNS, why, STOP, command=advice.stop(evidence))
    return Why(RefusalKind.SIGHT, f"{why}, and {evidence.view.why}", sees_more(evidence))


def unseen(evidence: Evidence, left: float | None = None) -> Why:
    """Why too little was seen, and what lets more be seen; `left`: seconds that help as well."""
    wait = "" if left is None else f", or try again in {advice.duration(left)}"
    why = f"some processes are not visible: {evidence.view.why}"
    return Why(RefusalKind.SIGHT, why, f"{sees_more(evidence)}{wait}", left)


def root_sees_more(evidence: Evidence) -> bool:
    """Whether the same command, run by root, would see what this one could not."""
    return evidence.view.blind is Blind.USERS and evidence.caller.uid != 0


def sees_more(evidence: Evidence) -> str:
    """What lets more be seen, or stands in for it."""
    if root_sees_more(evidence):
        return "run it as root"
    match evidence.view.blind:
        case Blind.NETWORK:
            return f"{_SETTING} if no other machine writes here"
        case Blind.CONTAINER:
            host = "run the container with the host's processes (pid: host)"
            return f"{host}; or {_SETTING} if nothing outside of it writes here"
        case _:
            return f"{_SETTING} if you know of every process that writes here"


def store_forbids(evidence: Evidence) -> Why | None:
    """Why no name under ``blobs/`` may be changed, whichever it is."""
    place = evidence.place
    for server in evidence.servers:
        if server.state is model.ServerState.STARTING:
            why = f"a server is starting (pid {server.pid}) and would fail if a file disappeared"
            return Why(RefusalKind.SERVER_STARTS, why, "try again when it is up")
    if place.globbed and evidence.servers:
        why = "the store's path has glob characters: a running server would not see the guard"
        return Why(RefusalKind.SERVER_RUNS, why, STOP, command=advice.stop(evidence))
    if place.blobs_elsewhere:
        why = "blobs/ is on another file system than the store, so nothing can be moved out of it"
        return Why(RefusalKind.LINKED, why, "mount or link the whole store instead of blobs/ alone")
    return place_forbids(evidence)


def place_forbids(evidence: Evidence) -> Why | None:
    """Why nothing of the store may be changed, be it ours alone."""
    place = evidence.place
    if place.foreign:
        why = f"{names.of_link(place.foreign)}, so its content may not belong to this store"
        return Why(RefusalKind.OWNER, why, names.TRUST_LINK)
    if place.read_only:
        why = "the file system is mounted read-only"
        return Why(RefusalKind.PERMISSION, why, "mount it writable")
    return None


def idle_forbids(evidence: Evidence) -> Why | None:
    """Why nothing may go that a pull or create may be about to use."""
    unsafe = store_forbids(evidence)
    if unsafe is not None:
        return unsafe
    for process in (*(f"ollama serve ({each.pid})" for each in evidence.servers), *evidence.others):
        why = f"{process} is running: a pull or create may be about to use them"
        return Why(RefusalKind.SERVER_RUNS, why, STOP, command=advice.stop(evidence))
    if evidence.view.visibility is Visibility.PARTIAL:
        why = f"a server may be running unseen: {evidence.view.why}"
        return Why(RefusalKind.SIGHT, why, sees_more(evidence))
    return None
