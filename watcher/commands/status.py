"""``status``: what is going on just now."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING

import click

from watcher.commands import declare
from watcher.commands.context import Context
from watcher.errors import Exit, WatchError

if TYPE_CHECKING:
    from watcher.model import Unseen
    from watcher.observe.host import Host
    from watcher.pull.queue import Queue
    from watcher.reconcile import Report
    from watcher.show.status import Pace, Status
    from watcher.state import records
    from watcher.state.memory import Memory

#: A rate takes two looks; and this is how often `--watch` looks.
_APART_SECONDS = 1.0
_WATCH_SECONDS = 2.0
_CLEAR = "\033[H\033[2J"


@declare.command(
    examples=["status", "status --watch"],
    read_on="docs/reference/conditions.md: what each condition means; docs/service.md",
)
@click.option("-w", "--watch", is_flag=True, help="Refresh until Ctrl-C.")
def status(context: Context, watch: bool) -> Exit:
    """Show running and broken downloads, the daemon and the queue.

    Exits with 4 if something can't be read.
    """
    from watcher.show import status as drawn

    redraws = watch and not context.json and sys.stdout.isatty()
    hosts = context.hosts(again=_WATCH_SECONDS if watch else None)
    before: dict[str, Report] = {}
    while True:
        shown = [_look(host, context, before.get(host.store)) for host in hosts]
        if redraws and not context.turn:
            sys.stdout.write(_CLEAR)
        for each in shown:
            if context.json:
                context.document(drawn.document(each))
            else:
                context.show(drawn.table(each, verbose=context.verbose))
        if watch and context.turn is not None:
            return Exit.HEALTHY
        if not watch:
            return Exit.FAILED if any(each.unseen for each in shown) else Exit.HEALTHY
        before = {each.report.evidence.place.path: each.report for each in shown}
        time.sleep(_WATCH_SECONDS)


def _look(host: Host, context: Context, past: Report | None) -> Status:
    """One look at a store, and a second one where something moves and nobody has looked before."""
    from watcher import reconcile
    from watcher.decide import remaining
    from watcher.model import Condition
    from watcher.observe import serving
    from watcher.show.status import Status

    reconciler = reconcile.Reconciler(host, context.settings)
    report = reconciler.inspect()
    conditions = {each.condition for each in report.diagnosis.diagnosed}
    if past is None and Condition.LIVE in conditions:
        time.sleep(_APART_SECONDS)
        past, report = report, reconciler.inspect()
    memory = reconcile.remembered(host)
    known, line, unread = _kept(host.store)
    return Status(
        report,
        _paces(past, report, memory),
        serving.daemon(host.store),
        memory.looked_at,
        known,
        line,
        serving.queue_runner(host.store),
        (*remaining.out_of_sight(report.evidence), *unread),
    )


def _kept(path: str) -> tuple[records.Records, Queue, list[Unseen]]:
    """What is kept of the models' downloads, and the queue; and what of it can't be read."""
    from watcher.model import Unseen
    from watcher.pull import queue
    from watcher.state import folders, records, state_folder

    known: records.Records = {}
    line = queue.Queue()
    unread: list[Unseen] = []

    def note(name: str, error: WatchError) -> None:
        file = f"{state_folder.FOLDER}/{name}"
        unread.append(Unseen(file, error.message.removeprefix(f"{file} can't be read: ")))

    with suppress(OSError), folders.opened_store(path) as store:
        try:
            known = records.read(store)
        except WatchError as error:
            note(records.NAME, error)
        try:
            line = queue.FILE.read(store)
        except WatchError as error:
            note(queue.FILE.name, error)
    return known, line, unread


def _paces(past: Report | None, now: Report, memory: Memory) -> dict[str, Pace]:
    """How fast each live download comes, by its key: between two looks, and as a daemon saw it."""
    from watcher.decide.transitions import rate
    from watcher.model import Condition
    from watcher.pull.speed import spread
    from watcher.show.status import Pace
    from watcher.state.memory import Sample

    before = {} if past is None else {each.key: each for each in past.evidence.downloads}
    found: dict[str, Pace] = {}
    for diagnosed in now.diagnosis.diagnosed:
        download = diagnosed.download
        if diagnosed.condition is not Condition.LIVE:
            continue
        per_second = left = None
        if past is not None and download.key in before:
            first = Sample(past.evidence.now, before[download.key].allocated)
            per_second = rate((first, Sample(now.evidence.now, download.allocated)))
        if per_second and download.total is not None:
            left = max(0, download.total - download.allocated) / per_second
        known = memory.downloads.get(download.key)
        rates = map(rate, pairwise(known.samples if known else ()))
        lately = spread([each for each in rates if each is not None])
        found[download.key] = Pace(per_second, left, lately)
    return found
