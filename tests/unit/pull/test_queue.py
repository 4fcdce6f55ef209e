"""The queue: what people write, what they do with it, and what a runner does."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from watcher.errors import TargetError
from watcher.pull import queue
from watcher.pull.queue import Driven, Item, ItemState, Queue, Result, Runner

NOW = 1_700_000_000.0
HOUR = 3600.0
ME, OTHER = Runner(10, 1), Runner(11, 1)


def line(kept: Queue) -> list[str]:
    return [item.model.removesuffix(":latest") for item in kept.line]


def added(*models: str, level: int = 0, kept: Queue | None = None, now: float = NOW) -> Queue:
    kept = Queue() if kept is None else kept
    for number, model in enumerate(models):
        kept = queue.add(kept, model, level, 0.0, now + number)
    return kept


def at(kept: Queue, model: str) -> Item:
    return kept.line[queue.position(kept, f"{model}:latest")]


def taken(kept: Queue, now: float = NOW + 100, runner: Runner = ME) -> tuple[Queue, Item]:
    after, item = queue.take(kept, runner, now)
    assert item is not None
    return after, item


def failed(kept: Queue, why: str = "no network", *, retry: bool = True, now: float = NOW) -> Queue:
    kept, item = taken(kept, now)
    return queue.ended(kept, item, Driven(Result.FAILED, why, retry), now, 0.5)


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("text", "number"),
    [("high", 10), ("Normal", 0), (" low ", -10), ("7", 7), ("+7", 7), ("-100", -100)],
)  # fmt: skip
def test_priorities(text: str, number: int) -> None:
    assert queue.priority(text) == number


@pytest.mark.parametrize(
    "text", ["", "urgent", "101", "-101", "1.5", "1e1", "--1", "٣", "0x1", "9999"]
)
def test_an_invalid_priority_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="want high, normal, low or a number from -100 to 100"):
        queue.priority(text)


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A zone with summer time, written out so that no data of zones are needed."""
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def local(text: str) -> float:
    return time.mktime(time.strptime(text, "%Y-%m-%d %H:%M"))


@pytest.mark.usefixtures("berlin")
@pytest.mark.parametrize(
    ("now", "clock", "then"),
    [
        ("2026-06-10 09:00", "22:00", "2026-06-10 22:00"),
        ("2026-06-10 23:00", "22:00", "2026-06-11 22:00"),
        ("2026-06-10 22:00", "22:00", "2026-06-11 22:00"),
        ("2026-12-31 23:00", "7:05", "2027-01-01 07:05"),
        # The nights with 23 and 25 hours.
        ("2026-03-28 23:00", "22:00", "2026-03-29 22:00"),
        ("2026-10-24 23:00", "22:00", "2026-10-25 22:00"),
        ("2026-03-28 23:00", "06:00", "2026-03-29 06:00"),
    ],
)
def test_the_next_time_that_the_clock_shows(now: str, clock: str, then: str) -> None:
    assert queue.next_time(clock, local(now)) == local(then)


@pytest.mark.usefixtures("berlin")
def test_a_time_that_a_night_does_not_have_is_still_in_that_night() -> None:
    found = queue.next_time("02:30", local("2026-03-28 23:00"))
    assert local("2026-03-29 01:00") < found < local("2026-03-29 04:00")


@pytest.mark.parametrize("text", ["", "22", "24:00", "22:60", "22:00:00", "-1:00", "10pm", "٢٢:00"])
def test_an_invalid_time_of_day_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="want a time of day such as 22:00"):
        queue.next_time(text, NOW)


# ---------------------------------------------------------------- the line


def test_first_in_first_out_and_higher_first() -> None:
    kept = added("a", "b", "c")
    kept = added("urgent", level=10, kept=kept, now=NOW + 50)
    kept = added("whenever", level=-10, kept=kept, now=NOW + 50)
    kept = added("d", kept=kept, now=NOW + 60)
    assert line(kept) == ["urgent", "a", "b", "c", "d", "whenever"]


def test_an_item_that_waits_long_goes_ahead_of_a_later_one() -> None:
    kept = added("low", level=-10)
    assert line(added("fresh", kept=kept, now=NOW + 9 * HOUR)) == ["fresh", "low"]
    assert line(added("fresh", kept=kept, now=NOW + 11 * HOUR)) == ["low", "fresh"]
    assert line(added("high", level=10, kept=kept, now=NOW + 19 * HOUR)) == ["high", "low"]
    assert line(added("high", level=10, kept=kept, now=NOW + 21 * HOUR)) == ["low", "high"]


