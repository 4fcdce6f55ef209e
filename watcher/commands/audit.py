"""``audit``: look, and write nothing at all."""

from __future__ import annotations

import sys

from watcher import cycle
from watcher.commands.context import Context
from watcher.errors import Exit
from watcher.model import Severity
from watcher.show import documents


def audit(context: Context, fail_on: Severity) -> Exit:
    """Look at each store and tell. FINDINGS where one is at least as severe as `fail_on`."""
    code = Exit.HEALTHY
    for world in context.worlds(keeps=False):
        report = cycle.cycle(world, context.policy, consent=cycle.nothing)
        findings = report.verdict.findings
        if any(finding.severity.rank >= fail_on.rank for finding in findings):
            code = Exit.FINDINGS
        if context.json:
            context.document(documents.audit(report))
        elif findings or report.verdict.judged:
            if not (context.quiet and all(f.severity is Severity.INFO for f in findings)):
                _show(context, report)
        elif not context.quiet:
            from watcher.show import tables

            sys.stdout.write(tables.healthy_line(report))
    return code


def _show(context: Context, report: cycle.Report) -> None:
    from watcher.show import tables

    context.show(tables.audit(report, verbose=context.verbose))
