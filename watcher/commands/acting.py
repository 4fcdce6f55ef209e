"""The commands that change a store: show the plan, ask, do it, tell what came of it."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType

from watcher import reconcile
from watcher.act import durability
from watcher.commands import lookup
from watcher.commands.context import Context, complain, patience
from watcher.decide import enough, modes, remaining, verifying
from watcher.errors import Exit, WatchError, named
from watcher.model import ActionKind, Approve, Known, Mode, Plan, RefusalKind, Result
from watcher.observe import targets
from watcher.observe.host import Host
from watcher.ollama import names
from watcher.reconcile import Reconciler, Report
from watcher.show import documents, plans, tables, text
from watcher.state import state_folder
from watcher.system import advice

#: The server's start waits for `prepare` no longer than this.
PREPARE_SECONDS = 20
#: In the last of them nothing more is begun: they are for what was begun by then.
_PREPARE_ENDS_SECONDS = 5.0
#: So long data is read that an earlier start of the machine may not have brought to the disk.
_PREPARE_READS_SECONDS = 10.0
#: What is done by them mends nothing.
_LOOKS = reconcile.QUESTIONS | {ActionKind.REFRESH}
_SHOWN = 5
_NOTHING_LEFT = remaining.Remaining()


def clean(
    context: Context,
    named: tuple[str, ...],
    *,
    dry_run: bool,
    yes: bool,
    until_free: int | None = None,
) -> Exit:
    """Free what is worth nothing. `until_free`: no more of it than that many bytes free take."""
    return act(context, Request("clean", modes.CLEAN, named, dry_run, yes, until_free=until_free))


def repair(
    context: Context,
    named: tuple[str, ...],
    *,
    dry_run: bool,
    yes: bool,
    wait: bool,
    offline: bool,
) -> Exit:
    """Make interrupted downloads resumable. `wait`: wait until what changed lately is quiet."""
    mode = modes.offline(modes.REPAIR) if offline else modes.REPAIR
    code = act(context, Request("repair", mode, named, dry_run, yes, wait))
    if not dry_run:
        _finish_claims(context)
    return code


def _finish_claims(context: Context) -> None:
    """Bring to the disk what others have claimed ahead of it; who can't may leave that to them."""
    for host in context.hosts(changes=True):
        with contextlib.suppress(WatchError, OSError):
            durability.sync_noted(host, context.settings)


def verify(context: Context, named: tuple[str, ...], most_seconds: float | None) -> Exit:
    """Hash the blobs that were not hashed as they are now, and tell which are not what they say.

    `most_seconds`: begin nothing more after that time; None for no limit.
    """
    code = Exit.HEALTHY
    until = time.monotonic() + (math.inf if most_seconds is None else most_seconds)
    hosts = context.hosts(changes=True, named=bool(named))
    approve, meant = _meant(hosts, named, context.elsewhere)
    for host in hosts:
        shown = replace(host, watch=_hashing_progress(), stops=lambda: time.monotonic() >= until)
        report = Reconciler(shown, context.settings).reconcile(modes.VERIFY, approve=approve)
        sys.stderr.write("\r\033[K" if sys.stderr.isatty() else "")
        done = verifying.verified(report.evidence, report.outcomes, meant)
        ended = _verified_code(report, done)
        if context.json:
            context.document(documents.verified(report, done))
        elif ended is not Exit.HEALTHY:
            context.show(tables.verified(report, done))
        elif not context.quiet:
            context.show([tables.verified_line(done)])
        code = max(code, ended)
    return code


def _verified_code(report: Report, done: verifying.Verified) -> Exit:
    """HEALTHY only where everything was checked, is right, and will be known the next time."""
    if done.unseen or report.warnings or report.stuck:
        return Exit.FAILED
    return Exit.FINDINGS if done.wrong or done.left else Exit.HEALTHY


def _hashing_progress() -> Callable[[int, int], None]:
    """Tells on a terminal how far the hashing has come, its rate and the time left."""
    began = time.monotonic()

    def tell(done: int, total: int) -> None:
        if sys.stderr.isatty() and done:
            rate = done / (time.monotonic() - began)
            left = (total - done) / rate
            text = f"{done:,} of {total:,} bytes, {rate / 1e6:.0f} MB/s, {left:.0f} s left"
            sys.stderr.write(f"\r\033[K{text}")
            sys.stderr.flush()

    return tell


