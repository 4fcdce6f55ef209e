"""The conditions of downloads, one row each: the test, the words, and what becomes of it. Pure."""

import enum
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from rich.filesize import decimal

from watcher.model import Condition, Diagnosed, Download, Kind, Severity
from watcher.ollama import names, ranges


class Step(enum.Enum):
    """What `repair`, or `clean`, does about a download."""

    NOTHING = enum.auto()
    WAIT = enum.auto()  #: nothing before the server leaves it alone
    WRITE_SIDECARS = enum.auto()
    REMOVE_SURPLUS = enum.auto()  #: remove what lies beside a finished blob
    REMOVE = enum.auto()


class NextPull(enum.Enum):
    #: At what the progress files record; that may be less than is on disk, down to nothing.
    RESUMES = enum.auto()
    ANEW = enum.auto()
    OURS = enum.auto()  #: where ours stopped, if it is ours; a server's does not see it
    IGNORES = enum.auto()  #: it does not touch it


#: Bytes that a pull downloads; None where it fails, or where they are unknown.
Cost: TypeAlias = Callable[[Download], int | None]


def _is_strange(download: Download) -> str:
    if download.unreadable:
        return f"reading it failed: {download.unreadable}"
    for entry in download.entries:
        if entry.kind is not Kind.FILE:
            return f"{names.printable(entry.name)} is {entry.kind.words}, not a file"
    return ""


def _is_finished(download: Download) -> str:
    blob, total = download.finished, download.total
    there = blob is not None and blob.kind is Kind.FILE and total in (None, blob.size)
    if there and download.ours and blob and blob.sha256 not in (None, download.digest.lower()):
        return ""  # it is to replace that one
    return "the finished blob exists, too" if there else ""


def _is_whole(download: Download) -> str:
    if download.transfer or download.data is None or not download.total or download.is_wrong:
        return ""
    whole = ranges.size(download.trust.present) == download.total
    return "every byte is on disk" if whole else ""


def _lacks_data(download: Download) -> str:
    trust = download.trust
    hollow = ranges.size(ranges.difference(trust.claimed, trust.trusted))
    if download.transfer or not hollow:
        return ""
    if download.is_useless:
        return f"checksum mismatch: {decimal(hollow)} recorded as downloaded can't be trusted"
    wrong = (
        () if download.proven is None else ranges.intersection(download.proven.wrong, trust.claimed)
    )
    if wrong:
        return f"{decimal(hollow)} recorded as downloaded is wrong by the sums of its chunks"
    lost = "the data file is missing" if download.data is None else "the data file has holes there"
    return f"{decimal(hollow)} recorded as downloaded is not on disk: {lost}"


def _has_more(download: Download) -> str:
    trust = download.trust
    beyond = ranges.size(ranges.difference(trust.trusted, trust.claimed))
    if download.transfer or not beyond:
        return ""
    return f"{decimal(beyond)} is on disk but not recorded by the server"


def _is_ours(download: Download) -> str:
    if not download.ours:
        return ""
    return "; ".join(download.faults) or "its data is in .ollama-watch/transfers/"


def _is_right(download: Download) -> str:
    if download.transfer:
        return "a layer on the transfer path, which resumes at its size"
    if download.is_wrong:
        if download.is_useless:
            return "checksum mismatch: the next pull downloads all of it again"
        again = decimal(_rest(download) or 0)
        return f"checksum mismatch: {again} must be downloaded again, all of it if more is wrong"
    return "progress files are valid"


def _rest(download: Download) -> int | None:
    """What the progress files don't record; of a transfer of ours the server has nothing."""
    if download.total is None or download.ours:
        return download.total
    return download.total - ranges.size(download.trust.claimed)


def _rest_and_all(download: Download) -> int | None:
    """The rest first; then the checksum mismatch discards everything, and it starts again."""
    rest = _rest(download)
    return None if rest is None or download.total is None else rest + download.total


def _untrusted(download: Download) -> int | None:
    if download.total is None or download.discarded or download.may_be_right:
        return None  # nobody knows yet what of it is wrong
    return download.total - ranges.size(download.trust.trusted)


class Row(NamedTuple):
    """Everything that differs from condition to condition; the usual values are those of most."""

    condition: Condition
    #: Why a download that nobody pulls is in it; "" where it is not.
    because: Callable[[Download], str]
    #: In nine characters, and in a sentence about a model.
    word: str
    sentence: str
    #: What the next pull does, and how much it downloads.
    alone: str
    cost_alone: Cost = _rest
    cost_repaired: Cost = _untrusted  #: how much it downloads after a repair
    severity: Severity = Severity.WARNING
    next_pull: NextPull = NextPull.RESUMES  #: where the next pull begins
    repair: Step = Step.WRITE_SIDECARS
    clean: Step = Step.REMOVE
    repaired: Condition = Condition.PAUSED  #: what it is after a repair

    @property
    def words(self) -> str:
        """What the sentence states about the download."""
        return self.sentence.partition("{} ")[2].removeprefix("is ").removeprefix("has ")


