"""``prepare``: for the server's own unit, just before it starts."""

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

from watcher.commands import declare
from watcher.commands.context import Context, complain
from watcher.errors import Exit, WatchError, named
from watcher.ollama import names
from watcher.system import advice, stopping

PREPARE_SECONDS = 20  #: the server's start waits no longer than this
_PREPARE_ENDS_SECONDS = 5.0  #: nothing more is begun in the last of them
_PREPARE_READS_SECONDS = 10.0  #: so long data is read that may be incomplete
_SHOWN = 5


@declare.command(
    examples=["prepare", "-q prepare"], read_on="docs/service.md: the unit that calls it"
)
def prepare(context: Context) -> Exit:
    """Protect and repair downloads before a server starts (for its unit).

    Exits with 0 whatever the state of the store, with 2 for a wrong setting.
    """
    from dataclasses import replace

    from watcher.act import durability
    from watcher.decide import modes
    from watcher.reconcile import Reconciler
    from watcher.show import documents, plans

    began = time.monotonic()
    until = began + PREPARE_SECONDS

    def stops() -> bool:
        return time.monotonic() >= until - _PREPARE_ENDS_SECONDS

    try:
        hosts = context.hosts(changes=True)
        with _limited(until):
            for host in hosts:
                limited = replace(host, stops=stops, reads_until=began + _PREPARE_READS_SECONDS)
                reconciler = Reconciler(limited, context.settings)
                # The times first, and quickly: whatever else there is time for, the start deletes
                # nothing. Where nothing can be written down, the run that follows reports why.
                with contextlib.suppress(OSError):
                    reconciler.keep_fresh(modes.PREPARE_TIMES)
                report = reconciler.reconcile(modes.PREPARE)
                if context.json:
                    context.document(documents.acting("prepare", report))
                elif not context.quiet and (report.outcomes or report.warnings):
                    context.show(plans.outcomes(report))
                for each in report.evidence.census.failing:
                    complain(f"ollama-watch: {names.printable(each.path)}: {each.why}")
                memory = report.memory
                if memory and (left := durability.still_doubted(memory, report.evidence)):
                    _name_doubted(host.store, host.found_by, left)
            for host in hosts:
                durability.sync_noted(host, context.settings)
    except (WatchError, OSError, MemoryError, RuntimeError, _TimeIsUp) as error:
        complain(f"ollama-watch: {named(error) or error}")
    return Exit.HEALTHY


def _name_doubted(store: str, found_by: str, left: list[str]) -> None:
    """Name what there was no time to read, and what does."""
    shown = [names.short(digest) for digest in left[:_SHOWN]]
    more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
    which = advice.on(store, found_by, "repair", *(shown if not more else ()))
    complain(
        f"ollama-watch: not read in time: {', '.join(shown)}{more}; the machine started anew"
        " before that data was surely on the disk, so its progress files may claim too much"
        f"\n  -> {which}"
    )


class _TimeIsUp(BaseException):
    """The server has waited long enough."""


@contextlib.contextmanager
def _limited(until: float) -> Iterator[None]:
    """End the block at a time of the monotonic clock; what it had begun is undone."""

    def stop(_: int, __: FrameType | None) -> None:
        raise _TimeIsUp(f"not done after {PREPARE_SECONDS} s; the rest waits for the next run")

    with stopping.handling({signal.SIGALRM: stop}):
        signal.setitimer(signal.ITIMER_REAL, max(0.1, until - time.monotonic()))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
