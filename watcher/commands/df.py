"""``df``: where the space is; writes nothing."""

from __future__ import annotations

from watcher.commands.context import Context, complain, patience
from watcher.decide import findings, modes, usage
from watcher.errors import Exit
from watcher.ollama import names
from watcher.reconcile import Reconciler
from watcher.show import documents
from watcher.show import usage as shown


def df(context: Context) -> Exit:
    """Tell of each store what its space is used for. FAILED where a folder can't be listed."""
    code = Exit.HEALTHY
    for host in context.hosts(changes=False):
        with patience(f"looking at {names.printable(host.store)}"):
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
            complain(f"ollama-watch: {names.printable(path)}/ can't be listed, so not counted")
            if command := findings.made_listable(path, report.evidence):
                complain(f"  -> {command}")
    return code
