"""The modes: one row for each occasion on which a store is looked at or changed. Pure."""

from watcher.config import Settings
from watcher.model import Mode

INSPECT = Mode(repair=True, clean=True)  #: only look: plan what `repair` and `clean` could do
SURVEY = INSPECT._replace(survey=True)  #: the same, and count what takes the space
REPAIR = Mode(
    repair=True, repair_stale=True, refresh=True, online=True, hash=True, read_limit_bytes=None
)
GIVE_BACK = Mode(give_back=True)  #: make transfers of ours downloads of the server's own
TAKE_OVER = Mode(take_over=True)  #: the other way round: a pull of ours begins
CLEAN = Mode(clean=True, purge_replaced=True)
VERIFY = Mode(hash=True, verify=True)
#: Before the server starts, which waits for it.
PREPARE = Mode(repair=True, refresh=True, sync_behind=True, lock_seconds=5.0)
#: The same in the first second: times alone, and nothing is read.
PREPARE_TIMES = Mode(refresh=True, read_limit_bytes=0, lock_seconds=1.0)
#: A service, in the background: hash blobs in doubt, ask about damaged ones, put them aside.
SCRUB = Mode(repair=True, online=True, hash=True, patient=True, sync_behind=True)
PULL_VERIFY = Mode(repair=True, online=True, hash=True, verify=True)  #: a pull: check layers


def watch(settings: Settings) -> Mode:
    """A service's look, by its settings."""
    repair = settings.repair
    return Mode(repair=repair, clean=settings.clean, refresh=repair, patient=True, sync_behind=True)


def restore(labels: frozenset[str]) -> Mode:
    return Mode(restore=labels)


def purge(labels: frozenset[str]) -> Mode:
    """Remove files from quarantine for good; without labels, those that a good one has replaced."""
    return Mode(purge=labels, purge_replaced=not labels)