def prepare(context: Context) -> Exit:
    """Just before the server starts: recover, mend, keep what is wanted. Never in its way."""
    until = time.monotonic() + PREPARE_SECONDS
    reads_until = until - PREPARE_SECONDS + _PREPARE_READS_SECONDS
    try:
        hosts = [replace(each, reads_until=reads_until) for each in context.hosts(changes=True)]
        with _limited(until):
            for host in hosts:
                patient = replace(
                    host, stops=lambda: time.monotonic() >= until - _PREPARE_ENDS_SECONDS
                )
                reconciler = Reconciler(patient, context.settings)
                # The times first, and quickly: whatever else there is time for, the start deletes
                # nothing. Where nothing can be written down, the run that follows says why.
                with contextlib.suppress(OSError):
                    reconciler.keep_fresh(modes.PREPARE_TIMES)
                report = reconciler.reconcile(modes.PREPARE)
                if context.json:
                    context.document(documents.acting("prepare", report))
                elif not context.quiet and (report.outcomes or report.warnings):
                    context.show(plans.outcomes(report))
                _tell_doubted(host, report)
            for host in hosts:
                durability.sync_noted(host, context.settings)
    except (WatchError, OSError, MemoryError, RuntimeError, _TimeIsUp) as error:
        complain(f"ollama-watch: {named(error) or error}")
    return Exit.HEALTHY


def _tell_doubted(host: Host, report: Report) -> None:
    """Name what there was no time to read, and what does."""
    if report.memory is None:
        return
    left = durability.still_doubted(report.memory, report.evidence)
    if left:
        shown = [names.short(digest) for digest in left[:_SHOWN]]
        more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
        which = advice.on(host.store, host.found_by, "repair", *(shown if not more else ()))
        complain(
            f"ollama-watch: not read in time: {', '.join(shown)}{more}; the machine started anew"
            " before that data was surely on the disk, so its progress files may claim too much"
            f"\n  -> {which}"
        )


class _TimeIsUp(BaseException):
    """The server has waited long enough."""


@contextmanager
def _limited(until: float) -> Iterator[None]:
    """End the block at a time of the monotonic clock; what it had begun is undone."""

    def stop(_: int, __: FrameType | None) -> None:
        raise _TimeIsUp(f"not done after {PREPARE_SECONDS} s; the rest waits for the next run")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.1, until - time.monotonic()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True, slots=True)
class Request:
    """What an acting command was asked to do."""

    command: str
    mode: Mode
    #: Models and digests; empty: all.
    named: tuple[str, ...] = ()
    dry_run: bool = False
    yes: bool = False
    #: Wait until files that changed lately are quiet.
    wait: bool = False
    #: Remove no more than it takes for so many bytes to be free.
    until_free: int | None = None


def act(context: Context, asked: Request) -> Exit:
    """One acting command over all stores: show the plan, ask, do it, report what came of it."""
    codes = [Exit.HEALTHY]
    hosts = context.hosts(changes=not asked.dry_run, named=bool(asked.named))
    problems: dict[str, str] = {}
    if asked.mode.online:
        with patience("asking registries"):
            looked = [lookup.look_up(host, asked.named, keep=not asked.dry_run) for host in hosts]
        hosts = [each.host for each in looked]
        problems = {key: why for each in looked for key, why in each.problems.items()}
    with lookup.blamed(problems):
        approve, meant = _meant(hosts, asked.named, context.elsewhere)
    for host in hosts:
        state_folder.check(host.store)  # a dry run reports it, too
        chosen = _Choice(context, asked, approve)
        report = replace(_until_quiet(context, host, asked, chosen), plan=chosen.plan)
        left = _remaining(report, asked.mode, meant)
        if context.json:
            context.document(documents.acting(asked.command, report, left))
        else:
            if report.outcomes:
                context.show(plans.outcomes(report))
            elif not chosen.shown:
                _tell_nothing_done(context, report, asked.command, left)
            context.show(plans.remaining(left))
        if not report.outcomes:
            for warning in report.warnings:
                complain(warning)
        codes.append(chosen.unasked or _code(report, left, dry_run=asked.dry_run))
        if asked.until_free is not None:
            codes.append(_tell_shortage(report, asked.until_free, dry_run=asked.dry_run))
    return max(codes)


