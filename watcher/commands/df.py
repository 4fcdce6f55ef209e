"""``df``: what uses the space; writes nothing."""

from watcher.commands import declare
from watcher.commands.context import Context, complain
from watcher.errors import Exit
from watcher.ollama import names


@declare.command(
    examples=["df", "-v df", "df --json"],
    read_on="docs/reference/json.md: the document of --json; docs/store.md: what lies in a store",
)
def df(context: Context) -> Exit:
    """Show what uses the space.

    Models, unfinished downloads, orphaned blobs, quarantine: the sum equals that of du. -v lists
    every model.
    """
    from watcher.decide import findings, modes, usage
    from watcher.show import documents
    from watcher.show import usage as shown

    code = Exit.HEALTHY
    for report in context.scans(modes.SURVEY):
        seen, found = report.evidence, report.evidence.space
        assert found is not None
        uses, total = usage.usage(found, report.diagnosis.diagnosed, seen.census)
        if context.json:
            context.document(documents.df(report, found, uses, total))
        else:
            context.show(shown.table(seen, found, uses, total, verbose=context.verbose))
        for path in found.unlisted:
            code = Exit.FAILED
            complain(f"ollama-watch: {names.printable(path)}/ can't be listed and is not counted")
            if command := findings.made_listable(path, seen):
                complain(f"  -> {command}")
    return code
