"""What happened is told once for each cause, and what is known is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from watcher.decide import events, transitions
from watcher.model import (
    DAY,
    Action,
    ActionKind,
    BlobCensus,
    BlobFault,
    Condition,
    Download,
    Evidence,
    ManifestFault,
    OddBlob,
    OddManifest,
    Outcome,
    Refusal,
    RefusalKind,
    Result,
    Trust,
)
from watcher.state.event_log import Event
from watcher.state.memory import Memory, Sample

from .seen import MB, NOW, D, diagnosis, download, entry, evidence, server, writer

LIVE = replace(download(ago=1), holders=(writer(),))
PAUSED = download(ago=100)


def told(
    memory: Memory,
    seen: Evidence,
    finished: Mapping[str, int] | None = None,
    *,
    first: bool = False,
) -> tuple[Memory, list[str]]:
    seen = seen._replace(
        census=seen.census._replace(manifests=1),
        place=seen.place._replace(free_bytes=10**12),
    )
    occasion = transitions.Occasion(first)
    now, happened = transitions.learn(memory, seen, diagnosis(seen), finished or {}, occasion)
    assert all(isinstance(event, Event) and event.line for event in happened)
    return now, [event.event_type for event in happened]


def story(*looks: Evidence) -> list[list[str]]:
    memory, all_told = Memory(), []
    for seen in looks:
        memory, happened = told(memory, seen)
        all_told.append(happened)
    return all_told


def test_a_found_partial_is_reported_once() -> None:
    assert story(evidence(PAUSED), evidence(PAUSED)) == [["partial_found"], []]


def test_a_pull_from_its_start_to_its_interruption_and_on() -> None:
    looks = [evidence(each) for each in (LIVE, LIVE, PAUSED, PAUSED, LIVE, PAUSED)]
    assert story(*looks) == [
        ["download_started"],
        [],
        ["download_interrupted"],
        [],
        ["download_resumed"],
        ["download_interrupted"],
    ]


def test_a_download_that_was_only_possibly_live_is_not_reported_as_interrupted_again() -> None:
    # No writer: some file was touched while a server runs. That is no pull.
    touched = evidence(download(ago=5), servers=(server(),))
    assert story(evidence(PAUSED), touched, evidence(PAUSED)) == [["partial_found"], [], []]


def test_stale_is_reported_once() -> None:
    stale = evidence(download(ago=8 * DAY))
    assert story(evidence(PAUSED), stale, stale)[1:] == [["partial_stale"], []]


def test_a_download_that_became_a_blob_is_completed() -> None:
    memory, _ = told(Memory(), evidence(LIVE))
    memory, happened = told(memory, evidence(), {D: 200 * MB})
    assert happened == ["download_completed"]
    assert not memory.downloads


def test_a_download_that_is_just_gone_was_removed() -> None:
    memory, _ = told(Memory(), evidence(LIVE))
    assert told(memory, evidence())[1] == ["partial_removed"]


def test_a_narrow_look_does_not_miss_what_it_did_not_look_at() -> None:
    memory, _ = told(Memory(), evidence(PAUSED))
    kept, happened = told(memory, evidence()._replace(scope=frozenset({"f" * 64})))
    assert happened == []
    assert D in kept.downloads


def test_a_download_that_we_removed_is_not_reported_as_gone() -> None:
    memory, _ = told(Memory(), evidence(PAUSED))
    action = Action(ActionKind.REMOVE_DOWNLOAD, D, "stale", ())
    assert not transitions.drop(memory, [Outcome(action, Result.DONE, "done")]).downloads
    assert transitions.drop(memory, [Outcome(action, Result.REFUSED, "held")]) == memory


def test_another_file_of_the_same_digest_is_another_download() -> None:
    again = replace(PAUSED, data=entry("x", inode=99))
    assert story(evidence(PAUSED), evidence(again)) == [["partial_found"], ["partial_found"]]


def test_a_copy_is_doubted_as_much_as_what_it_was_made_of() -> None:
    memory, _ = told(Memory(), evidence(PAUSED))
    record = replace(memory.downloads[D], doubted=((150 * MB, 151 * MB),), mended=True)
    copy = replace(PAUSED, data=entry("x", inode=99))
    memory, _ = told(replace(memory, downloads={D: record}), evidence(copy))
    kept = memory.downloads[D]
    assert (kept.inode, kept.mended) == (99, True)
    assert (150 * MB, 151 * MB) in kept.doubted


def test_a_service_that_begins_reports_each_unfinished_download() -> None:
    memory, _ = told(Memory(), evidence(PAUSED))
    assert told(memory, evidence(PAUSED), first=True)[1] == ["partial_found"]


# ---------------------------------------------------------------- while it is pulled


def growing(at: float, arrived: int, *, total: int = 1000, written: float = 0.0) -> Evidence:
    """A pull of which so many bytes are on the disk at a time, the last written so long ago."""
    data = entry("data", inode=5, size=total)._replace(
        allocated=arrived, mtime_ns=round((at - written) * 1e9)
    )
    one = replace(LIVE, data=data, sidecars=(), total=total, total_from="manifest")
    return evidence(one)._replace(now=at)


def test_progress_is_reported_once_a_minute_with_rate_and_time_left() -> None:
    memory, _ = told(Memory(), growing(NOW, 100))
    for seconds in (10, 20, 59):
        memory, happened = told(memory, growing(NOW + seconds, 100 + seconds))
        assert happened == []
    memory, (event,) = transitions.learn(
        memory,
        growing(NOW + 60, 160)._replace(scope=frozenset({D})),
        diagnosis(growing(NOW + 60, 160)),
        {},
    )
    assert event.event_type == "download_progress"
    assert (event.details["per_second_bytes"], event.details["left_seconds"]) == (1, 840.0)
    assert told(memory, growing(NOW + 61, 161))[1] == []
    assert told(memory, growing(NOW + 120, 220))[1] == ["download_progress"]


def test_of_a_pull_the_last_minute_is_kept_in_steps_of_ten_seconds() -> None:
    memory = Memory()
    for seconds in range(0, 100, 5):
        memory, _ = told(memory, growing(NOW + seconds, seconds))
    samples = memory.downloads[D].samples
    assert [each.at - NOW for each in samples] == [30, 40, 50, 60, 70, 80, 90]
    assert transitions.rate(samples) == 1


def test_a_pull_that_goes_on_begins_its_samples_anew() -> None:
    memory, _ = told(Memory(), growing(NOW, 100))
    stopped = replace(growing(NOW + 20, 100).downloads[0], holders=())
    memory, _ = told(memory, evidence(stopped)._replace(now=NOW + 500))
    memory, _ = told(memory, growing(NOW + 600, 200))
    assert [each.at - NOW for each in memory.downloads[D].samples] == [600]


def test_no_rate_is_reported_where_samples_show_none() -> None:
    one, other = Sample(NOW, 500), Sample(NOW + 10, 200)
    assert transitions.rate(()) is None
    assert transitions.rate((one,)) is None
    assert transitions.rate((one, one)) is None, "a clock that stands"
    assert transitions.rate((other, one)) is None, "a clock that was set back"
    assert transitions.rate((one, other)) == 0, "a pull that began anew"


def test_the_layers_of_one_model_show_one_progress() -> None:
    def two(at: float, arrived: int) -> Evidence:
        (one,) = growing(at, arrived).downloads
        other = replace(one, digest="e" * 64, data=one.data and one.data._replace(inode=6))
        both = tuple(replace(each, models=("llama3:latest",)) for each in (one, other))
        return evidence(*both)._replace(now=at)

    memory, _ = told(Memory(), two(NOW, 100))
    assert told(memory, two(NOW + 60, 200))[1] == ["download_progress"]


def test_a_stall_is_reported_once_and_again_after_bytes_have_come() -> None:
    memory, _ = told(Memory(), growing(NOW, 100))
    stories = []
    for seconds, arrived, written in (
        (60, 100, 60),
        (120, 100, 120),
        (180, 300, 0),
        (240, 300, 60),
    ):
        memory, happened = told(memory, growing(NOW + seconds, arrived, written=written))
        stories.append(happened)
    assert stories == [["download_stalled"], [], ["download_progress"], ["download_stalled"]]


# ---------------------------------------------------------------- models and problems


def models(*stamps: tuple[str, int], **more: object) -> Evidence:
    census = BlobCensus(models={name: (1, at) for name, at in stamps}, **more)  # type: ignore[arg-type]
    return evidence()._replace(census=census)


def test_a_manifest_is_reported_when_it_comes_changes_and_goes() -> None:
    assert story(
        models(("a:1", 1)),
        models(("a:1", 1)),
        models(("a:1", 2), ("b:1", 1)),
        models(("b:1", 1)),
    ) == [[], [], ["manifest_written", "manifest_written"], ["model_removed"]]


def test_a_manifest_that_can_t_be_read_has_not_gone() -> None:
    odd = OddManifest("manifests/x", ManifestFault.CORRUPT, "half", "a:1")
    assert story(models(("a:1", 1)), models(odd_manifests=(odd,)), models(("a:1", 1))) == [
        [],
        ["store_problem"],
        [],
    ]
    assert story(models(("a:1", 1)), models(unlisted=("manifests/x",)))[1] == ["store_problem"]


def test_a_problem_is_reported_once_while_it_lasts() -> None:
    def missing(*digests: str) -> Evidence:
        found = [OddBlob(each * 64, BlobFault.MISSING, 5, None, ("a:1",)) for each in digests]
        return models(("a:1", 1), odd=tuple(found))

    looks = [missing("1", "2"), missing("1", "2"), missing("1", "2", "3"), missing(), missing("1")]
    assert story(*looks) == [["store_problem"], [], ["store_problem"], [], ["store_problem"]]
    event = transitions.learn(Memory(), looks[0], diagnosis(looks[0]), {})[1][0]
    assert (event.details["count"], event.details["kind"]) == (2, "blob_missing")


def with_present(one: Download, end: int, ago: float) -> Evidence:
    trust = Trust(one.trust.claimed, ((0, end),), one.trust.claimed)
    data = entry("data", ago=ago, inode=5)._replace(allocated=end)
    return evidence(replace(one, trust=trust, data=data))


def test_progress_is_when_bytes_arrived_not_when_files_were_touched() -> None:
    memory, _ = told(Memory(), with_present(PAUSED, 60 * MB, ago=9 * DAY))
    memory, _ = told(memory, with_present(PAUSED, 70 * MB, ago=60))
    assert memory.downloads[D].progress_at == NOW - 60


def test_events_name_sizes_and_durations_by_their_units() -> None:
    _, (event, *_) = transitions.learn(Memory(), evidence(PAUSED), diagnosis(evidence(PAUSED)), {})
    assert event.model_name == f"sha256-{D[:12]}"
    assert event.details["total_bytes"] == 200 * MB
    assert event.details["age_seconds"] == 100
    assert "Can resume: True" in event.message


def test_a_refused_act_reports_what_was_in_the_way() -> None:
    action = Action(ActionKind.REMOVE_DOWNLOAD, D, "stale", ())
    refusal = Refusal(RefusalKind.HELD, D, action.kind, "held", "wait")
    event = events.ended(Outcome(action, Result.REFUSED, "held", refusal=refusal), NOW)
    assert (event.event_type, event.details["kind"]) == ("refused", "held")
    assert "kind" not in events.ended(Outcome(action, Result.DONE, "done"), NOW).details


def test_a_scan_that_could_not_read_all_reports_no_new_condition() -> None:
    """A short look takes what is claimed for all that is there."""
    trust = Trust((), ((0, 200 * MB),), ((0, 200 * MB),))
    whole = download(parts=0, claimed=(), trusted=trust.trusted)
    short = replace(whole, trust=Trust(zeros_read=False))
    assert story(evidence(whole), evidence(short), evidence(whole)) == [["partial_found"], [], []]


def test_the_size_of_what_could_not_be_read_is_that_on_the_disk() -> None:
    short = replace(download(), trust=Trust(zeros_read=False))
    seen = evidence(short)
    _, (found, *_) = transitions.learn(Memory(), seen, diagnosis(seen), {})
    assert f"Partial size: {short.allocated} bytes" in found.message
    assert short.allocated > 0


def test_a_pull_that_ends_is_reported_even_by_a_look_that_could_not_read_all() -> None:
    short = replace(PAUSED, trust=Trust(zeros_read=False))
    (_, ended) = story(evidence(LIVE), evidence(short))
    assert ended == ["download_interrupted"]
    memory, _ = told(told(Memory(), evidence(LIVE))[0], evidence(short))
    assert memory.downloads[D].condition is not Condition.LIVE
