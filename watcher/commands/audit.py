"""``audit``: inspect, and write nothing at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from watcher.commands import declare
from watcher.errors import Exit, NoPermissionError

if TYPE_CHECKING:
    from watcher.commands.context import Context
    from watcher.reconcile import Report


@declare.command(
    examples=["audit", "audit --json --fail-on error"],
    read_on="docs/reference/conditions.md: what each condition means; docs/limits.md",
)
@click.option(
    "--fail-on",
    type=click.Choice(["info", "warning", "error"]),
    default="warning",
    show_default=True,
    help="Lowest severity that exits with 1.",
)
@click.option("--svg", type=declare.FILE, metavar="FILE", help="Also save the report as a picture.")
def audit(context: Context, fail_on: str, svg: Path | None) -> Exit:
    """Inspect the store and report the state of every unfinished download.

    Also reports damaged blobs, and what the next server start deletes. Writes nothing to the store.
    """
    with contextlib.ExitStack() as opened:
        # Before anything else: root's process becomes the owner of a store.
        save = None if svg is None else _saving(svg, opened, verbose=context.verbose)
        return _audit(context, fail_on, save)


def _audit(context: Context, fail_on: str, save: Callable[[Report], None] | None) -> Exit:
    from watcher.commands.context import patience
    from watcher.model import Severity
    from watcher.ollama import names
    from watcher.reconcile import Reconciler
    from watcher.show import documents, tables

    code = Exit.HEALTHY
    for host in context.hosts(changes=False):
        with patience(f"scanning {names.printable(host.store)}"):
            report = Reconciler(host, context.settings).inspect()
        if save is not None:
            save(report)
        findings = report.diagnosis.findings
        if any(finding.severity.rank >= Severity(fail_on).rank for finding in findings):
            code = Exit.FINDINGS
        if context.json:
            context.document(documents.audit(report))
        elif findings or report.diagnosis.diagnosed:
            if not (context.quiet and all(f.severity is Severity.INFO for f in findings)):
                context.show(tables.audit(report, verbose=context.verbose))
        elif not context.quiet:
            context.show([tables.healthy(report)])
    return code


def _saving(
    picture: Path, opened: contextlib.ExitStack, *, verbose: bool
) -> Callable[[Report], None]:
    """What saves a report in the file that is opened now. Raises NoPermissionError."""
    from watcher.show import tables, text
    from watcher.state import folders, fs

    def save(report: Report) -> None:
        drawn = text.render(tables.audit(report, verbose=verbose), color=True)
        svg = text.picture(drawn, title="ollama-watch audit")
        with _named(picture):
            fs.write_output(fd, svg.encode())

    with _named(picture):
        fd = opened.enter_context(folders.opened_output(str(picture)))
    return save


@contextlib.contextmanager
def _named(picture: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        from watcher.ollama import names

        shown = names.printable(str(picture))
        raise NoPermissionError(
            f"saving the picture {shown} failed: {error.strerror}", "name another file"
        ) from None