def test_an_item_gains_no_rank_before_its_start_time() -> None:
    kept = queue.add(Queue(), "night", 0, NOW + 10 * HOUR, NOW)
    kept = added("day", kept=kept, now=NOW + 9 * HOUR)
    assert line(kept) == ["day", "night"]
    assert queue.take(kept, ME, NOW + 9 * HOUR)[1] == at(taken(kept, NOW + 9 * HOUR)[0], "day")
    kept = queue.remove(kept, ["day"])
    assert queue.take(kept, ME, NOW + 10 * HOUR - 1) == (kept, None)
    assert taken(kept, NOW + 10 * HOUR)[1].model == "night:latest"


@pytest.mark.parametrize("spelled", ["A", "a:latest", "registry.ollama.ai/library/a"])
def test_added_again_it_takes_the_new_priority_and_keeps_its_time(spelled: str) -> None:
    kept = added("a", "b", "c")
    again = queue.add(kept, spelled, 5, 0.0, NOW + HOUR)
    assert line(again) == ["a", "b", "c"]
    assert (at(again, "a").priority, at(again, "a").added_at) == (5, NOW)
    assert line(queue.add(again, spelled, -1, 0.0, NOW + HOUR)) == ["b", "c", "a"]


def test_added_again_what_rests_waits_and_what_runs_runs() -> None:
    kept = failed(added("a"), retry=False)
    kept = queue.add(kept, "a", 0, 0.0, NOW + 5)
    assert (at(kept, "a").state, at(kept, "a").so_far.tries) == (ItemState.WAITING, 0)
    assert [each.why for each in at(kept, "a").so_far.reasons] == ["no network"]
    kept = queue.add(queue.pause(kept, ["a"], NOW), "a", 0, 0.0, NOW)
    assert at(kept, "a").state is ItemState.WAITING
    kept, _ = taken(kept)
    kept = queue.add(kept, "a", 3, NOW + HOUR, NOW)
    assert (at(kept, "a").state, at(kept, "a").priority) == (ItemState.RUNNING, 3)


def test_a_finished_model_can_be_added_again() -> None:
    kept, item = taken(added("a"))
    kept = queue.ended(kept, item, Driven(Result.DONE), NOW + 200, 0.5)
    assert (line(kept), [each.model for each in kept.done]) == ([], ["a:latest"])
    kept = added("a", kept=kept)
    assert (line(kept), kept.done) == (["a"], ())


def test_an_invalid_model_name_is_not_added() -> None:
    with pytest.raises(TargetError, match="a b"):
        added("a b")


def test_taken_out() -> None:
    kept, item = taken(added("a", "b", "c"))
    kept = queue.ended(kept, item, Driven(Result.DONE), NOW, 0.5)
    assert queue.remove(kept, ["A", "c"]) == Queue(line=(at(kept, "b"),))


@pytest.mark.parametrize("act", ["remove", "move", "pause", "resume"])
def test_an_unknown_model_is_reported_with_the_nearest_name(act: str) -> None:
    def do(kept: Queue) -> Queue:
        if act == "move":
            return queue.move(kept, "lama3", 1)
        more = () if act == "remove" else (NOW,)
        return getattr(queue, act)(kept, ["b", "lama3"], *more)  # type: ignore[no-any-return]

    with pytest.raises(TargetError, match="not in the queue: lama3") as told:
        do(added("llama3", "llama3:8b", "b"))
    assert told.value.next_step == "did you mean llama3:8b, llama3:latest?"
    with pytest.raises(TargetError) as told:
        do(added("b"))
    assert told.value.next_step == "it has b:latest"
    with pytest.raises(TargetError, match="not in the queue") as told:
        do(Queue()) if act == "move" else queue.remove(Queue(), ["x"])
    assert told.value.next_step == "the queue is empty"


