"""Numbers from reports and events, and that the docs have them all."""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import Metric, generate_latest

from tests.support.runs import rules
from tests.support.servers import wait_until
from tests.unit.decide.seen import MB, NOW, POLICY, diagnosis, download, entry, evidence, writer
from watcher import reconcile
from watcher.decide import events, finding_kinds, plan
from watcher.errors import ListenError
from watcher.model import (
    DAY,
    Action,
    ActionKind,
    BlobCensus,
    Evidence,
    Finding,
    Kept,
    Outcome,
    Refusal,
    RefusalKind,
    Result,
    Severity,
    Visibility,
)
from watcher.service import metrics
from watcher.state.event_log import Event, EventType

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
A, B, C = ("a" * 64, "b" * 64, "c" * 64)
LISTENS = rules(metrics_listen=("127.0.0.1", 0))


def report(seen: Evidence) -> reconcile.Report:
    told_of = diagnosis(seen, POLICY)
    return reconcile.Report(seen, told_of, plan.make(told_of.diagnosed, seen, POLICY))


FULL = report(
    evidence(
        download(digest=A, ago=9 * DAY),
        download(digest=B, trusted=((0, 60 * MB),)),
        download(digest=C, ago=10, holders=(writer(),)),
        census=BlobCensus(
            manifests=1, healthy=2, healthy_bytes=700, unnamed=(entry(f"sha256-{'d' * 64}"),)
        ),
        quarantine=(Kept("0-x", "x", entry("x"), replaced=False),),
    )
)


def numbers(kept: metrics.Metrics) -> dict[str, float]:
    """Each sample that is not 0, by its name and its labels' values."""
    return {
        " ".join((sample.name.removeprefix("ollama_watch_"), *list(sample.labels.values())[1:])): (
            sample.value
        )
        for metric in kept.collect()
        for sample in metric.samples
        if sample.value
    }


def downloads(kept: metrics.Metrics) -> dict[str, float]:
    return {
        name.removeprefix("downloads "): number
        for name, number in numbers(kept).items()
        if name.startswith("downloads ")
    }


@pytest.fixture
def kept() -> Iterator[metrics.Metrics]:
    with metrics.Metrics("/models", LISTENS.settings) as kept:
        yield kept


# ---------------------------------------------------------------- looks


def test_a_full_scan_reports_everything(kept: metrics.Metrics) -> None:
    kept.look(FULL, 0.25)
    found = numbers(kept)
    assert downloads(kept) == {"paused": 1, "behind": 1, "live": 1}
    assert found["download_bytes behind present"] == 60 * MB
    assert found["download_bytes behind missing"] == 140 * MB
    assert found["download_bytes paused missing"] == 150 * MB
    assert found["stale_downloads"] == 1
    assert found["oldest_progress_timestamp_seconds"] == NOW - 9 * DAY
    assert found["last_full_look_timestamp_seconds"] == NOW
    assert found["last_full_look_duration_seconds"] == 0.25
    assert found["findings warning download_behind"] == 1
    assert (found["blobs"], found["blob_bytes"]) == (2, 700)
    assert found["orphan_bytes"] == found["quarantine_bytes"] == 4096
    assert found["sight full"] == 1
    assert "sight partial" not in found


def test_a_scan_of_some_digests_counts_them_and_keeps_the_others(kept: metrics.Metrics) -> None:
    kept.look(FULL, 0.25)
    narrow = evidence(
        download(digest=C, ago=200),
        scope=frozenset({B, C}),
        visibility=Visibility.PARTIAL,
        now=NOW + 60,
    )
    narrow = narrow._replace(place=narrow.place._replace(free_bytes=5))
    kept.look(report(narrow), 9.0)
    assert downloads(kept) == {"paused": 2}, "B is gone, C interrupted, A as it was"
    found = numbers(kept)
    assert found["free_bytes"] == 5
    assert found["sight partial"] == 1
    assert found["last_full_look_timestamp_seconds"] == NOW
    assert found["last_full_look_duration_seconds"] == 0.25
    assert found["blobs"] == 2
    assert found["findings warning download_behind"] == 1


def test_a_later_full_scan_drops_downloads_that_are_gone(kept: metrics.Metrics) -> None:
    kept.look(FULL, 0.25)
    kept.look(report(evidence(now=NOW + 600)), 0.5)
    assert downloads(kept) == {}
    assert "findings warning download_behind" not in numbers(kept)
    assert "oldest_progress_timestamp_seconds" not in numbers(kept)


