"""``quarantine``: what was damaged and perhaps the only copy, kept aside."""

from __future__ import annotations

import sys
from dataclasses import replace

from watcher import reconcile
from watcher.commands.acting import act
from watcher.commands.context import Context
from watcher.decide import remaining
from watcher.errors import Exit
from watcher.model import Policy
from watcher.ollama import names
from watcher.show import documents


def ls(context: Context) -> Exit:
    """List what lies in quarantine. FAILED where that, or its place, could not be looked at."""
    code = Exit.HEALTHY
    for host in context.hosts(keeps=False):
        report = reconcile.cycle(host, context.policy, approve=reconcile.nothing)
        unseen = remaining.quarantine_unseen(report.evidence)
        if unseen:
            code = Exit.FAILED
        if context.json:
            context.document(documents.quarantine(report))
        elif report.evidence.quarantine or unseen:
            from watcher.show import tables

            context.show(tables.quarantine(report))
            context.show(tables.not_seen(unseen, report.diagnosis))
        elif not context.quiet:
            sys.stdout.write(f"nothing in quarantine: {names.printable(host.store)}\n")
    return code


def restore(context: Context, labels: tuple[str, ...], *, dry_run: bool, yes: bool) -> Exit:
    """Put things back into their place, never over what is there now."""
    policy = replace(_idle(context.policy), restore=frozenset(labels))
    return act(context, "restore", policy, (), dry_run=dry_run, yes=yes)


def purge(context: Context, labels: tuple[str, ...], *, dry_run: bool, yes: bool) -> Exit:
    """Remove things for good: those named, else those that a good one has replaced."""
    policy = replace(_idle(context.policy), purge=frozenset(labels), purge_replaced=not labels)
    return act(context, "purge", policy, (), dry_run=dry_run, yes=yes)


def _idle(policy: Policy) -> Policy:
    """Nothing but the quarantine is treated, whatever the settings say of the rest."""
    return replace(policy, repair=False, clean=False)
