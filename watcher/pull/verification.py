"""Whether a pulled model's layers match their names, as far as that is in doubt.

The server takes a layer that is there for a whole one, whatever it is (`docs/store.md`).
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

from watcher import reconcile
from watcher.decide import blob_findings, modes, remaining
from watcher.errors import WatchError
from watcher.model import ActionKind, BlobFault, OddBlob, Plan, Result
from watcher.observe import blobs, scan
from watcher.ollama import manifests, names
from watcher.ollama.manifests import READ_LIMIT
from watcher.pull.failures import Cause, End
from watcher.pull.target import Target
from watcher.reconcile import Reconciler, Report
from watcher.state import fs, memory

_KINDS = reconcile.QUESTIONS | {ActionKind.QUARANTINE_BLOB}


class Proof(NamedTuple):
    #: Layers that were quarantined, or are missing: a pull downloads them.
    gone: frozenset[str] = frozenset()
    end: End = End()  #: why the others are not known to be right; no cause where they are


def read(path: str, store: int) -> bytes:
    """A file below the store, links to folders followed as the server does. Raises OSError."""
    *above, name = path.split("/")
    with ExitStack() as opened:
        at = store
        for folder in above:
            at = opened.enter_context(fs.opened_folder(folder, at, follow=True))
        return fs.read_small(name, at, READ_LIMIT)


def layers(store: int, model: names.ModelName) -> Mapping[str, int] | None:
    """What the store's own manifest of a model names, in bytes; None where it has none."""
    try:
        return manifests.sizes(read(f"manifests/{model.path}", store))
    except (OSError, ValueError):
        return None


def right_sizes(store: int, sizes: Mapping[str, int], boot: str) -> dict[str, int]:
    """The sizes of finished layers with the right hash to which a manifest gives another one."""
    there = scan.contents(store, sizes).items()
    odd = {digest: each for digest, each in there if each.size != sizes[digest]}
    remembered = memory.load(store) if odd else memory.Memory()
    remembered = replace(remembered, hashes=remembered.hashes.of_disk(store, boot))
    found = {digest: blobs.remembered(each, remembered) for digest, each in odd.items()}
    return {digest: each.size for digest, each in found.items() if each.sha256 == digest.lower()}


def in_doubt(store: int, sizes: Mapping[str, int], boot: str) -> frozenset[str]:
    """Of layers those that are not there, or have another size, or were found corrupt before."""
    known = memory.load(store).hashes.of_disk(store, "")
    hashed = {digest: known.get(names.blob(digest)) for digest in sizes}
    corrupt = {digest for digest, each in hashed.items() if each and each.sha256 != digest.lower()}
    wrong = sizes.keys() - scan.present(store, sizes) - right_sizes(store, sizes, boot).keys()
    return frozenset(wrong | corrupt)


def prove(
    target: Target, digests: frozenset[str], cancelled: Callable[[], bool]
) -> Generator[str, None, Proof]:
    """Hash layers, and quarantine what is damaged and can be downloaded again; with notes."""
    if target.host is None:
        return Proof(end=End(Cause.UNVERIFIED, target.why))
    host = replace(target.host, stops=cancelled)

    def is_meant(_: Iterable[str], subjects: Iterable[str]) -> bool:
        return any((names.parse_blob(each).digest or each) in digests for each in subjects)

    def approve(planned: Plan) -> Plan:
        return planned.only(is_meant).filtered(lambda each: each.kind in _KINDS)

    try:
        report = Reconciler(host, target.settings).reconcile(modes.PULL_VERIFY, approve=approve)
    except (WatchError, OSError) as error:
        return Proof(end=End(Cause.UNVERIFIED, f"its layers can't be verified: {error}"))
    gone = [each for each in report.outcomes if each.action.kind is ActionKind.QUARANTINE_BLOB]
    for outcome in gone:
        yield outcome.message
    done = remaining.verified(report.evidence, report.outcomes, is_meant)
    missing = frozenset(odd.digest for odd in done.wrong if odd.fault is BlobFault.MISSING)
    if missing:
        return Proof(missing)
    if cancelled():
        return Proof(end=End(Cause.INTERRUPTED, "canceled"))
    return Proof(end=_diagnosed(report, done))


def _diagnosed(report: Report, done: remaining.Verified) -> End:
    damaged = list(_damaged(report, done.wrong))
    if damaged:
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        return End(Cause.DAMAGED, f"{damaged[0]}{more}")
    if done.unseen:
        first = done.unseen[0]
        why = f"{names.printable(first.path)} can't be verified: {first.why}"
        return End(Cause.UNVERIFIED, why)
    if done.left:
        return End(Cause.UNVERIFIED, f"{done.left} of its layers were not hashed")
    return End()


def _damaged(report: Report, wrong: Iterable[OddBlob]) -> Iterator[str]:
    refused = {each.subject: each.why for each in report.plan.refusals}
    kept = (each for each in report.outcomes if each.result is not Result.DONE)
    kind = ActionKind.QUARANTINE_BLOB
    refused |= {each.action.subject: each.message for each in kept if each.action.kind is kind}
    for odd in wrong:
        name = names.blob(odd.digest)
        why = refused.get(name, "")
        yield "; ".join(filter(None, (f"{name[:19]}: {blob_findings.damage(odd)}", why)))