#: In the order in which they are tested.
TABLE = (
    Row(
        Condition.LIVE,
        lambda _: "",  # what a process does now is no property of the files
        "in use",
        "the download of {} is in use",
        "it continues",
        cost_repaired=lambda _: None,
        severity=Severity.INFO,
        repair=Step.WAIT,
        clean=Step.NOTHING,
    ),
    Row(
        Condition.UNKNOWN,
        _is_strange,
        "unknown",
        "the state of the download of {} is unknown",
        "what the next pull does is unknown",
        cost_alone=lambda _: None,
        cost_repaired=lambda _: None,
        severity=Severity.ERROR,
        next_pull=NextPull.IGNORES,
        repair=Step.NOTHING,
        clean=Step.NOTHING,
    ),
    Row(
        Condition.REDUNDANT,
        _is_finished,
        "redundant",
        "the download of {} has redundant files",
        "the files stay, and a leftover progress file blocks a later pull",
        cost_alone=lambda _: 0,
        cost_repaired=lambda _: 0,
        next_pull=NextPull.IGNORES,
        repair=Step.REMOVE_SURPLUS,
        clean=Step.REMOVE_SURPLUS,
    ),
    Row(
        Condition.TRANSFER,
        _is_ours,
        "transfer",
        "the download of {} is resumable by ollama-watch",
        "the server downloads all of it; `ollama-watch pull` resumes it",
        severity=Severity.INFO,
        next_pull=NextPull.OURS,
        repair=Step.NOTHING,
    ),
    Row(
        Condition.WHOLE,
        _is_whole,
        "complete",
        "the download of {} is complete, not yet finalized",
        "the next pull downloads {again} again, which is already on disk",
        cost_alone=lambda download: None if download.faults else _rest(download),
        cost_repaired=lambda _: 0,
        repaired=Condition.WHOLE,
    ),
    Row(
        Condition.UNCLAIMED,
        lambda of: "" if of.transfer or of.sidecars else "the server starts such a download at 0",
        "repair",
        "the download of {} needs repair: no progress files",
        "the next pull starts at 0",
        cost_alone=lambda download: download.total,
        next_pull=NextPull.ANEW,
    ),
    Row(
        Condition.BLOCKED,
        lambda of: "" if of.transfer else "; ".join(of.faults[:3]),
        "repair",
        "the download of {} needs repair: unreadable progress files",
        "each pull fails, or truncates the data",
        cost_alone=lambda _: None,
        severity=Severity.ERROR,
        next_pull=NextPull.ANEW,
    ),
    Row(
        Condition.HOLLOW,
        _lacks_data,
        "repair",
        "the download of {} needs repair: recorded data is missing or wrong",
        "the next pull ends in a checksum mismatch and discards everything",
        cost_alone=_rest_and_all,
        severity=Severity.ERROR,
        next_pull=NextPull.ANEW,
    ),
    Row(
        Condition.BEHIND,
        _has_more,
        "repair",
        "the download of {} needs repair: progress not recorded",
        "the next pull downloads {again} again, which is already on disk",
    ),
    Row(
        Condition.PAUSED,
        _is_right,
        "resumable",
        "the download of {} is resumable",
        "the next pull resumes it",
        severity=Severity.INFO,
        repair=Step.NOTHING,
    ),
)
_ROWS = {row.condition: row for row in TABLE}


def row(condition: Condition) -> Row:
    return _ROWS[condition]


#: What is in use is best; among those alike in severity the one that is tested later is better.
_BEST_FIRST = sorted(
    TABLE, key=lambda row: (row.severity.rank, row.repair is not Step.WAIT, -TABLE.index(row))
)


def badness(condition: Condition) -> int:
    """Orders conditions from the best to the worst."""
    return _BEST_FIRST.index(row(condition))


def settled_condition(download: Download) -> tuple[Condition, str]:
    """The condition of a download that nobody pulls, and why."""
    for each in TABLE:
        if because := each.because(download):
            return each.condition, because
    raise AssertionError("the last row holds for every download")


def alone(condition: Condition, download: Download) -> str:
    """What the next pull does with it, in words."""
    trust = download.trust
    again = decimal(ranges.size(ranges.difference(trust.present, trust.claimed)))
    return row(condition).alone.format(again=again)


def sentence(condition: Condition, download: Download) -> str:
    """What is so with a download, with the name of its model."""
    return row(condition).sentence.format(names.known_as(download.models, download.digest))


def why(diagnosed: Diagnosed) -> str:
    """What is so with a download, without its name, and the evidence."""
    return f"{row(diagnosed.condition).words} ({diagnosed.because})"


def resumes(condition: Condition) -> bool:
    """Whether Ollama alone, or a pull of ours, goes on from what is recorded."""
    return row(condition).next_pull in (NextPull.RESUMES, NextPull.OURS)


def is_cleanable(diagnosed: Diagnosed) -> bool:
    """Whether `clean` does anything about it once it is stale."""
    return row(diagnosed.condition).clean is not Step.NOTHING
