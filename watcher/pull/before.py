"""What a pull looks at before any byte is moved: what is here, what it lacks, and the disk."""

import os
from collections.abc import Generator, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import replace

import orjson
from rich.filesize import decimal

from watcher.decide import blob_findings, findings, modes
from watcher.errors import WatchError
from watcher.model import ActionKind, Plan, Scope
from watcher.observe import scan
from watcher.ollama import manifests, names
from watcher.pull import disk, verification
from watcher.pull.account import Account, Update
from watcher.pull.failures import Cause, End
from watcher.pull.target import Target
from watcher.reconcile import Reconciler
from watcher.state import folders, transfers
from watcher.state.records import State
from watcher.transfer import taking_over

_REMOVALS = frozenset({ActionKind.REMOVE_DOWNLOAD, ActionKind.REMOVE_SURPLUS})


def take_up(
    account: Account, raw: bytes, learned: Mapping[str, int]
) -> Generator[Update, None, bool]:
    """Take up a manifest, with sizes as `learned`; whether the store has all that it names."""
    sizes = manifests.sizes(raw)
    with account.opened() as store:
        known = {} if store is None else verification.right_sizes(store, sizes, account.boot)
    right = manifests.sizes(raw, {**known, **learned})
    account.expect(right)
    yield account.change(
        state=State.PULLING_MANIFEST,
        manifest_pulled=True,
        total_bytes=account.progress.total,
        present_bytes=account.progress.present,
        downloaded_bytes=account.progress.done,
        resume_supported=account.progress.total > 0,
    )
    for digest, size in sorted(right.items() - sizes.items()):
        wrong = f"its manifest gives {names.short(digest)} {sizes[digest]:,} bytes"
        yield account.note(f"{wrong}, but {size:,} are right; its publisher must correct that")
    if is_complete(account, raw):
        yield account.note("up to date")
        return True
    yield from note_astray(account)
    return False


def note_resuming(account: Account) -> Update:
    """How much of the model was on the disk before."""
    account.is_resuming_noted = True
    done, total = account.progress.done, account.progress.total
    # In the unit of the whole: ``41.2 of 46.0 GB``.
    scale = 1000 ** ((len(str(total)) - 1) // 3)
    number = f"{done / scale:,.1f}" if scale > 1 else f"{done}"
    return account.note(f"resuming: {number} of {decimal(total)} on disk")


def note_astray(account: Account) -> Iterator[Update]:
    """Say once, before anything is downloaded, what of it lies where no server looks."""
    if account.is_astray_noted:
        return
    account.is_astray_noted = True
    missing = account.missing() & account.progress.sizes.keys()
    sizes = {digest: account.progress.sizes[digest] for digest in missing}
    for text in astray(account.target, account.name.shown, sizes):
        yield account.note(text)


def is_complete(account: Account, raw: bytes) -> bool:
    """Whether the store has this very manifest, and all that it names."""
    with account.opened() as store:
        if store is None or account.progress.present < account.progress.total:
            return False
        path = f"manifests/{account.name.path}"
        try:
            same = orjson.loads(verification.read(path, store)) == orjson.loads(raw)
            sizes = account.progress.sizes
            return bool(same) and not verification.in_doubt(store, sizes, account.boot)
        except (OSError, orjson.JSONDecodeError):
            return False


def check_disk(account: Account, arrived: int) -> Generator[Update, None, End | None]:
    """Note where the disk takes this model, but not the other unfinished downloads, too.

    `arrived`: bytes of missing layers that are here. Returns the end where the disk takes them not.
    """
    host, layers = account.target.host, account.progress.missing
    if host is not None and layers and (ended := disk.fault(host, max(layers))):
        return ended
    with account.opened() as store:
        if store is None:
            return None
        room = os.fstatvfs(store)
        others = scan.unfinished(store) - account.digests
    free = max(0, room.f_bavail * room.f_frsize - transfers.reserve(room))
    missing = account.progress.total - account.progress.present - arrived
    if missing > free:
        why = f"{decimal(missing)} to download, but the disk has only {decimal(free)} free"
        return End(Cause.DISK_FULL, why)
    report = None if host is None else taking_over.look(host, account.target.settings, others)
    more = 0 if report is None else findings.lacking(report.diagnosis.diagnosed)
    if missing + more > free:
        yield account.note(
            f"the disk has {decimal(free)} free: enough for this model ({decimal(missing)}), "
            f"but not also for other unfinished downloads ({decimal(more)})"
        )
    return None


def flaw(raw: bytes) -> End:
    """The end of a pull whose manifest names no layer, or an impossible one; a server takes it."""
    try:
        if not (found := manifests.flaw(raw)):
            manifests.sizes(raw)
    except ValueError as error:
        found = str(error)
    return End(Cause.BAD_MANIFEST, f"its manifest is invalid: {found}") if found else End()


def remove_surplus(target: Target, digests: Set[str]) -> None:
    """Remove what a server has left of layers that are finished, if that may go by now."""
    if target.host is None or not digests:
        return
    settings = replace(target.settings, stale_after=0.0)

    def approve(planned: Plan) -> Plan:
        return planned.filtered(lambda each: each.subject in digests and each.kind in _REMOVALS)

    reconciler, scope = Reconciler(target.host, settings), Scope(frozenset(digests))
    with suppress(WatchError, OSError):  # `clean` does it later
        # Only where it may go: by these settings all that is seen is stale, which is no news.
        if approve(reconciler.inspect(modes.CLEAN, scope).plan).actions:
            reconciler.reconcile(modes.CLEAN, scope, approve)


def astray(target: Target, model: str, missing: Mapping[str, int]) -> Iterator[str]:
    """Where the bytes of `missing` layers of a model lie, and what brings them to their place."""
    host = target.host or target.named
    if host is None or not missing:
        return
    try:
        with folders.opened_store(host.store) as store:
            lying = scan.lying(store, missing, model)
        if not lying:
            return
        seen = Reconciler(host, target.settings).inspect().evidence
    except (WatchError, OSError):
        return
    seen = seen._replace(census=seen.census._replace(odd=lying))
    for finding in blob_findings.astray(seen):
        if finding.models:
            helps = finding.command or finding.remedy
            helps = f"; to avoid that, stop the pull and move them first: {helps}" if helps else ""
            yield f"{finding.message}; this pull downloads it again{helps}"
