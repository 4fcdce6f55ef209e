"""``quarantine``: what was damaged and perhaps the only copy, kept aside."""

from __future__ import annotations

import sys

from watcher.commands.acting import Request, act
from watcher.commands.context import Context
from watcher.decide import modes, remaining
from watcher.errors import Exit
from watcher.ollama import names
from watcher.reconcile import Reconciler
from watcher.show import documents, tables

#: So many files are listed on a terminal.
_SHOWN = 50


def ls(context: Context) -> Exit:
    """List what lies in quarantine. FAILED where that, or its place, could not be looked at."""
    code = Exit.HEALTHY
    for host in context.hosts(changes=False):
        report = Reconciler(host, context.settings).inspect()
        unseen = remaining.quarantine_unseen(report.evidence)
        if unseen:
            code = Exit.FAILED
        if context.json:
            context.document(documents.quarantine(report))
        elif report.evidence.quarantine or unseen:
            most = _SHOWN if sys.stdout.isatty() and not context.verbose else None
            context.show(tables.quarantine(report, most))
            context.show(tables.not_seen(unseen, report.diagnosis))
        elif not context.quiet:
            sys.stdout.write(f"nothing in quarantine: {names.printable(host.store)}\n")
    return code


def restore(context: Context, labels: tuple[str, ...], *, dry_run: bool, yes: bool) -> Exit:
    """Put things back into their place, never over what is there now."""
    mode = modes.restore(frozenset(labels))
    return act(context, Request("restore", mode, dry_run=dry_run, yes=yes))


def purge(context: Context, labels: tuple[str, ...], *, dry_run: bool, yes: bool) -> Exit:
    """Remove things for good: those named, else those that a good one has replaced."""
    mode = modes.purge(frozenset(labels))
    return act(context, Request("purge", mode, dry_run=dry_run, yes=yes))
