"""What holds for every evidence there can be, sensible or not."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.examples import some
from tests.support.runs import rules
from tests.unit.decide.seen import NOW, diagnosis
from watcher.decide import diagnose, plan, transitions
from watcher.model import (
    DAY,
    BlobCensus,
    Condition,
    Download,
    Entry,
    Evidence,
    Holder,
    Kind,
    Located,
    ManifestFault,
    OddManifest,
    Part,
    Place,
    Plan,
    Server,
    ServerState,
    Sidecar,
    Trust,
    View,
    Visibility,
)
from watcher.ollama.ranges import normal
from watcher.state.memory import Memory

DIGESTS = st.sampled_from([letter * 64 for letter in "abcd"])
POLICY = rules(clean=True, repair=False)
AGO = st.sampled_from(
    [-DAY, -1.0, 0.0, 1.0, 60.0, 89.0, 91.0, 1800.0, 3601.0, 2 * DAY, 8 * DAY, 400 * DAY]
)
RANGES = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=3).map(normal)


@st.composite
def entries(draw: st.DrawFn, name: str) -> Entry:
    then = round((NOW - draw(AGO)) * 1e9)
    kind = draw(st.sampled_from([Kind.FILE] * 9 + list(Kind)))
    size = draw(st.integers(0, 20))
    links = draw(st.integers(1, 2))
    return Entry(
        name, kind, size, 4096, 1, draw(st.integers(1, 99)), links, then, then, 0, 0, 0o644
    )


@st.composite
def downloads(draw: st.DrawFn) -> Download:
    digest = draw(DIGESTS)
    count = draw(st.integers(0, 3))
    sidecars = tuple(
        Sidecar(draw(entries(f"sha256-{digest}-partial-{n}")), n, Part(n, n, 1, 0), None)
        for n in range(count)
    )
    transfer = draw(st.booleans()) and not sidecars
    tail = ".tmp" if transfer else "-partial"
    data = (
        draw(st.none() | entries(f"sha256-{digest}{tail}"))
        if sidecars
        else draw(entries(f"sha256-{digest}{tail}"))
    )
    holders = draw(
        st.lists(
            st.builds(Holder, st.just(5), st.just("x"), st.just("y"), st.booleans()), max_size=2
        )
    )
    return Download(
        digest=digest,
        data=data,
        sidecars=sidecars,
        transfer=transfer,
        finished=draw(st.none() | entries(f"sha256-{digest}")),
        total=draw(st.none() | st.integers(0, 20)),
        faults=draw(st.sampled_from([(), (), ("something",)])),
        trust=Trust(draw(RANGES), draw(RANGES), draw(RANGES)),
        holders=tuple(holders),
        progress_at=draw(st.none() | AGO.map(lambda ago: NOW - ago)),
        unreadable=draw(st.sampled_from([None, None, None, "Input/output error"])),
    )  # fmt: skip


SERVERS = st.builds(
    Server, st.just(7), st.just("ollama"), st.just(NOW - 100), st.sampled_from(ServerState),
    ours=st.sampled_from([True, None]), connections=st.sampled_from([None, 0, 1]),
)  # fmt: skip
PLACES = st.builds(
    Place, st.just("/models"), st.just("--store"), blobs_elsewhere=st.booleans(),
    globbed=st.booleans(), read_only=st.booleans(),
)  # fmt: skip


@st.composite
def censuses(draw: st.DrawFn) -> BlobCensus:
    names = draw(st.sets(DIGESTS, max_size=3))
    odd = draw(st.lists(st.sampled_from(ManifestFault), max_size=1))
    return BlobCensus(
        manifests=draw(st.integers(0, 2)),
        unnamed=tuple(draw(entries(f"sha256-{name}")) for name in sorted(names)),
        temporaries=tuple(
            Located(f"blobs/{name}", draw(entries(name)))
            for name in draw(st.sets(st.sampled_from(["COPY1", "COPY2"])))
        ),
        odd_manifests=tuple(OddManifest("manifests/a/b/c/d", fault, "why") for fault in odd),
        unlisted=tuple(draw(st.lists(st.just("manifests/x"), max_size=1))),
    )


EVIDENCE = st.builds(
    partial(Evidence),  # of a bare named tuple it would make up all other fields
    place=PLACES | st.just(Place("/models", "--store")),
    now=st.just(NOW),
    view=st.sampled_from(Visibility).map(lambda visibility: View(visibility, (), "why")),
    servers=st.lists(SERVERS, max_size=1).map(tuple),
    others=st.lists(st.just("ollama (9)"), max_size=1).map(tuple),
    downloads=st.lists(downloads(), max_size=3, unique_by=lambda each: each.key).map(tuple),
    census=censuses(),
    scope=st.none() | st.frozensets(DIGESTS),
)


Acts = set[tuple[str, str]]


def planned(seen: Evidence) -> Plan:
    return plan.make(diagnose.diagnose(seen, POLICY), seen, POLICY)


@settings(max_examples=some(300))
@given(EVIDENCE, SERVERS, st.floats(0, 9 * DAY))
def test_what_holds_for_all_evidence(seen: Evidence, server: Server, ago: float) -> None:
    """To make up the evidence costs most of the time, so all laws look at the same one."""
    made = planned(seen)
    each_download_gets_one_condition_and_nothing_raises(seen)
    a_download_with_a_writer_is_live_and_untouched(seen, made)
    names_go_only_where_all_that_must_hold_holds(seen, made)
    done = acts(seen)
    less_visibility_is_never_more_daring(seen)
    one_more_at_work_is_never_more_daring(seen, done, server)
    a_change_is_never_more_daring(seen, done, ago)
    a_narrow_look_plans_no_more_than_a_whole_one(seen)


def each_download_gets_one_condition_and_nothing_raises(seen: Evidence) -> None:
    told_of = diagnosis(seen, POLICY)
    assert [each.download for each in told_of.diagnosed] == list(seen.downloads)
    assert all(isinstance(each.condition, Condition) for each in told_of.diagnosed)
    assert all(each.message and each.path is not None for each in told_of.findings)
    made = plan.make(told_of.diagnosed, seen, POLICY)
    assert all(each.why and each.remedy for each in made.refusals)
    memory, told = transitions.learn(Memory(), seen, told_of, {})
    assert all(event.line for event in told)
    again, told = transitions.learn(memory, seen, told_of, {})
    assert not told, "the same look has nothing new to tell"
    assert again.downloads.keys() == memory.downloads.keys()


def a_download_with_a_writer_is_live_and_untouched(seen: Evidence, made: Plan) -> None:
    touched = {entry.name for action in made.actions for entry in action.expects}
    for diagnosed in diagnose.diagnose(seen, POLICY):
        one = diagnosed.download
        if one.writers:
            assert diagnosed.condition is Condition.LIVE
        if one.holders or diagnosed.condition in (Condition.LIVE, Condition.UNKNOWN):
            assert not touched & {entry.name for entry in one.entries}


def names_go_only_where_all_that_must_hold_holds(seen: Evidence, made: Plan) -> None:
    if not made.actions:
        return
    assert not seen.place.read_only
    assert not seen.place.blobs_elsewhere
    assert all(server.state is not ServerState.STARTING for server in seen.servers)
    assert not (seen.place.globbed and seen.servers)
    census = {each.name for each in seen.census.unnamed}
    census |= {each.entry.name for each in seen.census.temporaries}
    for action in made.actions:
        newest = max(entry.mtime for entry in action.expects)
        assert NOW - newest >= (90 if seen.view.visibility is Visibility.FULL else 3600)
        if {entry.name for entry in action.expects} & census:
            assert seen.scope is None
            assert not seen.servers
            assert not seen.others
            assert seen.view.visibility is not Visibility.PARTIAL
        if "orphan" in action.kind.value:
            assert seen.census.manifests
            assert not seen.census.unlisted
            blind = {ManifestFault.CORRUPT, ManifestFault.UNREADABLE, ManifestFault.DANGLING}
            assert not blind & {each.fault for each in seen.census.odd_manifests}


def acts(seen: Evidence) -> Acts:
    return {(action.kind.value, action.subject) for action in planned(seen).actions}


def less_visibility_is_never_more_daring(seen: Evidence) -> None:
    by_sight = [acts(seen._replace(view=View(visibility, (), "why"))) for visibility in Visibility]
    full, named, partial = by_sight
    assert partial <= named <= full


def one_more_at_work_is_never_more_daring(seen: Evidence, done: Acts, server: Server) -> None:
    assert acts(seen._replace(servers=(*seen.servers, server))) <= done
    assert acts(seen._replace(others=(*seen.others, "ollama (5)"))) <= done
    held = tuple(
        replace(each, holders=(*each.holders, Holder(5, "x", "y", writes=False)))
        for each in seen.downloads
    )
    assert acts(seen._replace(downloads=held)) <= done


def a_change_is_never_more_daring(seen: Evidence, done: Acts, ago: float) -> None:
    """Touching the data of a download takes acts on it away, and adds none."""
    then = round((NOW - ago) * 1e9)
    touched = tuple(
        replace(each, data=each.data._replace(mtime_ns=max(then, each.data.mtime_ns)))
        if each.data is not None
        else each
        for each in seen.downloads
    )
    assert acts(seen._replace(downloads=touched)) <= done


def a_narrow_look_plans_no_more_than_a_whole_one(seen: Evidence) -> None:
    narrow = acts(seen._replace(scope=frozenset(each.digest for each in seen.downloads)))
    assert narrow <= acts(seen._replace(scope=None))
