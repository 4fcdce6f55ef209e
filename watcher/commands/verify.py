"""``verify``: hash blobs."""

import math
import time

from watcher.commands import complete, declare
from watcher.commands.context import Context, transient
from watcher.errors import Exit
from watcher.system import advice


@declare.command(
    examples=["verify", "verify llama3", "verify --max-duration 2h"],
    read_on="docs/safety.md: what happens to a damaged blob",
)
@complete.several("targets", metavar="[MODEL]...", shell_complete=complete.targets)
@declare.duration("--max-duration", help="Stop after this time, such as 2h.")
def verify(context: Context, targets: tuple[str, ...], max_duration: float | None) -> Exit:
    """Hash blobs and report checksum mismatches.

    Remembers the results: a second run hashes only what changed.
    """
    from dataclasses import replace

    from watcher.decide import modes, remaining
    from watcher.observe.targets import find, known
    from watcher.reconcile import Reconciler, approve_all
    from watcher.show import documents, tables
    from watcher.show.text import part_of, size

    code = Exit.HEALTHY
    began = time.monotonic()
    until = began + (math.inf if max_duration is None else max_duration)

    def watch(done: int, total: int) -> None:
        if done:
            rate = done / (time.monotonic() - began)
            left = (total - done) / rate
            speed = f"{size(round(rate))}/s, {advice.duration(left)} left"
            transient(f"hashed {part_of(done, total)}, {speed}")

    hosts = context.hosts(changes=True, knows=known if targets else None)
    meant = find(hosts, targets, context.elsewhere)
    approve = meant.of if meant else approve_all
    about = meant.meant if meant else remaining.everything
    for host in hosts:
        began = time.monotonic()
        watched = replace(host, watch=watch, stops=lambda: time.monotonic() >= until)
        report = Reconciler(watched, context.settings).reconcile(modes.VERIFY, approve=approve)
        transient("")
        done = remaining.verified(report.evidence, report.outcomes, about)
        # HEALTHY only where everything was checked, is right, and will be known the next time.
        ended = Exit.FINDINGS if done.wrong or done.left else Exit.HEALTHY
        if done.unseen or report.warnings or report.stuck:
            ended = Exit.FAILED
        if context.json:
            context.document(documents.verified(report, done))
        elif ended is not Exit.HEALTHY:
            context.show(tables.verified(report, done))
        elif not context.quiet:
            context.show([tables.verified_line(done)])
        code = max(code, ended)
    return code