@pytest.mark.parametrize(
    ("model", "to", "then"),
    [
        ("c", 1, "cabd"), ("a", 4, "bcda"), ("a", 99, "bcda"), ("b", 3, "acbd"),
        ("b", 2, "abcd"), ("d", 2, "adbc"), ("a", 1, "abcd"), ("d", 4, "abcd"),
    ],
)  # fmt: skip
def test_moved(model: str, to: int, then: str) -> None:
    kept = queue.move(added("a", "b", "c", "d"), model, to)
    assert line(kept) == list(then)
    ranks = [item.rank for item in kept.line]
    assert ranks == sorted(ranks)
    # It keeps its place among those that come later.
    assert line(added("e", kept=kept, now=NOW + 100)) == [*then, "e"]


# ---------------------------------------------------------------- pausing


def test_paused_models_are_passed_over_until_they_are_resumed() -> None:
    kept = queue.pause(added("a", "b"), ["a"], NOW)
    assert taken(kept)[1].model == "b:latest"
    assert queue.next_due(queue.pause(kept, ["b"], NOW)) is None
    kept = queue.resume(kept, ["a", "b"], NOW)
    assert taken(kept)[1].model == "a:latest"
    assert queue.resume(kept, ["b"], NOW) is kept


def test_a_paused_queue_begins_nothing_and_what_comes_later_waits_too() -> None:
    kept = queue.pause(added("a"), (), NOW)
    kept = added("b", kept=kept)
    assert queue.take(kept, ME, NOW + 100) == (kept, None)
    assert queue.next_due(kept) is None
    kept = queue.resume(kept, (), NOW)
    assert taken(kept)[1].model == "a:latest"


# ---------------------------------------------------------------- running


def test_the_first_that_is_due_runs_and_is_not_taken_twice() -> None:
    kept, first = taken(added("a", "b"))
    assert (first.model, first.state, first.so_far.runner) == ("a:latest", ItemState.RUNNING, ME)
    kept, second = taken(kept, runner=OTHER)
    assert second.model == "b:latest"
    assert queue.take(kept, ME, NOW + 100)[1] is None


def test_a_failed_one_comes_again_later_each_time_and_at_its_place() -> None:
    kept, now, pauses = added("a", "b"), NOW, []
    for tries in range(1, 12):
        kept = failed(kept, now=now)
        item = at(kept, "a")
        assert (item.state, item.so_far.tries) == (ItemState.FAILED, tries)
        assert item.ready_at is not None
        pauses.append(item.ready_at - now)
        assert line(kept) == ["a", "b"]
        assert taken(kept, item.ready_at - 1)[1].model == "b:latest"
        now = item.ready_at
    assert pauses[:4] == [30, 60, 120, 240]
    assert pauses[-1] == 3600
    assert len(at(kept, "a").so_far.reasons) == 10


def test_chance_spreads_the_tries() -> None:
    assert (queue.next_pause(1, 0.0), queue.next_pause(1, 1.0)) == (15, 45)
    assert queue.next_pause(10**9, 1.0) == 5400


def test_a_permanent_failure_is_not_retried_until_it_is_resumed() -> None:
    kept = failed(added("a"), "no such model", retry=False)
    assert at(kept, "a").ready_at is None
    assert queue.next_due(kept) is None
    assert queue.take(kept, ME, NOW + 1e9)[1] is None
    kept = queue.resume(kept, ["a"], NOW)
    assert (at(kept, "a").so_far.tries, taken(kept)[1].model) == (0, "a:latest")


def test_a_stopped_item_waits_at_its_old_place() -> None:
    kept, item = taken(added("a", "b"))
    kept = queue.ended(kept, item, Driven(Result.STOPPED, "c is more urgent"), NOW, 0.5)
    assert line(kept) == ["a", "b"]
    assert taken(kept)[1].model == "a:latest"
    assert at(kept, "a").so_far.tries == 0
    assert at(kept, "a").so_far.reasons[-1].why == "c is more urgent"


@pytest.mark.parametrize("result", Result)
def test_a_running_item_that_people_changed_stops(result: Result) -> None:
    kept, item = taken(added("a"))
    for decided in (
        queue.pause(kept, ["a"], NOW),
        queue.remove(kept, ["a"]),
        added("a", kept=queue.remove(kept, ["a"])),
        taken(queue.resume(queue.pause(kept, ["a"], NOW), ["a"], NOW), runner=OTHER)[0],
        taken(queue.resume(queue.pause(kept, ["a"], NOW), ["a"], NOW), NOW + 101)[0],
    ):
        assert queue.ended(decided, item, Driven(result, "x"), NOW, 0.5) == decided
        assert queue.why_stop(decided, item, NOW)


