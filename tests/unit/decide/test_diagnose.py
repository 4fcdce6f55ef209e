"""Each download has one condition, by the evidence alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from watcher.decide import diagnose
from watcher.model import (
    DAY,
    HOUR,
    BlobCensus,
    BlobFault,
    Condition,
    Download,
    Evidence,
    Kind,
    ManifestFault,
    OddBlob,
    OddManifest,
    Severity,
    Visibility,
)

from .seen import MB, NOW, POLICY, D, diagnosis, download, entry, evidence, server, writer

FULL = ((0, 200 * MB),)


def condition(one: Download, **more: Any) -> Condition:
    (diagnosed,) = diagnose.diagnose(evidence(one, **more), POLICY)
    return diagnosed.condition


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (download(), Condition.PAUSED),
        (download(claimed=()), Condition.PAUSED),
        (download(trusted=((0, 60 * MB),)), Condition.BEHIND),
        (download(trusted=((0, 40 * MB),)), Condition.HOLLOW),
        (download(trusted=((0, 40 * MB), (100 * MB, 150 * MB))), Condition.HOLLOW),
        (download(data=False, trusted=()), Condition.HOLLOW),
        (download(data=False, claimed=(), trusted=()), Condition.PAUSED),
        (download(faults=("part 0: empty",)), Condition.BLOCKED),
        (download(parts=0, claimed=(), trusted=()), Condition.UNCLAIMED),
        (download(parts=0, claimed=(), trusted=((0, MB),)), Condition.UNCLAIMED),
        (download(trusted=FULL), Condition.WHOLE),
        (download(claimed=FULL), Condition.WHOLE),
        (download(parts=0, claimed=(), trusted=FULL), Condition.WHOLE),
        (download(faults=("x",), trusted=FULL), Condition.WHOLE),
        (download(finished=entry(f"sha256-{D}", size=200 * MB)), Condition.REDUNDANT),
        (download(finished=entry(f"sha256-{D}", size=5), total=None), Condition.REDUNDANT),
        (download(finished=entry(f"sha256-{D}", size=5)), Condition.PAUSED),
        (download(finished=entry("x", size=200 * MB, kind=Kind.SYMLINK)), Condition.PAUSED),
        (download(unreadable="Input/output error"), Condition.UNKNOWN),
        (download(data=False).__class__(D, entry("x", kind=Kind.FOLDER)), Condition.UNKNOWN),
        (download(transfer=True, parts=0), Condition.PAUSED),
    ],
)
def test_the_table_of_conditions(one: Download, expected: Condition) -> None:
    assert condition(one) is expected


def test_a_writer_makes_it_live_whatever_else_is_seen() -> None:
    for one in (
        download(),
        download(faults=("x",)),
        download(unreadable="x"),
        download(ago=9 * DAY),
    ):
        assert condition(replace(one, holders=(writer(),))) is Condition.LIVE


def test_a_reader_changes_nothing() -> None:
    assert condition(replace(download(), holders=(writer(writes=False),))) is Condition.PAUSED


@pytest.mark.parametrize(
    ("ago", "more", "live"),
    [
        (10, {}, False),
        (10, {"servers": (server(),)}, True),
        (89, {"servers": (server(),)}, True),
        (91, {"servers": (server(),)}, False),
        (10, {"visibility": Visibility.NAMED}, False),
        (10, {"visibility": Visibility.PARTIAL}, True),
        (91, {"visibility": Visibility.PARTIAL}, False),
        (-500, {"servers": (server(),)}, True),
    ],
)
def test_a_recently_changed_download_is_live_if_a_server_may_run(
    ago: float, more: dict[str, Any], live: bool
) -> None:
    assert (condition(download(ago=ago), **more) is Condition.LIVE) is live


def test_age_goes_by_the_progress_and_quiet_by_the_files() -> None:
    one = replace(download(ago=HOUR), progress_at=NOW - 9 * DAY)
    (diagnosed,) = diagnose.diagnose(evidence(one), POLICY)
    assert (diagnosed.age, diagnosed.quiet, diagnosed.stale) == (9 * DAY, HOUR, True)


@pytest.mark.parametrize(("ago", "stale"), [(7 * DAY - 1, False), (7 * DAY, True), (-DAY, False)])
def test_stale_is_an_overlay(ago: float, stale: bool) -> None:
    (diagnosed,) = diagnose.diagnose(evidence(download(ago=ago)), POLICY)
    assert diagnosed.stale is stale
    assert diagnosed.age >= 0
    assert diagnosed.quiet >= 0


def test_a_live_download_is_never_stale() -> None:
    one = replace(download(ago=9 * DAY), holders=(writer(),))
    (diagnosed,) = diagnose.diagnose(evidence(one), POLICY)
    assert not diagnosed.stale


def test_the_bytes_that_a_pull_would_still_download() -> None:
    def costs(one: Download) -> tuple[int | None, int | None]:
        (diagnosed,) = diagnose.diagnose(evidence(one), POLICY)
        return diagnosed.cost_alone, diagnosed.cost_repaired

    assert costs(download(trusted=((0, 80 * MB),))) == (150 * MB, 120 * MB)
    assert costs(download(parts=0, claimed=(), trusted=((0, 80 * MB),))) == (200 * MB, 120 * MB)
    assert costs(download(trusted=((0, 20 * MB),))) == (350 * MB, 180 * MB)
    assert costs(download(faults=("x",)))[0] is None
    assert costs(download(finished=entry("x", size=200 * MB))) == (0, 0)
    assert costs(download(total=None)) == (None, None)


def findings(seen: Evidence) -> dict[str, Severity]:
    return {each.kind: each.severity for each in diagnosis(seen).findings}


@pytest.mark.parametrize(
    ("fault", "kind", "severity"),
    [
        (BlobFault.SHORT, "blob_short", Severity.ERROR),
        (BlobFault.LONG, "blob_long", Severity.ERROR),
        (BlobFault.MISSING, "blob_missing", Severity.ERROR),
        (BlobFault.SYMLINK, "blob_symlink", Severity.INFO),
    ],
)
def test_odd_blobs_are_reported(fault: BlobFault, kind: str, severity: Severity) -> None:
    odd = OddBlob(D, fault, 5, None if fault is BlobFault.MISSING else entry("x"), ("m:latest",))
    assert findings(evidence(census=BlobCensus(odd=(odd,), manifests=1)))[kind] is severity


def test_odd_manifests_are_reported() -> None:
    for fault in ManifestFault:
        odd = OddManifest("manifests/h/n/m/t", fault, "why", "h/n/m:t", NOW - HOUR)
        seen = findings(evidence(census=BlobCensus(odd_manifests=(odd,), manifests=1)))
        assert f"manifest_{fault.value}" in seen


def test_no_manifest_at_all_beside_blobs_is_an_error() -> None:
    census = BlobCensus(unnamed=(entry(f"sha256-{D}"),))
    assert findings(evidence(census=census))["store_no_manifests"] is Severity.ERROR
    one = census._replace(manifests=1)
    assert "store_no_manifests" not in findings(evidence(census=one))


def test_the_young_orphan_of_a_pull_under_way_is_no_warning() -> None:
    census = BlobCensus(unnamed=(entry(f"sha256-{'a' * 64}"),), manifests=1)
    assert findings(evidence(download(), census=census))["blob_orphan"] is Severity.INFO
    assert findings(evidence(census=census))["blob_orphan"] is Severity.WARNING


def test_an_orphan_is_as_old_as_it_is_to_a_clean_up() -> None:
    """We have kept it from the server's clean-up while it was young: that time is ours."""
    kept = entry(f"sha256-{'a' * 64}", ago=60, own_mtime_ns=round((NOW - 8 * DAY) * 1e9))
    census = BlobCensus(unnamed=(kept,), manifests=1)
    seen = evidence(download(), census=census)
    (orphan,) = [each for each in diagnosis(seen).findings if each.kind == "blob_orphan"]
    assert (orphan.severity, orphan.command) == (
        Severity.WARNING,
        "ollama-watch --store /models clean sha256-aaaaaaaaaaaa",
    )


def test_severe_findings_come_first() -> None:
    odd = OddBlob(D, BlobFault.SHORT, 5, entry("x"), ("m:latest",))
    seen = evidence(download(), census=BlobCensus(odd=(odd,), manifests=1))
    ranks = [each.severity.rank for each in diagnosis(seen).findings]
    assert ranks == sorted(ranks, reverse=True)
