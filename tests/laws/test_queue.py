"""The queue against a simple model: a list that is sorted anew each time, and a dict of states."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.support.examples import some
from watcher.pull import queue
from watcher.pull.queue import Driven, Item, ItemState, Queue, Result, Runner

MODELS = st.sampled_from(["a", "b", "c", "d", "e"])
RUNNERS = st.sampled_from([1, 2, 3])
HOUR = 3600.0


@dataclass
class Simple:
    """What the model knows of one item."""

    priority: int
    added_at: float
    ready_at: float | None
    state: str = "waiting"
    runner: int | None = None
    tries: int = 0
    not_before: float = 0.0
    #: Where it was moved to: next to another one, whose age it takes over.
    counts_as: tuple[float, int] | None = None

    def effective(self, now: float) -> float:
        """Its priority, and one step more for each hour that it has waited."""
        if self.counts_as is not None:
            since, priority = self.counts_as
            return priority + (now - since) / HOUR
        return self.priority + (now - max(self.added_at, self.not_before)) / HOUR


class QueueMachine(RuleBasedStateMachine):
    """All that people, runners and time may do, in any order; the file is read and written."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp(prefix="ollama-watch-queue-")
        self.store = os.open(self.folder, os.O_RDONLY)
        self.now = 1_000_000.0
        self.items: dict[str, Simple] = {}
        #: The line as the model has it; only who comes in or moves changes it.
        self.order: list[str] = []
        self.done: list[str] = []
        self.paused = False
        self.taken: list[tuple[str, int, Item]] = []

    def teardown(self) -> None:
        os.close(self.store)
        shutil.rmtree(self.folder)

    def change(self, do: Callable[[Queue], Queue]) -> Queue:
        return queue.FILE.change(self.store, do)

    def kept(self) -> Queue:
        return queue.FILE.read(self.store)

    def due(self, model: str) -> bool:
        item = self.items[model]
        waits = item.state in ("waiting", "failed")
        return waits and item.ready_at is not None and item.ready_at <= self.now

    # ------------------------------------------------------------ people

    @rule(seconds=st.sampled_from([1.0, 40.0, HOUR, 12 * HOUR]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(model=MODELS, level=st.sampled_from([-10, 0, 0, 5, 10]), wait=st.sampled_from([0, 0, 90]))
    def add(self, model: str, level: int, wait: int) -> None:
        not_before = self.now + wait if wait else 0.0
        self.change(lambda kept: queue.add(kept, model, level, not_before, self.now))
        item = self.items.get(model, Simple(level, self.now, not_before))
        item = replace(item, priority=level, counts_as=None)
        if item.state == "running":
            item.not_before = 0.0
        else:
            item = replace(item, ready_at=not_before, not_before=not_before)
            item = replace(item, state="waiting", tries=0)
        self.done = [each for each in self.done if each != model]
        self.order = [each for each in self.order if each != model]
        self.items[model] = item
        mine = item.effective(self.now)
        ahead = [each for each in self.order if self.items[each].effective(self.now) >= mine - 1e-9]
        self.order.insert(len(ahead), model)

    @rule(model=MODELS)
    def remove(self, model: str) -> None:
        if model not in self.items and model not in self.done:
            return
        self.change(lambda kept: queue.remove(kept, [model]))
        self.items.pop(model, None)
        self.order = [each for each in self.order if each != model]
        self.done = [each for each in self.done if each != model]

    @precondition(lambda self: self.order)
    @rule(data=st.data(), to=st.integers(1, 6))
    def move(self, data: st.DataObject, to: int) -> None:
        model = data.draw(st.sampled_from(self.order))
        self.change(lambda kept: queue.move(kept, model, to))
        before = self.order.index(model)
        self.order.remove(model)
        place = min(to - 1, len(self.order))
        if place != before:
            other = self.items[self.order[place if place < before else place - 1]]
            own = (max(other.added_at, other.not_before), other.priority)
            self.items[model].counts_as = other.counts_as or own
        self.order.insert(place, model)

    @rule(model=MODELS)
    def pause(self, model: str) -> None:
        if model in self.items:
            self.change(lambda kept: queue.pause(kept, [model], self.now))
            self.items[model] = replace(self.items[model], state="paused", runner=None)

    @rule(model=MODELS)
    def resume(self, model: str) -> None:
        if model in self.items:
            self.change(lambda kept: queue.resume(kept, [model], self.now))
            item = self.items[model]
            if item.state in ("paused", "failed"):
                self.items[model] = replace(item, state="waiting", ready_at=0.0, tries=0)

    @rule(paused=st.booleans())
    def pause_all(self, paused: bool) -> None:
        act = queue.pause if paused else queue.resume
        self.change(lambda kept: act(kept, (), self.now))
        self.paused = paused

    # ------------------------------------------------------------ runners

    @rule(runner=RUNNERS)
    def take(self, runner: int) -> None:
        self.now += 1  # two takes of one instant by one runner are one
        found: list[Item | None] = []

        def do(kept: Queue) -> Queue:
            after, item = queue.take(kept, Runner(runner, 0), self.now)
            found.append(item)
            return after

        self.change(do)
        wanted = next((each for each in self.order if self.due(each)), None)
        if self.paused:
            wanted = None
        assert (None if found[0] is None else found[0].model) == (wanted and f"{wanted}:latest")
        if wanted is not None:
            assert found[0] is not None
            item = self.items[wanted]
            self.items[wanted] = replace(item, state="running", runner=runner, ready_at=0.0)
            # Whoever had it before has lost it.
            self.taken = [each for each in self.taken if each[0] != wanted]
            self.taken.append((wanted, runner, found[0]))

    @precondition(lambda self: self.taken)
    @rule(data=st.data(), result=st.sampled_from(Result), retry=st.booleans())
    def end(self, data: st.DataObject, result: Result, retry: bool) -> None:
        which = data.draw(st.integers(0, len(self.taken) - 1))
        model, runner, item = self.taken.pop(which)
        driven = Driven(result, "so it is", retry)
        self.change(lambda kept: queue.ended(kept, item, driven, self.now, 0.5))
        mine = self.items.get(model)
        if mine is None or mine.state != "running" or mine.runner != runner:
            return
        if result is Result.DONE:
            del self.items[model]
            self.order.remove(model)
            self.done.append(model)
        elif result is Result.STOPPED:
            self.items[model] = replace(mine, state="waiting", runner=None, ready_at=0.0)
        else:
            tries = mine.tries + 1
            again = self.now + min(30.0 * 2 ** (tries - 1), 3600.0) if retry else None
            self.items[model] = replace(
                mine, state="failed", runner=None, tries=tries, ready_at=again
            )

    @rule(gone=RUNNERS)
    def a_runner_dies(self, gone: int) -> None:
        self.change(lambda kept: queue.revived(kept, lambda _, each: each.pid != gone, self.now))
        self.taken = [each for each in self.taken if each[1] != gone]
        for model, item in self.items.items():
            if item.runner == gone:
                self.items[model] = replace(item, state="waiting", runner=None, ready_at=0.0)

    # ------------------------------------------------------------ what has to hold

    @invariant()
    def the_line_is_the_models(self) -> None:
        kept = self.kept()
        assert [item.model for item in kept.line] == [f"{each}:latest" for each in self.order]
        assert [item.model for item in kept.done] == [f"{each}:latest" for each in self.done]
        assert kept.paused is self.paused
        for item in kept.line:
            mine = self.items[item.model.removesuffix(":latest")]
            assert item.state == mine.state, item
            assert (item.priority, item.so_far.tries) == (mine.priority, mine.tries)
            runner = item.so_far.runner
            assert (None if runner is None else runner.pid) == mine.runner
            if item.state in (ItemState.WAITING, ItemState.FAILED):
                assert item.ready_at == mine.ready_at

    @invariant()
    def who_has_waited_more_for_its_priority_stands_ahead_at_any_time(self) -> None:
        for now in (self.now, self.now + 1000 * HOUR):
            values = [self.items[each].effective(now) for each in self.order]
            assert all(a >= b - 1e-6 for a, b in pairwise(values))

    @invariant()
    def the_next_is_known(self) -> None:
        times = [
            item.ready_at
            for item in self.items.values()
            if item.state in ("waiting", "failed") and item.ready_at is not None
        ]
        assert queue.next_due(self.kept()) == (
            min(times, default=None) if not self.paused else None
        )

    @invariant()
    def only_the_last_that_runs_stops_for_an_urgent_one(self) -> None:
        kept = self.kept()
        stops = [
            item.model
            for item in kept.line
            if item.state is ItemState.RUNNING
            and queue.why_stop(kept, item, self.now).endswith("urgent")
        ]
        last = [item for item in kept.line if item.state is ItemState.RUNNING][-1:]
        ahead = self.order[: kept.line.index(last[0])] if last else []
        urgent = [
            each
            for each in ahead
            if self.due(each) and self.items[each].priority >= max(10, last[0].priority + 1)
        ]
        wanted = [last[0].model] if urgent and not self.paused else []
        assert stops == wanted


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=some(40), stateful_step_count=40)
