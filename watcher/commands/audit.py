"""``audit``: inspect, and write nothing at all."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import click

from watcher.commands import declare
from watcher.commands.context import Context
from watcher.errors import Exit, NoPermissionError
from watcher.ollama import names


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

    Also reports damaged blobs and what the next server start deletes. Writes nothing to the store.
    """
    from watcher.decide import modes
    from watcher.model import Severity
    from watcher.show import documents, tables, text
    from watcher.state import folders, fs

    code = Exit.HEALTHY
    with contextlib.ExitStack() as opened:
        if svg is not None:
            # Before anything else: root's process becomes the owner of a store.
            with _blaming(svg):
                picture = opened.enter_context(folders.opened_output(str(svg)))
        for report in context.scans(modes.INSPECT):
            if svg is not None:
                drawn = text.render(tables.audit(report, verbose=context.verbose), color=True)
                with _blaming(svg):
                    fs.write_output(picture, text.picture(drawn, "audit").encode())
            findings = report.diagnosis.findings
            if any(finding.severity.rank >= Severity(fail_on).rank for finding in findings):
                code = Exit.FINDINGS
            if context.json:
                context.document(documents.audit(report))
            elif not (findings or report.diagnosis.diagnosed):
                if not context.quiet:
                    context.show([tables.healthy(report)])
            elif not context.quiet or any(each.severity.rank for each in findings):
                context.show(tables.audit(report, verbose=context.verbose))
    return code


@contextlib.contextmanager
def _blaming(picture: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        shown = names.printable(str(picture))
        message = f"saving the picture {shown} failed: {error.strerror}"
        raise NoPermissionError(message, "name another file") from None
