"""``quarantine``: what was damaged and perhaps the only copy, kept aside."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from watcher.commands import complete, declare
from watcher.errors import Exit, TargetError

if TYPE_CHECKING:
    from watcher.commands.acting import Request
    from watcher.commands.context import Context

#: So many files are listed on a terminal.
_SHOWN = 50
_READ_ON = "docs/safety.md: what is moved to quarantine, and when it goes"


@declare.group(
    near={
        "list": ["ls"],
        "show": ["ls"],
        "put": ["restore"],
        "back": ["restore"],
        "rm": ["purge"],
        "delete": ["purge"],
        "remove": ["purge"],
    },
    examples=["quarantine ls", "quarantine purge -n"],
    read_on=_READ_ON,
)
def quarantine() -> None:
    """List, restore or purge quarantined files.

    A damaged file that was perhaps the only copy is kept there.
    """


@quarantine.command(examples=["quarantine ls", "quarantine ls --json"], read_on=_READ_ON)
def ls(context: Context) -> Exit:
    """List quarantined files."""
    from watcher.decide import remaining
    from watcher.ollama import names
    from watcher.reconcile import Reconciler
    from watcher.show import documents, tables

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
            sys.stdout.write(f"the quarantine is empty: {names.printable(host.store)}\n")
    return code


@quarantine.command(
    examples=["quarantine restore LABEL -n", "quarantine restore LABEL"], read_on=_READ_ON
)
@click.argument(
    "labels", nargs=-1, required=True, metavar="LABEL...", shell_complete=complete.labels
)
@declare.dry_run
@declare.yes
def restore(context: Context, labels: tuple[str, ...], dry_run: bool, yes: bool) -> Exit:
    """Move quarantined files back into their place.

    Never over a file that is there now.
    """
    from watcher.commands.acting import Request
    from watcher.decide import modes

    mode = modes.restore(frozenset(labels))
    return _act(context, Request("restore", mode, dry_run=dry_run, yes=yes))


@quarantine.command(examples=["quarantine purge -n", "quarantine purge LABEL"], read_on=_READ_ON)
@click.argument("labels", nargs=-1, metavar="[LABEL]...", shell_complete=complete.labels)
@declare.dry_run
@declare.yes
def purge(context: Context, labels: tuple[str, ...], dry_run: bool, yes: bool) -> Exit:
    """Remove quarantined files for good (without a label: those already replaced)."""
    from watcher.commands.acting import Request
    from watcher.decide import modes

    mode = modes.purge(frozenset(labels))
    return _act(context, Request("purge", mode, dry_run=dry_run, yes=yes))


def _act(context: Context, asked: Request) -> Exit:
    """In each store, on those labels that it has. Raises TargetError for one that none has."""
    from dataclasses import replace

    from watcher.commands.acting import act_on

    hosts = context.hosts(changes=not asked.dry_run, knows=complete.kept)
    here = [complete.kept(host.store).digests for host in hosts]
    known = frozenset().union(*here, *(each.digests for each in context.elsewhere))
    for label in sorted((asked.mode.restore | asked.mode.purge) - known):
        _refuse(label, hosts[0].store, hosts[0].found_by)
    codes = []
    for host, labels in zip(hosts, here, strict=True):
        restored, purged = asked.mode.restore & labels, asked.mode.purge & labels
        mode = replace(asked.mode, restore=restored, purge=purged)
        codes.append(act_on(context, host, replace(asked, mode=mode)))
    return max(codes)


def _refuse(label: str, store: str, found_by: str) -> None:
    from watcher.ollama import names
    from watcher.system import advice

    raise TargetError(
        f"unknown label: {names.printable(label)}",
        "look up its label",
        advice.on(store, found_by, "quarantine", "ls"),
    )
