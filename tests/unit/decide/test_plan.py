"""What is planned, what is refused, and what would make it possible."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.support.runs import changed, rules
from watcher.decide import blob_findings, cleaning, diagnose, plan, safety
from watcher.model import (
    DAY,
    HOUR,
    ActionKind,
    Blind,
    BlobCensus,
    BlobFault,
    Caller,
    Download,
    Entry,
    Evidence,
    ForeignLink,
    Kept,
    Located,
    ManifestFault,
    OddBlob,
    OddManifest,
    Place,
    Plan,
    RefusalKind,
    Rules,
    Server,
    ServerState,
    View,
    Visibility,
)

from .seen import CLEANING, MB, NOW, D, download, entry, evidence, server, writer

OLD = 9 * DAY


def planned(seen: Evidence) -> Plan:
    return plan.make(diagnose.diagnose(seen, CLEANING), seen, CLEANING)


def refusals(seen: Evidence) -> list[RefusalKind]:
    made = planned(seen)
    assert not made.actions
    assert all(each.why and each.remedy for each in made.refusals)
    return [each.kind for each in made.refusals]


def test_a_stale_download_goes_as_a_whole() -> None:
    one = download(ago=OLD)
    (action,) = planned(evidence(one)).actions
    assert action.kind is ActionKind.REMOVE_DOWNLOAD
    assert set(action.expects) == set(one.entries)
    assert action.frees == one.freed


def kept(label: str, *, ago: float, size: int, replaced: bool) -> Kept:
    found = entry(label, ago=ago, size=size)._replace(allocated=size)
    return Kept(label, label, found, replaced, there=found if replaced else None)


def purged(policy: Rules, *things: Kept) -> list[str]:
    seen = evidence()._replace(quarantine=things)
    made = plan.make(diagnose.diagnose(seen, policy), seen, policy)
    assert {each.kind for each in made.actions} <= {ActionKind.PURGE}
    return [each.subject for each in made.actions]


def test_nothing_leaves_quarantine_before_a_good_one_has_replaced_it() -> None:
    service = changed(CLEANING, quarantine_keep=30 * DAY, quarantine_max_bytes=100)
    alone = kept("1-a", ago=999 * DAY, size=10_000, replaced=False)
    assert purged(service, alone) == []
    assert purged(changed(service, purge_replaced=True), alone) == []


def test_a_service_purges_what_is_old_or_too_much_the_oldest_first() -> None:
    service = changed(CLEANING, quarantine_keep=30 * DAY, quarantine_max_bytes=100)
    old = kept("1-a", ago=31 * DAY, size=10, replaced=True)
    new = kept("2-b", ago=3 * DAY, size=10, replaced=True)
    assert purged(service, old, new) == ["1-a"]
    large, larger = (kept(f"{n}-c", ago=(9 - n) * DAY, size=60, replaced=True) for n in (3, 4))
    assert purged(service, new, large, larger) == ["3-c"]
    assert purged(changed(service, clean=False), old) == []


@pytest.mark.parametrize(
    ("free", "reserve", "refused"), [(59, 0, True), (60, 0, False), (99, 40, True)]
)
def test_without_room_for_it_nothing_is_fetched(free: int, reserve: int, refused: bool) -> None:
    odd = OddBlob(D, BlobFault.MISSING, 60, None, ("llama3:latest",), registry=60, asked=True)
    seen = evidence(place=Place("/models", "--store", free_bytes=free, reserve_bytes=reserve))
    seen = seen._replace(census=BlobCensus(odd=(odd,)))
    made = plan.make((), seen, rules(fetch=True))
    assert [each.kind for each in made.actions] == ([] if refused else [ActionKind.FETCH_CHUNKS])
    for refusal in made.refusals:
        assert (refusal.kind, refusal.action) == (RefusalKind.ROOM, ActionKind.FETCH_CHUNKS)
        assert (
            refusal.why
            == "it needs 60 bytes, and the disk has only 59 bytes free beside the reserve"
        )
        assert refusal.remedy.startswith("free space")
        assert refusal.command.endswith("--store /models df")
    assert len(made.refusals) == refused


def test_a_damaged_blob_without_a_model_has_its_next_step_in_words() -> None:
    blob = entry(f"sha256-{D}", size=60)._replace(sha256="0" * 64)
    odd = OddBlob(D, BlobFault.CORRUPT, None, blob, ())
    seen = evidence()._replace(census=BlobCensus(odd=(odd,)))
    (finding,) = blob_findings.of_blobs(seen, (), rules(), None)
    assert (finding.command, finding.remedy[:19]) == ("", "no model names it: ")


def test_a_full_quarantine_takes_nothing_more() -> None:
    blob = entry(f"sha256-{D}", size=60)._replace(allocated=60, sha256="0" * 64)
    odd = OddBlob(D, BlobFault.CORRUPT, 60, blob, ("llama3:latest",), registry=60)
    policy = rules(quarantine_max_bytes=100)
    for held, verbs in ((0, [ActionKind.QUARANTINE_BLOB]), (50, [])):
        seen = evidence(census=BlobCensus(odd=(odd,), manifests=1))._replace(
            quarantine=(kept("1-a", ago=DAY, size=held, replaced=False),),
        )
        made = plan.make(diagnose.diagnose(seen, policy), seen, policy)
        assert [each.kind for each in made.actions] == verbs
        assert [each.kind for each in made.refusals] == [RefusalKind.ROOM] * (not verbs)


def test_no_more_goes_than_the_wanted_room_takes_the_oldest_and_largest_first() -> None:
    seen = evidence(
        download(ago=9 * DAY),
        census=BlobCensus(
            manifests=1,
            unnamed=tuple(
                entry(f"sha256-{'1' * 63}{n}", ago=ago, size=size)._replace(allocated=size)
                for n, ago, size in (
                    (1, 30 * DAY + HOUR, 10),
                    (2, 30 * DAY, 40),
                    (3, 8 * DAY, 1000),
                )
            ),
        ),
    )
    seen = seen._replace(place=seen.place._replace(free_bytes=5))
    made = planned(seen)
    assert len(made.actions) == 4
    for wanted, last in ((0, ""), (5, ""), (6, "2"), (45, "2"), (46, "21"), (55, "21")):
        chosen = cleaning.until_free(made, wanted)
        subjects = {each.subject for each in chosen.actions}
        assert subjects == {f"sha256-{'1' * 63}{digit}" for digit in last}, wanted
    assert cleaning.until_free(made, 10**15).actions == made.actions


def test_a_download_is_as_old_as_its_last_change() -> None:
    one = download(ago=40 * DAY)
    last = one.sidecars[1]._replace(entry=entry(one.sidecars[1].entry.name, ago=OLD))
    one = replace(one, sidecars=(one.sidecars[0], last))
    made = planned(evidence(one, census=orphans(entry(f"sha256-{'a' * 64}", ago=20 * DAY))))
    assert len(made.actions) == 2
    (first,) = cleaning.until_free(made, made.free + 1).actions
    assert first.kind is ActionKind.REMOVE_ORPHAN


def test_until_free_skips_an_orphan_whose_removal_frees_nothing() -> None:
    made = planned(evidence(census=orphans(ORPHAN._replace(links=2, allocated=5 * MB))))
    assert made.actions
    assert cleaning.until_free(made, 10**15).actions == ()


def test_a_download_that_is_not_stale_stays_and_is_due_when_it_becomes_stale() -> None:
    made = planned(evidence(download(ago=2 * DAY)))
    assert (made.actions, made.refusals) == ((), ())
    assert made.due == ((NOW + 5 * DAY, D, "becomes stale"),)


def test_a_server_that_runs_is_given_time_to_meet_the_guard() -> None:
    (action,) = planned(evidence(download(ago=OLD), servers=(server(),))).actions
    assert action.wait_seconds >= 2.0


@pytest.mark.parametrize(
    ("one", "more", "kind"),
    [
        (replace(download(ago=OLD), holders=(writer(writes=False),)), {}, RefusalKind.HELD),
        (
            download(ago=OLD),
            {"servers": (server(state=ServerState.STARTING),)},
            RefusalKind.SERVER_STARTS,
        ),
        (
            download(ago=OLD),
            {"place": Place("/m", "x", foreign=ForeignLink("/m/blobs", 1, "/t", 2))},
            RefusalKind.OWNER,
        ),
        (download(ago=OLD), {"place": Place("/m", "x", blobs_elsewhere=True)}, RefusalKind.LINKED),
        (download(ago=OLD), {"place": Place("/m", "x", read_only=True)}, RefusalKind.PERMISSION),
        (
            download(ago=OLD),
            {"place": Place("/m[", "x", globbed=True), "servers": (server(),)},
            RefusalKind.SERVER_RUNS,
        ),
        (replace(download(ago=10), progress_at=NOW - OLD), {}, RefusalKind.NOT_QUIET),
        (
            replace(download(ago=1800), progress_at=NOW - OLD),
            {"visibility": Visibility.NAMED},
            RefusalKind.SIGHT,
        ),
        (
            replace(download(ago=1800), progress_at=NOW - OLD),
            {"visibility": Visibility.PARTIAL},
            RefusalKind.SIGHT,
        ),
        (
            download(ago=OLD, parts=0, claimed=(), trusted=()),
            {"servers": (server(connections=1),)},
            RefusalKind.SERVER_RUNS,
        ),
        (
            download(ago=OLD, parts=0, claimed=(), trusted=()),
            {"servers": (server(connections=None),)},
            RefusalKind.SERVER_RUNS,
        ),
        (download(ago=OLD, finished=entry("x", size=200 * MB)), {}, RefusalKind.UNPROVEN),
    ],
)
def test_each_refusal(one: Download, more: dict[str, Any], kind: RefusalKind) -> None:
    assert refusals(evidence(one, **more)) == [kind]


@pytest.mark.parametrize(
    ("one", "more"),
    [
        (replace(download(ago=100), progress_at=NOW - OLD), {}),
        (replace(download(ago=HOUR), progress_at=NOW - OLD), {"visibility": Visibility.NAMED}),
        (replace(download(ago=HOUR), progress_at=NOW - OLD), {"visibility": Visibility.PARTIAL}),
        (download(ago=OLD, parts=0, claimed=(), trusted=()), {"servers": (server(),)}),
        (download(ago=OLD), {"place": Place("/m[", "x", globbed=True)}),
    ],
)
def test_the_refused_action_is_planned_if_nothing_is_in_its_way(
    one: Download, more: dict[str, Any]
) -> None:
    assert len(planned(evidence(one, **more)).actions) == 1


@pytest.mark.parametrize(
    ("visibility", "servers", "ago", "refused"),
    [
        (Visibility.FULL, (), 1, None),
        (Visibility.NAMED, (), 1, None),
        (Visibility.FULL, (server(),), 89, RefusalKind.NOT_QUIET),
        (Visibility.FULL, (server(),), 91, None),
        (Visibility.NAMED, (server(),), 89, RefusalKind.NOT_QUIET),
        (Visibility.NAMED, (server(),), 91, None),
        (Visibility.PARTIAL, (), 89, RefusalKind.NOT_QUIET),
        (Visibility.PARTIAL, (), HOUR - 1, RefusalKind.SIGHT),
        (Visibility.PARTIAL, (), HOUR + 1, None),
    ],
)
def test_progress_files_wait_for_quiet_as_the_visibility_demands(
    visibility: Visibility, servers: tuple[Server, ...], ago: float, refused: RefusalKind | None
) -> None:
    behind = download(ago=ago, claimed=(), trusted=((0, 50 * MB),))
    seen = evidence(behind, visibility=visibility, servers=servers)
    policy = rules(repair=True)
    made = plan.make(diagnose.diagnose(seen, policy), seen, policy)
    written = [each for each in made.actions if each.kind is ActionKind.WRITE_SIDECARS]
    assert [each.kind for each in made.refusals] == ([refused] if refused else [])
    assert len(written) == (refused is None)


def test_no_times_are_set_where_nothing_can_be_written() -> None:
    policy, one = rules(refresh=True), download(ago=HOUR)
    for place, wanted in ((Place("/m", "x"), 1), (Place("/m", "x", read_only=True), 0)):
        seen = evidence(one, place=place)
        actions = plan.make(diagnose.diagnose(seen, policy), seen, policy).actions
        assert len([each for each in actions if each.kind is ActionKind.REFRESH]) == wanted


def test_a_refusal_that_passes_says_when_and_is_due_then() -> None:
    seen = evidence(replace(download(ago=10), progress_at=NOW - OLD))
    (refusal,) = planned(seen).refusals
    assert refusal.seconds_left == 80
    assert (NOW + 80, D, "") in planned(seen).due


@pytest.mark.parametrize(
    "one",
    [
        download(ago=OLD, unreadable="Input/output error"),
        replace(download(ago=OLD), holders=(writer(),)),
    ],
)
def test_an_unknown_or_live_download_is_left(one: Download) -> None:
    assert planned(evidence(one)).actions == ()


def test_of_a_redundant_download_only_surplus_sidecars_go() -> None:
    one = download(ago=OLD, data=False, claimed=(), trusted=(), finished=entry("x", size=200 * MB))
    (action,) = planned(evidence(one)).actions
    assert action.kind is ActionKind.REMOVE_SURPLUS
    assert {each.name for each in action.expects} == {each.entry.name for each in one.sidecars}


ORPHAN = entry(f"sha256-{'a' * 64}", ago=OLD)


def orphans(*entries: Entry, odd: ManifestFault | None = None, **more: Any) -> BlobCensus:
    faults = (OddManifest("manifests/h/n/m/t", odd, "why", "h/n/m:t", NOW - HOUR),) if odd else ()
    given: dict[str, Any] = {
        "unnamed": entries or (ORPHAN,),
        "manifests": 1,
        "odd_manifests": faults,
    }
    return BlobCensus(**{**given, **more})


def test_an_old_orphan_goes_and_a_young_one_stays() -> None:
    young = entry(f"sha256-{'b' * 64}", ago=DAY)
    (action,) = planned(evidence(census=orphans(ORPHAN, young))).actions
    assert (action.kind, action.expects) == (ActionKind.REMOVE_ORPHAN, (ORPHAN,))


@pytest.mark.parametrize(
    ("census", "more", "kind"),
    [
        (orphans(odd=ManifestFault.CORRUPT), {}, RefusalKind.MANIFESTS),
        (orphans(odd=ManifestFault.UNREADABLE), {}, RefusalKind.MANIFESTS),
        (orphans(odd=ManifestFault.DANGLING), {}, RefusalKind.MANIFESTS),
        (orphans(unlisted=("manifests/h",)), {}, RefusalKind.MANIFESTS),
        (orphans(manifests=0), {}, RefusalKind.MANIFESTS),
        (orphans(), {"servers": (server(),)}, RefusalKind.SERVER_RUNS),
        (orphans(), {"servers": (server(ours=None),)}, RefusalKind.SERVER_RUNS),
        (orphans(), {"others": ("ollama (9)",)}, RefusalKind.SERVER_RUNS),
        (orphans(), {"visibility": Visibility.PARTIAL}, RefusalKind.SIGHT),
        (orphans(), {"place": Place("/m", "x", blobs_elsewhere=True)}, RefusalKind.LINKED),
        (orphans(), {"place": Place("/m", "x", read_only=True)}, RefusalKind.PERMISSION),
    ],
)
def test_no_orphan_goes_while_something_may_name_it(
    census: BlobCensus, more: dict[str, Any], kind: RefusalKind
) -> None:
    assert refusals(evidence(census=census, **more)) == [kind]


def test_a_narrow_look_plans_no_orphans_and_no_left_overs() -> None:
    left = Located("blobs/COPY1", entry("COPY1", ago=OLD))
    seen = evidence(census=orphans(temporaries=(left,)))
    assert len(planned(seen).actions) == 2
    assert planned(seen._replace(scope=frozenset({D}))).actions == ()


@pytest.mark.parametrize(
    ("ago", "more", "goes"),
    [
        (2 * HOUR, {}, True),
        (HOUR / 2, {}, False),
        (2 * HOUR, {"servers": (server(),)}, False),
        (2 * HOUR, {"others": ("ollama create (9)",)}, False),
        (2 * HOUR, {"visibility": Visibility.PARTIAL}, False),
    ],
)
def test_left_overs_of_create(ago: float, more: dict[str, Any], goes: bool) -> None:
    left = Located("blobs/COPY1", entry("COPY1", ago=ago))
    seen = evidence(census=BlobCensus(manifests=1, temporaries=(left,)), **more)
    assert len(planned(seen).actions) == goes


def test_an_orphan_with_a_hard_link_frees_nothing() -> None:
    linked = ORPHAN._replace(links=2, allocated=5 * MB)
    assert planned(evidence(census=orphans(linked))).frees == 0


def test_live_downloads_are_due_when_their_quiet_ends_and_held_ones_each_minute() -> None:
    silent = evidence(download(ago=30), servers=(server(),))
    assert planned(silent).due == ((NOW + 60, D, "counts as interrupted"),)
    held = evidence(replace(download(ago=30), holders=(writer(),)), servers=(server(),))
    assert planned(held).due == ((NOW + 60, D, ""),)


@pytest.mark.parametrize("patient", [True, False])
@pytest.mark.parametrize("servers", [(), (server(),)])
def test_a_service_mends_nothing_while_another_download_is_live(
    patient: bool, servers: tuple[Server, ...]
) -> None:
    """It may be a layer of that pull, whose turn comes."""
    broken = download(claimed=(), trusted=((0, 50 * MB),))
    policy = rules(repair=True, patient=patient)
    seen = evidence(broken, servers=servers, pulling=frozenset({"ab" * 32}))
    made = plan.make(diagnose.diagnose(seen, policy), seen, policy)
    if patient and servers:
        assert [each.kind for each in made.refusals] == [RefusalKind.LIVE]
        assert made.actions == ()
        assert made.due[0].at == pytest.approx(NOW + 60)
    else:
        assert [each.kind for each in made.actions] == [ActionKind.WRITE_SIDECARS]
    alone = evidence(broken, servers=servers, pulling=frozenset({D}))
    made = plan.make(diagnose.diagnose(alone, policy), alone, policy)
    assert [each.kind for each in made.actions] == [ActionKind.WRITE_SIDECARS]


@pytest.mark.parametrize("uid", [0, 1000])
@pytest.mark.parametrize("blind", Blind)
def test_sudo_is_printed_for_others_than_root_and_only_where_it_helps(
    blind: Blind, uid: int
) -> None:
    by = Caller(uid, ("ollama-watch",), ("ollama-watch",))
    seen = evidence(view=View(Visibility.PARTIAL, blind=blind), caller=by)
    assert ("as root" in safety.sees_more(seen)) is (blind is Blind.USERS and uid != 0)