def test_where_the_runner_is_gone_the_item_waits_again() -> None:
    kept, _ = taken(added("a", "b"))
    kept, _ = taken(kept, runner=OTHER)
    assert queue.revived(kept, lambda *_: True, NOW) is kept
    kept = queue.revived(kept, lambda _, runner: runner == ME, NOW + 5)
    assert [item.state for item in kept.line] == [ItemState.RUNNING, ItemState.WAITING]
    assert at(kept, "b").so_far.reasons[-1].why == "its process is gone"
    assert taken(kept)[1].model == "b:latest"


def test_of_what_is_done_the_last_hundred_are_kept() -> None:
    kept = Queue()
    for number in range(105):
        kept, item = taken(added(f"m{number}", kept=kept))
        kept = queue.ended(kept, item, Driven(Result.DONE), NOW + number, 0.5)
    assert [item.model for item in kept.done[:1]] == ["m5:latest"]
    assert len(kept.done) == 100


# ---------------------------------------------------------------- urgent ones


def test_an_urgent_one_takes_the_place_of_a_lower_one() -> None:
    kept, item = taken(added("a", "b"))
    assert queue.why_stop(kept, item, NOW + 100) == ""
    kept = added("urgent", level=10, kept=kept, now=NOW + 100)
    assert queue.why_stop(kept, item, NOW + 200) == "urgent:latest is more urgent"
    kept = queue.ended(kept, item, Driven(Result.STOPPED), NOW + 200, 0.5)
    kept, urgent = taken(kept, NOW + 200)
    assert urgent.model == "urgent:latest"
    assert queue.why_stop(kept, urgent, NOW + 200) == ""
    kept = queue.ended(kept, urgent, Driven(Result.DONE), NOW + 300, 0.5)
    assert taken(kept, NOW + 300)[1].model == "a:latest"


@pytest.mark.parametrize(
    ("level", "running", "waited", "stops"),
    [(10, 0, 0, True), (9, 0, 0, False), (10, 10, 0, False), (20, 10, 0, True), (10, 0, 11, False)],
)
def test_an_urgent_item_stops_a_less_urgent_one(
    level: int, running: int, waited: float, stops: bool
) -> None:
    kept, item = taken(added("a", level=running), NOW)
    now = NOW + waited * HOUR + 60
    kept = added("b", level=level, kept=kept, now=now)
    assert bool(queue.why_stop(kept, item, now)) is stops


def test_of_several_that_run_only_the_last_one_makes_place() -> None:
    kept, first = taken(added("a", "b"))
    kept, second = taken(kept, runner=OTHER)
    kept = added("urgent", level=10, kept=kept, now=NOW + 100)
    assert queue.why_stop(kept, first, NOW + 200) == ""
    assert queue.why_stop(kept, second, NOW + 200)


def test_an_urgent_one_that_is_not_due_makes_nobody_stop() -> None:
    kept, item = taken(added("a"))
    kept = queue.add(kept, "urgent", 100, NOW + HOUR, NOW)
    assert queue.why_stop(kept, item, NOW + 100) == ""
    assert queue.why_stop(kept, item, NOW + HOUR)


def test_a_paused_queue_makes_everybody_stop() -> None:
    kept, item = taken(added("a"))
    assert queue.why_stop(queue.pause(kept, (), NOW), item, NOW) == "the queue was paused"


# ---------------------------------------------------------------- when it will be done


def test_one_after_the_other_at_the_rate_that_is_known() -> None:
    kept, _ = taken(added("a", "b", "c"))
    sizes = {"a:latest": 100, "b:latest": 50, "c:latest": 10}
    assert queue.arrivals(kept, NOW, sizes.get, 10.0) == (NOW + 10, NOW + 15, NOW + 16)
    assert queue.arrivals(kept, NOW, sizes.get, None) == (None,) * 3
    assert queue.arrivals(kept, NOW, sizes.get, 0.0) == (None,) * 3
    del sizes["b:latest"]
    assert queue.arrivals(kept, NOW, sizes.get, 10.0) == (NOW + 10, None, None)


