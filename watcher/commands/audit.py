"""``audit``: look, and write nothing at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from watcher import reconcile
from watcher.commands.context import Context, patience
from watcher.errors import Exit, NoPermissionError
from watcher.model import Severity
from watcher.ollama import names
from watcher.reconcile import Reconciler
from watcher.show import documents, tables, text
from watcher.state import folders, fs


def audit(context: Context, fail_on: Severity, picture: Path | None = None) -> Exit:
    """Look at each store and tell. FINDINGS where one is at least as severe as `fail_on`.

    `picture`: where to save what is shown as an SVG.
    """
    with contextlib.ExitStack() as opened:
        # Before anything else: root's process becomes the owner of a store.
        save = None if picture is None else _saving(picture, opened)
        return _audit(context, fail_on, save)


def _audit(context: Context, fail_on: Severity, save: Callable[[str], None] | None) -> Exit:
    code = Exit.HEALTHY
    for host in context.hosts(changes=False):
        with patience(f"looking at {names.printable(host.store)}"):
            report = Reconciler(host, context.settings).inspect()
        if save is not None:
            save(_drawn(report, verbose=context.verbose))
        findings = report.diagnosis.findings
        if any(finding.severity.rank >= fail_on.rank for finding in findings):
            code = Exit.FINDINGS
        if context.json:
            context.document(documents.audit(report))
        elif findings or report.diagnosis.diagnosed:
            if not (context.quiet and all(f.severity is Severity.INFO for f in findings)):
                context.show(tables.audit(report, verbose=context.verbose))
        elif not context.quiet:
            context.show([tables.healthy(report)])
    return code


def _saving(picture: Path, opened: contextlib.ExitStack) -> Callable[[str], None]:
    """What saves a picture in the file that is opened now. Raises NoPermissionError."""

    def save(svg: str) -> None:
        with _told(picture):
            fs.write_output(fd, svg.encode())

    with _told(picture):
        fd = opened.enter_context(folders.opened_output(str(picture)))
    return save


@contextlib.contextmanager
def _told(picture: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        shown = names.printable(str(picture))
        raise NoPermissionError(
            f"{shown}: the picture can't be saved: {error.strerror}", "name another file"
        ) from None


def _drawn(report: reconcile.Report, *, verbose: bool) -> str:
    drawn = text.render(tables.audit(report, verbose=verbose), color=True)
    return text.picture(drawn, title="ollama-watch audit")
