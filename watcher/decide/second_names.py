"""Second names of blobs that a server may yet remove: which are wanted, and which may go. Pure."""

from watcher.model import HOUR, Evidence, Visibility
from watcher.ollama import names


def wanted(evidence: Evidence) -> frozenset[str]:
    """Layers of a pull under way that have none yet, such as after a daemon's start."""
    unseen = evidence.view.visibility is not Visibility.FULL
    if evidence.scope is not None or not (evidence.servers or unseen):
        return frozenset()
    ours = {each.digest for each in evidence.second_names}
    ours |= {each.digest for each in evidence.downloads if each.ours}
    young = (
        names.parse_blob(each.name).digest
        for each in evidence.census.unnamed
        # A server hashes its own only; what was hashed here is right, or known to be wrong.
        if each.sha256 is None and evidence.age_of(each.changed_at) < HOUR
    )
    return frozenset(young) - ours


def needless(evidence: Evidence, *, clean: bool) -> frozenset[str]:
    """The digests whose bytes in our folder no server's mistake can make worth anything any more.

    Those of which a manifest is there, and those of a pull that has been over for an hour; with
    `clean`, all that are still blobs. Only a scan of the whole store says so.
    """
    theirs = [each for each in evidence.downloads if each.by_server]
    if evidence.scope is not None or not (evidence.second_names or theirs):
        return frozenset()
    odd, unnamed = {each.digest for each in evidence.census.odd}, _unnamed(evidence)
    # A server that downloads a layer itself takes the name from our file, and may remove it.
    beside = {each.digest for each in evidence.downloads if not each.ours}
    is_over = clean or _is_over(evidence)
    found = {
        each.digest
        for each in evidence.second_names
        if each.digest not in unnamed or (is_over and not each.held)
    }
    found |= {
        each.digest
        for each in theirs
        if each.finished is not None and each.digest not in unnamed | odd
    }
    return frozenset(found - beside)


def named(evidence: Evidence) -> frozenset[str]:
    """Those of which a manifest is there by now."""
    if evidence.scope is not None or not evidence.second_names:
        return frozenset()
    return frozenset(each.digest for each in evidence.second_names) - _unnamed(evidence)


def _unnamed(evidence: Evidence) -> frozenset[str]:
    return frozenset(names.parse_blob(each.name).digest for each in evidence.census.unnamed)


def _is_over(evidence: Evidence) -> bool:
    """Whether no server has pulled anything for an hour."""
    if evidence.pulling:
        return False
    times = [each.changed_at for each in evidence.census.unnamed]
    times += [x.changed_at for x in evidence.downloads if not x.ours and x.changed_at is not None]
    return all(evidence.age_of(at) >= HOUR for at in times)
