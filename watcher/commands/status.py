"""``status``: what is going on just now."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING

import click

from watcher.commands import declare
from watcher.errors import Exit, WatchError

if TYPE_CHECKING:
    from watcher.commands.context import Context
    from watcher.model import Unseen
    from watcher.observe.host import Host
    from watcher.pull.queue import Queue
    from watcher.pull.speed import Spread
    from watcher.reconcile import Report
    from watcher.show.status import Pace, Status
    from watcher.state import records
    from watcher.state.memory import Memory

#: A rate takes two looks; and this is how often `--watch` looks.
_APART_SECONDS = 1.0
_WATCH_SECONDS = 2.0


@declare.command(
    examples=["status", "status --watch"],
    read_on="docs/reference/conditions.md: what each condition means; docs/service.md",
)
@click.option("-w", "--watch", is_flag=True, help="Refresh until Ctrl-C.")
def status(context: Context, watch: bool) -> Exit:
    """Show running and broken downloads, the daemon and the queue.

    Exits with 4 if something can't be read.
    """
    in_turn = watch and context.look_in_turns(_WATCH_SECONDS)
    if in_turn:
        _clear(context)
    hosts = context.hosts(changes=False)
    before: dict[str, Status] = {}
    while True:
        shown = [look(host, context, before.get(host.store)) for host in hosts]
        _show(context, shown, redraw=watch and not in_turn)
        if in_turn:
            return Exit.HEALTHY
        if not watch:
            blind = any(each.unseen for each in shown)
            return Exit.FAILED if blind else Exit.HEALTHY
        before = {each.report.evidence.place.path: each for each in shown}
        time.sleep(_WATCH_SECONDS)


def look(host: Host, context: Context, before: Status | None) -> Status:
    """One look at a store, and a second one where something moves and nobody has looked before."""
    from watcher import reconcile
    from watcher.decide import remaining
    from watcher.model import Condition
    from watcher.observe import serving
    from watcher.reconcile import Reconciler
    from watcher.show.status import Status

    report = Reconciler(host, context.settings).inspect()
    past = before.report if before is not None else None
    if past is None and any(
        each.condition is Condition.LIVE for each in report.diagnosis.diagnosed
    ):
        time.sleep(_APART_SECONDS)
        past, report = report, Reconciler(host, context.settings).inspect()
    paces = {} if past is None else _paces(past, report)
    memory = reconcile.remembered(host)
    known, line, unread = _kept(host)
    return Status(
        report,
        paces,
        serving.daemon(host.store),
        memory.looked_at,
        known,
        line,
        serving.queue_runner(host.store),
        _spreads(memory, report),
        (*remaining.out_of_sight(report.evidence), *unread),
    )


def _kept(host: Host) -> tuple[records.Records, Queue, tuple[Unseen, ...]]:
    """What is kept of the models' downloads, and the queue; and what of it can't be read."""
    from watcher.pull import queue
    from watcher.state import folders, records

    known: records.Records = {}
    line = queue.Queue()
    unread: list[Unseen] = []
    with suppress(OSError), folders.opened_store(host.store) as store:
        try:
            known = records.read(store)
        except WatchError as error:
            unread.append(_unread(records.NAME, error))
        try:
            line = queue.FILE.read(store)
        except WatchError as error:
            unread.append(_unread(queue.FILE.name, error))
    return known, line, tuple(unread)


def _unread(name: str, error: WatchError) -> Unseen:
    from watcher.model import Unseen
    from watcher.state import state_folder

    path = f"{state_folder.FOLDER}/{name}"
    return Unseen(path, error.message.removeprefix(f"{path} can't be read: "))


def _paces(past: Report, now: Report) -> dict[str, Pace]:
    """How fast each download grew on the disk between two looks, by its key."""
    from watcher.model import Condition
    from watcher.show.status import Pace

    seconds = now.evidence.now - past.evidence.now
    known = {each.key: each for each in past.evidence.downloads}
    found: dict[str, Pace] = {}
    for diagnosed in now.diagnosis.diagnosed:
        download = diagnosed.download
        before = known.get(download.key)
        if diagnosed.condition is not Condition.LIVE or before is None or seconds <= 0:
            continue
        arrived = max(0, download.allocated - before.allocated)
        missing = None if download.total is None else max(0, download.total - download.allocated)
        rate = arrived / seconds
        found[download.key] = Pace(rate, None if missing is None or not rate else missing / rate)
    return found


def _spreads(memory: Memory, now: Report) -> dict[str, Spread]:
    """How fast each live download came lately, by its key, where a daemon has looked at it."""
    from watcher.decide import transitions
    from watcher.model import Condition
    from watcher.pull.speed import spread

    found: dict[str, Spread] = {}
    for diagnosed in now.diagnosis.diagnosed:
        known = memory.downloads.get(diagnosed.download.key)
        if known is None or diagnosed.condition is not Condition.LIVE:
            continue
        rates = [
            rate for pair in pairwise(known.samples) if (rate := transitions.rate(pair)) is not None
        ]
        lately = spread(rates)
        if lately is not None:
            found[diagnosed.download.key] = lately
    return found


def _show(context: Context, shown: list[Status], *, redraw: bool) -> None:
    from watcher.show import status as drawn

    if context.json:
        for each in shown:
            context.document(drawn.document(each))
        return
    if redraw:
        _clear(context)
    context.show(part for each in shown for part in drawn.table(each, verbose=context.verbose))


def _clear(context: Context) -> None:
    if not context.json and sys.stdout.isatty():
        sys.stdout.write("\033[H\033[2J")
