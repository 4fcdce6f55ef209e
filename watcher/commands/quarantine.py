"""``quarantine``: what was damaged and perhaps the only copy, kept aside."""

import sys
from typing import TYPE_CHECKING, Any

from watcher.commands import complete, declare
from watcher.commands.context import Context
from watcher.errors import Exit, TargetError
from watcher.ollama import names
from watcher.system import advice

if TYPE_CHECKING:
    from watcher.model import Mode

_SHOWN = 50  #: so many files are listed on a terminal


@declare.group(
    near={"ls": "list show", "restore": "put back", "purge": "rm delete remove"},
    examples=["quarantine ls", "quarantine purge -n"],
    read_on="docs/safety.md: what is moved to quarantine, and when it goes",
)
def quarantine() -> None:
    """List, restore or purge quarantined files.

    A damaged file that was perhaps the only copy is kept there.
    """


@quarantine.command(examples=["quarantine ls", "quarantine ls --json"])
def ls(context: Context) -> Exit:
    """List quarantined files."""
    from watcher.decide import modes, remaining
    from watcher.show import documents, tables

    code = Exit.HEALTHY
    for report in context.scans(modes.INSPECT):
        unseen = remaining.quarantine_unseen(report.evidence)
        if unseen:
            code = Exit.FAILED
        if context.json:
            context.document(documents.quarantine(report))
        elif report.evidence.quarantine or unseen:
            most = _SHOWN if sys.stdout.isatty() and not context.verbose else None
            context.show(tables.quarantine(report, most))
            context.show(tables.not_seen(unseen, report.diagnosis))
        else:
            path = names.printable(report.evidence.place.path)
            context.note(f"the quarantine is empty: {path}")
    return code


@quarantine.command(examples=["quarantine restore LABEL -n", "quarantine restore LABEL"])
@complete.several("labels", required=True, metavar="LABEL...", shell_complete=complete.labels)
@declare.dry_run
@declare.yes
def restore(context: Context, labels: tuple[str, ...], **how: bool) -> Exit:
    """Move quarantined files back into their place.

    Never replaces a file that is there now.
    """
    from watcher.decide import modes

    return _act(context, "restore", modes.restore(frozenset(labels)), how)


@quarantine.command(examples=["quarantine purge -n", "quarantine purge LABEL"])
@complete.several("labels", metavar="[LABEL]...", shell_complete=complete.labels)
@declare.dry_run
@declare.yes
def purge(context: Context, labels: tuple[str, ...], **how: bool) -> Exit:
    """Remove quarantined files for good.

    Without a label, removes those that a valid blob has replaced.
    """
    from watcher.decide import modes

    return _act(context, "purge", modes.purge(frozenset(labels)), how)


def _act(context: Context, command: str, mode: "Mode", how: dict[str, Any]) -> Exit:
    """In each store, on those labels that it has. Raises TargetError for one that none has."""
    from watcher.commands.acting import Request, act_on

    hosts = context.hosts(changes=not how["dry_run"], knows=complete.kept)
    here = [frozenset(complete.kept(host.store).models) for host in hosts]
    known = frozenset().union(*here, *(each.models for each in context.elsewhere))
    for label in sorted((mode.restore | mode.purge) - known):
        command = advice.on(hosts[0].store, hosts[0].found_by, "quarantine", "ls")
        unknown = f"unknown label: {names.printable(label)}"
        raise TargetError(unknown, "look up its label", command)
    code = Exit.HEALTHY
    for host, labels in zip(hosts, here, strict=True):
        own = mode._replace(restore=mode.restore & labels, purge=mode.purge & labels)
        code = max(code, act_on(context, host, Request(command, own, **how)))
    return code