def _until_quiet(context: Context, host: Host, asked: Request, chosen: _Choice) -> Report:
    """One run; where somebody waits, more of them until nothing has to wait any longer."""
    reconciler = Reconciler(host, context.settings)
    if asked.dry_run:
        report = reconciler.inspect(asked.mode)
        chosen(report.plan)
        return report
    while True:
        report = reconciler.reconcile(asked.mode, approve=chosen)
        left = [
            refusal.seconds_left
            for refusal in chosen.plan.refusals
            if refusal.seconds_left is not None and refusal.kind is RefusalKind.NOT_QUIET
        ]
        waits = asked.wait or (asked.mode.repair and context.can_ask())
        if not left or chosen.unasked or not waits:
            return report
        _count_down(max(left))


def _count_down(seconds: float) -> None:
    """Wait, and tell on a terminal how long still."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if sys.stderr.isatty():
            sys.stderr.write(
                f"\r\033[Kwaiting until it is quiet: {advice.duration(left)}, ctrl-C ends it "
            )
            sys.stderr.flush()
        time.sleep(min(1.0, left))
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")


class _Choice:
    """The consent of this command: a plan cut down to what is meant, shown, and asked about."""

    def __init__(self, context: Context, asked: Request, meant: Approve) -> None:
        self._context, self._asked, self._meant = context, asked, meant
        self.plan = Plan()
        self.shown = False
        #: Set where somebody would have to be asked and nobody is there.
        self.unasked: Exit | None = None

    def __call__(self, planned: Plan) -> Plan:
        self.plan = self._meant(planned)
        if self._asked.until_free is not None:
            self.plan = enough.until_free(self.plan, self._asked.until_free)
        if self._asked.yes and not self._asked.dry_run:
            return self.plan
        if not self._context.json and (self.plan.actions or not self._context.quiet):
            self._show()
        if self._asked.dry_run or not self.plan.actions:
            return reconcile.approve_none(self.plan)
        agreed = self._context.agreed("Do it?", "say --yes to do it, -n to only look")
        self.unasked = Exit.USAGE if agreed is None else None
        return self.plan if agreed else reconcile.approve_none(self.plan)

    def _show(self) -> None:
        told = list(plans.plan(self.plan))
        self._context.show(told)
        self.shown = bool(told)


def _meant(
    hosts: list[Host], named: tuple[str, ...], elsewhere: list[Known]
) -> tuple[Approve, remaining.Meant]:
    """The consent to what is about some models or digests, and what that is.

    Raises TargetError.
    """
    found = targets.find(hosts, named, elsewhere)
    return (
        (reconcile.approve_all, remaining.everything) if found is None else (found.of, found.meant)
    )


def _remaining(report: Report, mode: Mode, meant: remaining.Meant) -> remaining.Remaining:
    """What is wrong still with what a command was about, as far as it was to mend or free it."""
    seen, diagnosis = report.evidence, report.diagnosis
    if mode.clean:
        return remaining.of_cleaning(seen, diagnosis, meant)
    if mode.repair:
        actions = (*report.plan.actions, *(each.action for each in report.outcomes))
        told = [refusal.subject for refusal in report.plan.refusals]
        told += [action.subject for action in actions if action.kind not in _LOOKS]
        return remaining.of_repair(seen, diagnosis, told, meant)
    return remaining.Remaining()


def _tell_nothing_done(
    context: Context, report: Report, name: str, left: remaining.Remaining
) -> None:
    if report.plan.refusals:
        context.show(plans.plan(report.plan))
    elif not context.quiet and not left.findings and not left.blind:
        sys.stdout.write(f"nothing to {name}\n")


def _tell_shortage(report: Report, wanted: int, *, dry_run: bool) -> Exit:
    """Tell what more it would take for so many bytes to be free; HEALTHY where they are."""
    freed = sum(outcome.freed for outcome in report.outcomes)
    left = wanted - report.plan.free - (report.plan.frees if dry_run else freed)
    if left <= 0:
        return Exit.HEALTHY
    complain(text.render(plans.shortage(report.plan, left), color=False).rstrip())
    return Exit.FINDINGS


def _code(
    report: Report,
    left: remaining.Remaining = _NOTHING_LEFT,
    *,
    dry_run: bool,
) -> Exit:
    results = {outcome.result for outcome in report.outcomes}
    if Result.FAILED in results or report.stuck or left.blind:
        return Exit.FAILED
    if report.plan.refusals or Result.REFUSED in results:
        return Exit.REFUSED
    undone = len(report.plan.actions) > len(report.outcomes)
    undone = undone or bool(left.findings)
    return Exit.FINDINGS if undone or (dry_run and report.plan.actions) else Exit.HEALTHY
