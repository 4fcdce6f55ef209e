"""``audit``: look, and write nothing at all."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from watcher import cycle, names
from watcher.commands.context import Context, patience
from watcher.errors import Exit, NoPermissionError
from watcher.model import Severity
from watcher.show import documents, lines


def audit(context: Context, fail_on: Severity, picture: Path | None = None) -> Exit:
    """Look at each store and tell. FINDINGS where one is at least as severe as `fail_on`.

    `picture`: where to save what is shown as an SVG.
    """
    code = Exit.HEALTHY
    for world in context.worlds(keeps=False):
        with patience(f"looking at {names.printable(world.store)}"):
            policy = replace(context.policy, repair=True, clean=True)
            report = cycle.cycle(world, policy, consent=cycle.nothing)
        if picture is not None:
            _draw(report, picture, verbose=context.verbose)
        findings = report.verdict.findings
        if any(finding.severity.rank >= fail_on.rank for finding in findings):
            code = Exit.FINDINGS
        if context.json:
            context.document(documents.audit(report))
        elif findings or report.verdict.judged:
            if not (context.quiet and all(f.severity is Severity.INFO for f in findings)):
                _show(context, report)
        elif not context.quiet:
            sys.stdout.write(lines.healthy_line(report))
    return code


def _draw(report: cycle.Report, picture: Path, *, verbose: bool) -> None:
    from watcher.show import tables

    svg = tables.picture(tables.audit(report, verbose=verbose), title="ollama-watch audit")
    try:
        picture.write_text(svg, encoding="utf-8")
    except OSError as error:
        raise NoPermissionError(
            f"{picture}: the picture can't be saved: {error.strerror}", "name another file"
        ) from None


def _show(context: Context, report: cycle.Report) -> None:
    from watcher.show import tables

    context.show(tables.audit(report, verbose=context.verbose))