def test_arrivals_pass_over_items_that_wait_and_omit_paused_ones() -> None:
    kept = queue.add(added("a", "paused", now=NOW - 10), "soon", 50, NOW + 5, NOW)
    kept = queue.add(kept, "late", 100, NOW + 100, NOW)
    kept = queue.pause(kept, ["paused"], NOW)
    found = queue.arrivals(kept, NOW, lambda _: 100, 10.0)
    by = dict(zip(line(kept), found, strict=True))
    assert by == {"a": NOW + 10, "soon": NOW + 20, "late": NOW + 110, "paused": None}
    assert queue.arrivals(queue.pause(kept, (), NOW), NOW, lambda _: 1, 1.0) == (None,) * 4


# ---------------------------------------------------------------- the file


@pytest.fixture
def place(folder: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{folder}")) / ".ollama-watch" / "queue.json"


def rich() -> Queue:
    """A queue with all that there may be."""
    kept = failed(added("a", "b", "c", "d", "e"), "böse \ud800", retry=False)
    kept = failed(kept, now=NOW + 50)
    kept = queue.pause(kept, ["c"], NOW)
    kept, item = taken(kept, NOW + 20)
    kept = queue.ended(kept, item, Driven(Result.DONE), NOW, 0.1)
    return queue.pause(taken(kept, NOW + 20)[0], (), NOW)


def test_a_saved_queue_is_read_back_unchanged(folder: int) -> None:
    kept = queue.FILE.change(folder, lambda _: rich())
    assert {item.state for item in (*kept.line, *kept.done)} == set(ItemState) - {ItemState.WAITING}
    found = queue.FILE.read(folder)
    assert found == kept
    assert all(isinstance(item, Item) for item in found.line)
    assert all(type(item.state) is ItemState for item in (*found.line, *found.done))


@pytest.mark.parametrize(
    ("row", "field", "value"),
    [
        (0, 0, None), (0, 1, 1.5), (0, 1, True), (0, 2, "x"), (0, 2, None), (0, 3, []),
        (0, 4, "never"), (0, 5, [1]), (0, 5, "x"), (0, 5, ["happy", 0, None, 0, []]),
        (0, 5, ["running", 0, None, 0, []]), (0, 5, ["waiting", 0, [1, 2], 0, []]),
        (0, 5, ["running", 0, [1], 0, []]), (0, 5, ["running", 0, ["x", 2], 0, []]),
        (0, 5, ["waiting", None, None, 0, []]), (0, 5, ["waiting", 0, None, 0.5, []]),
        (0, 5, ["waiting", 0, None, 0, [[1]]]), (0, 5, ["waiting", 0, None, 0, None]),
    ],
)  # fmt: skip
def test_a_value_that_can_not_be_is_damage(
    folder: int, place: Path, row: int, field: int, value: object
) -> None:
    queue.FILE.change(folder, lambda _: rich())
    document = json.loads(place.read_bytes())
    document["line"][row][field] = value
    place.write_text(json.dumps(document))
    assert queue.FILE.read(folder) == Queue()
    kept, lost = queue.FILE.change_and_report(folder, lambda before: added("a", kept=before))
    assert line(kept) == ["a"]
    assert lost.startswith(".ollama-watch/queue.json is damaged: ")
    assert lost.endswith("; it was renamed to queue.json.damaged")
    assert place.with_name("queue.json.damaged").exists()


@pytest.mark.parametrize("change", [{"line": None}, {"done": 5}, {"line": [5]},
                                    {"schema": "ollama-watch/queue-file/2"}])  # fmt: skip
def test_a_queue_file_of_another_shape_counts_as_empty(
    folder: int, place: Path, change: dict[str, Any]
) -> None:
    queue.FILE.change(folder, lambda _: rich())
    place.write_text(json.dumps({**json.loads(place.read_bytes()), **change}))
    assert not queue.FILE.read(folder).done


def test_a_line_that_is_out_of_order_is_put_in_order(folder: int, place: Path) -> None:
    queue.FILE.change(folder, lambda _: added("a", "b", "c"))
    document = json.loads(place.read_bytes())
    document["line"].reverse()
    place.write_text(json.dumps(document))
    assert line(queue.FILE.read(folder)) == ["a", "b", "c"]


def test_a_change_without_effect_writes_no_file(folder: int, place: Path) -> None:
    queue.FILE.change(folder, lambda _: added("a"))
    before = place.stat().st_ino
    queue.FILE.change(folder, lambda kept: queue.resume(kept, ["a"], NOW))
    assert place.stat().st_ino == before
