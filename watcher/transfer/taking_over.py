"""What is on this machine already of layers that are fetched, and how it becomes a transfer's own.

A server has left a download, or a damaged blob lies in quarantine. ``docs/transfers.md`` says when
which of it is renamed, and when copied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence, Set

from watcher.config import Settings
from watcher.decide import modes, repairing, safety
from watcher.decide.safety import Why
from watcher.errors import WatchError
from watcher.model import (
    Diagnosed,
    Kind,
    Plan,
    RefusalKind,
    Result,
    Scope,
)
from watcher.observe.blobs import look_at_quarantine
from watcher.observe.host import Host
from watcher.ollama import names
from watcher.reconcile import Reconciler, Report, approve_none
from watcher.state import folders
from watcher.state.memory import Memory
from watcher.transfer import store
from watcher.transfer.values import Partial

#: What ends by itself, nobody knows when.
_PASSES = frozenset({RefusalKind.HELD, RefusalKind.SERVER_STARTS})
_BUSY = Why(RefusalKind.CHANGED, "another process changes this store", "try again", 1.0)
_OTHER_LENGTH = Why(RefusalKind.LENGTH, "its length is not the manifest's", "")
_OURS_TOO = Why(RefusalKind.LIVE, "ollama-watch has fetched bytes that would be lost", "")


def look(host: Host, settings: Settings, digests: Set[str]) -> Report | None:
    """The state of some downloads, with nothing changed; None where it is not visible."""
    if not digests:
        return None
    try:
        return Reconciler(host, settings).inspect(scope=Scope(frozenset(digests)))
    except (WatchError, OSError):
        return None


def recover(host: Host, settings: Settings) -> None:
    """Finish or undo what a kill has left of a change, so that its bytes count."""
    from watcher.act import transaction

    with contextlib.suppress(WatchError, OSError), folders.opened_store(host.store) as opened:
        if transaction.unfinished(host, opened):
            Reconciler(host, settings).reconcile(modes.TAKE_OVER, Scope(frozenset()), approve_none)


def take(
    host: Host,
    settings: Settings,
    partials: Sequence[Partial],
    sizes: Mapping[str, int],
    boot: str,
) -> Generator[str, None, dict[str, Why]]:
    """Make what a server has left of layers transfers of ours, where that may be done now.

    `sizes`: the bytes of the layers, which their ledgers have to agree with. Gives notes. Returns
    why not the others, by digest. Raises OSError, and TransferError as `store.opened` does.
    """
    with store.opened(host.store) as opened:
        left = {each.digest: _OURS_TOO for each in partials if opened.has_more(each, boot)}
    wanted = {x.digest: sizes[x.digest] for x in partials if x.digest not in left}
    report = _taken(host, settings, wanted) if wanted else None
    left |= dict.fromkeys(wanted, _BUSY if report is None else _OTHER_LENGTH)
    for each in () if report is None else report.plan.refusals:
        seconds = 1.0 if each.kind in _PASSES else each.seconds_left
        left[each.subject] = Why(each.kind, each.why, each.remedy, seconds, each.command)
    for outcome in () if report is None else report.outcomes:
        if outcome.result is Result.DONE:
            del left[outcome.action.subject]
            yield outcome.message
        else:
            left[outcome.action.subject] = _BUSY._replace(reason=outcome.message)
    return left


def _taken(host: Host, settings: Settings, sizes: Mapping[str, int]) -> Report | None:
    """The same for some; None where it failed."""
    reconciler, scope = Reconciler(host, settings), Scope(frozenset(sizes))

    def approve(planned: Plan) -> Plan:
        return planned.filtered(lambda each: each.subject in alike)

    try:
        report = reconciler.inspect(modes.TAKE_OVER, scope)
        left = (each for each in report.evidence.downloads if not each.ours)
        alike = {each.digest for each in left if each.total == sizes.get(each.digest)}
        if approve(report.plan).actions:
            report = reconciler.reconcile(modes.TAKE_OVER, scope, approve)
    except (WatchError, OSError):
        return None
    return report


def live(seen: Report | None) -> list[Diagnosed]:
    """The downloads that a server is at: somebody has them open, or may have unseen."""
    if seen is None:
        return []
    return [x for x in seen.diagnosis.diagnosed if safety.is_pulled(x, seen.evidence)]


def partials(seen: Report | None) -> tuple[Partial, ...]:
    """What a server has left that nobody pulls: of its data what is trusted."""
    if seen is None:
        return ()
    pulled = {each.digest for each in live(seen)}
    return tuple(
        Partial(each.digest, *each.download.data.identity, each.download.trust.trusted)
        for each in seen.diagnosis.diagnosed
        if each.download.data is not None and repairing.is_left(each) and each.digest not in pulled
    )


def damaged(path: str, sizes: Mapping[str, int]) -> tuple[Partial, ...]:
    """What a store has in quarantine of layers; of another length, it may be right up to there."""
    found: dict[str, Partial] = {}
    with contextlib.suppress(OSError), folders.opened_store(path) as opened:
        for kept in look_at_quarantine(opened, Memory())[0]:
            digest, entry = names.parse_blob(kept.name).digest, kept.entry
            size = sizes.get(digest)
            if size and names.is_blob(kept.name) and entry.kind is Kind.FILE:
                trusted = ((0, min(size, entry.size)),) if entry.size != size else ()
                found[digest] = Partial(digest, *entry.identity, trusted, label=kept.label)
    return tuple(found.values())
