"""``df``: what uses the space; writes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from watcher.commands import declare
from watcher.errors import Exit

if TYPE_CHECKING:
    from watcher.commands.context import Context


@declare.command(
    examples=["df", "-v df", "df --json"],
    read_on="docs/reference/json.md: the document of --json; docs/store.md: what lies in a store",
)
def df(context: Context) -> Exit:
    """Show what uses the space.

    Models, unfinished downloads, orphaned blobs, quarantine: the sum equals that of du. -v lists
    every model.
    """
    from watcher.commands.context import complain, patience
    from watcher.decide import findings, modes, usage
    from watcher.ollama import names
    from watcher.reconcile import Reconciler
    from watcher.show import documents
    from watcher.show import usage as shown

    code = Exit.HEALTHY
    for host in context.hosts(changes=False):
        with patience(f"scanning {names.printable(host.store)}"):
            report = Reconciler(host, context.settings).inspect(modes.SURVEY)
        found = report.evidence.space
        assert found is not None
        uses, total = usage.usage(found, report.diagnosis.diagnosed, report.evidence.census)
        if context.json:
            context.document(documents.df(report, found, uses, total))
        else:
            seen = report.evidence
            context.show(shown.table(seen, found, uses, total, verbose=context.verbose))
        for path in found.unlisted:
            code = Exit.FAILED
            complain(f"ollama-watch: {names.printable(path)}/ can't be listed and is not counted")
            if command := findings.made_listable(path, report.evidence):
                complain(f"  -> {command}")
    return code