def test_what_a_repair_saves_is_what_the_next_pull_would_download_again(
    kept: metrics.Metrics,
) -> None:
    behind = download(digest=B, trusted=((0, 60 * MB),))
    blocked = download(digest=C, faults=("no number 1",))
    kept.look(report(evidence(behind, blocked, download(digest=A))), 0)
    found = numbers(kept)
    (costs,) = [each for each in report(evidence(behind)).diagnosis.diagnosed if each.digest == B]
    assert costs.cost_alone is not None
    assert costs.cost_repaired is not None
    of_blocked = sum(stop - start for start, stop in blocked.trust.trusted)
    assert found["repairable_bytes"] == costs.cost_alone - costs.cost_repaired + of_blocked


def test_what_the_next_start_deletes_is_counted_where_no_daemon_protects_it(
    kept: metrics.Metrics,
) -> None:
    old = report(evidence(download(digest=A, ago=2 * DAY), download(digest=B, ago=9 * DAY)))
    kept.look(old, 0)
    (finding,) = [each for each in old.diagnosis.findings if each.kind == "download_at_risk"]
    assert numbers(kept)["at_risk_bytes"] == finding.sizes.allocated > 0


def test_a_host_has_a_limited_number_of_series(kept: metrics.Metrics) -> None:
    """At most 150 with the five that Prometheus adds, whatever is wrong with a store."""
    every = [row.kind for row in finding_kinds.TABLE]
    worst = [Finding(severity, kind, "", "") for severity in reversed(Severity) for kind in every]
    kept.look(FULL._replace(diagnosis=FULL.diagnosis._replace(findings=tuple(worst))), 0)
    for kind in EventType:
        kept.event(Event(0, kind, ""))
    samples = [sample for metric in kept.collect() for sample in metric.samples]
    assert len(samples) + 5 <= 150
    found = {tuple(each.labels.values())[1:]: each.value
             for each in samples if each.name == "ollama_watch_findings"}  # fmt: skip
    assert len(found) == metrics.MOST_FINDINGS
    assert sum(found.values()) == len(worst), "none is left out"
    assert ("error", every[0]) in found
    assert ("info", every[-1]) not in found


def test_a_live_download_is_not_idle(kept: metrics.Metrics) -> None:
    live = report(evidence(download(ago=9 * DAY, holders=(writer(),))))
    kept.look(live, 0)
    assert "oldest_progress_timestamp_seconds" not in numbers(kept)


def test_no_bytes_are_missing_of_an_unknown_length(kept: metrics.Metrics) -> None:
    kept.look(report(evidence(download(total=None, trusted=()))), 0)
    assert not [name for name in numbers(kept) if name.endswith(" missing")]


def test_before_the_first_scan_only_counts_are_reported(kept: metrics.Metrics) -> None:
    names = {family.name.removeprefix("ollama_watch_") for family in kept.collect()}
    assert {"repairs", "last_full_look_timestamp_seconds"} <= names
    assert "downloads" not in names


# ---------------------------------------------------------------- events


def test_events_are_counted(kept: metrics.Metrics) -> None:
    repair = Action(ActionKind.WRITE_SIDECARS, A, "behind", (), saves=70)
    removal = Action(ActionKind.REMOVE_DOWNLOAD, A, "stale", (), frees=5)
    purge = Action(ActionKind.PURGE, "0-x", "as asked", (), frees=6)
    held = Refusal(RefusalKind.HELD, A, removal.kind, "open", "close it")
    for event in (
        events.begun(repair, NOW),
        events.ended(Outcome(repair, Result.DONE, ""), NOW),
        events.ended(Outcome(removal, Result.DONE, "", freed=5), NOW),
        events.ended(Outcome(purge, Result.DONE, "", freed=6), NOW),
        events.ended(Outcome(removal, Result.REFUSED, "", refusal=held), NOW),
        events.refused(held._replace(kind=RefusalKind.OWNER), NOW),
        events.ended(Outcome(repair, Result.FAILED, ""), NOW),
    ):
        kept.event(event)
    found = numbers(kept)
    assert found["repairs_total"] == 1
    assert found["saved_bytes_total"] == 70
    assert found["freed_bytes_total"] == 11
    assert found["refusals_total held"] == found["refusals_total owner"] == 1
    assert found["events_total refused"] == 2
    assert found["events_total error"] == found["events_total act_started"] == 1
    assert "refusals_total changed" not in found


def test_every_kind_of_refusal_is_there_from_the_start(kept: metrics.Metrics) -> None:
    (refusals,) = [each for each in kept.collect() if each.name == "ollama_watch_refusals"]
    found = {sample.labels["kind"]: sample.value for sample in refusals.samples}
    assert found == {kind.value: 0 for kind in RefusalKind}


# ---------------------------------------------------------------- handed out


def collected(store: str = "/models") -> list[Metric]:
    with metrics.Metrics(store, LISTENS.settings) as kept:
        kept.look(FULL, 0.25)
        return list(kept.collect())


def test_the_docs_have_every_metric_with_its_type_unit_and_labels() -> None:
    row = re.compile(r"\| `(ollama_watch_\w+)` \| (\w+) \| (\S+) \| (.+?) \| .+ \|")
    told = {name: (kind, unit, set(re.findall(r"`(\w+)`", labels)))
            for name, kind, unit, labels in row.findall(DOCS.read_text())}  # fmt: skip
    made = {}
    for metric in collected():
        name = f"{metric.name}_total" if metric.type == "counter" else metric.name
        words = name.removesuffix("_total").split("_")
        unit = words[-1] if words[-1] in ("bytes", "seconds") else "–"
        labels = {label for sample in metric.samples for label in sample.labels} - {"store"}
        made[name] = (metric.type, unit, labels)
    assert told == made


def test_a_store_of_any_name_is_a_label() -> None:
    odd = os.fsdecode(b'/\xff"\n\\')
    for metric in collected(odd):
        for sample in metric.samples:
            sample.labels["store"].encode()
    with metrics.Metrics(odd, LISTENS.settings) as kept:
        assert kept.port is not None
        assert kept._registry is not None
        generate_latest(kept._registry).decode()


def test_without_a_setting_nothing_is_kept() -> None:
    with metrics.Metrics("/models", rules().settings) as kept:
        kept.event(Event(0, "error", ""))
        assert kept.look(FULL, 1) == ""
        assert kept._scanned.keys() == {"build_info", "last_full_look_timestamp_seconds"}
        assert not any(counts.total() for counts in kept._counts.values())
        assert kept.port is None


def test_a_failed_write_is_reported_once_until_it_succeeds(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "x.prom"
    with metrics.Metrics("/models", rules(metrics_file=str(file)).settings) as kept:
        assert kept.look(FULL, 1) == f"metrics_file: writing {file} failed: " + os.strerror(2)
        assert kept.look(FULL, 1) == ""
        file.parent.mkdir()
        assert kept.look(FULL, 1) == ""
        assert "ollama_watch_blobs" in file.read_text()
        file.unlink()
        file.mkdir()
        assert kept.look(FULL, 1) == f"metrics_file: writing {file} failed: " + os.strerror(21)
        assert kept.look(FULL, 1) == ""


def test_symlinks_in_the_way_of_the_metrics_file_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".x.prom.new").symlink_to("precious")
    (tmp_path / "x.prom").symlink_to("precious")
    with metrics.Metrics("/models", rules(metrics_file=str(tmp_path / "x.prom")).settings) as kept:
        assert kept.look(FULL, 1) == ""
    assert (tmp_path / "precious").read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["precious", "x.prom"]


def test_a_listener_that_lets_nobody_in_is_reported_with_the_next_scan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(_: socket.socket) -> None:
        raise PermissionError(errno.EPERM, "refused by a firewall")

    monkeypatch.setattr(socket.socket, "accept", refused)
    with metrics.Metrics("/models", LISTENS.settings) as kept:
        wait_until(lambda: bool(kept._troubles), "a client that is refused")
        assert "refused by a firewall" in kept.look(FULL, 1)
        assert kept.look(FULL, 1) == ""


def test_an_address_is_named_that_cannot_be_listened_at() -> None:
    with socket.socket(socket.AF_INET6) as taken:
        try:
            taken.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 here")
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(ListenError, match=re.escape(f"listening on [::1]:{port} failed")),
            metrics.Metrics("/models", rules(metrics_listen=("::1", port)).settings),
        ):
            pass
