"""The commands that change a store: show the plan, ask, do it, tell what came of it."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType

from watcher import reconcile
from watcher.act import durability, refresh
from watcher.commands import lookup
from watcher.commands.context import Context, complain, patience
from watcher.decide import enough, remaining, verifying
from watcher.errors import Exit, LockedError, WatchError, named
from watcher.model import ActionKind, Approve, Known, Plan, Policy, RefusalKind, Result
from watcher.observe import targets
from watcher.observe.host import Host
from watcher.ollama import names
from watcher.show import documents, lines, plans
from watcher.state import state_folder
from watcher.system import advice

#: The server's start waits for `prepare` no longer than this.
PREPARE_SECONDS = 20
#: In the last of them nothing more is begun: they are for what was begun by then.
_PREPARE_ENDS_SECONDS = 5.0
_PREPARE_LOCK_SECONDS = 5.0
#: So long data is read that an earlier start of the machine may not have brought to the disk.
_PREPARE_READS_SECONDS = 10.0
_REFRESH_LOCK_SECONDS = 1.0
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
    policy = replace(context.policy, clean=True, repair=False, refresh=False, purge_replaced=True)
    return act(context, "clean", policy, named, dry_run=dry_run, yes=yes, until_free=until_free)


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
    policy = replace(
        context.policy,
        clean=False,
        repair=True,
        refresh=True,
        repair_stale=True,
        hash=True,
        online=not offline,
        read_limit_bytes=None,
    )
    code = act(context, "repair", policy, named, dry_run=dry_run, yes=yes, wait=wait)
    if not dry_run:
        _finish_claims(context, policy)
    return code


def _finish_claims(context: Context, policy: Policy) -> None:
    """Bring to the disk what others have claimed ahead of it; who can't may leave that to them."""
    for host in context.hosts(keeps=True):
        with contextlib.suppress(WatchError, OSError):
            durability.sync_noted(host, policy, lambda: False)


def verify(context: Context, named: tuple[str, ...], most_seconds: float | None) -> Exit:
    """Hash the blobs that were not hashed as they are now, and tell which are not what they say.

    `most_seconds`: begin nothing more after that time; None for no limit.
    """
    policy = replace(context.policy, repair=False, clean=False, hash=True, verify=True)
    code = Exit.HEALTHY
    until = time.monotonic() + (math.inf if most_seconds is None else most_seconds)
    hosts = context.hosts(keeps=True, named=bool(named))
    approve, meant = _meant(hosts, named, context.elsewhere)
    for host in hosts:
        shown = replace(host, watch=_hashing_progress())
        report = reconcile.cycle(
            shown, policy, approve=approve, stop=lambda: time.monotonic() >= until
        )
        sys.stderr.write("\r\033[K" if sys.stderr.isatty() else "")
        done = verifying.verified(report.evidence, report.outcomes, meant)
        ended = _verified_code(report, done)
        if context.json:
            context.document(documents.verified(report, done))
        elif ended is not Exit.HEALTHY:
            from watcher.show import tables

            context.show(tables.verified(report, done))
        elif not context.quiet:
            sys.stdout.write(lines.verified_line(done))
        code = max(code, ended)
    return code


def _verified_code(report: reconcile.Report, done: verifying.Verified) -> Exit:
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
    policy = replace(context.policy, clean=False, repair=True, refresh=True, sync_behind=True)
    until = time.monotonic() + PREPARE_SECONDS
    reads_until = until - PREPARE_SECONDS + _PREPARE_READS_SECONDS
    try:
        hosts = [replace(each, reads_until=reads_until) for each in context.hosts(keeps=True)]
        with _limited(until):
            for host in hosts:
                _keep_wanted(host, policy)
                report = reconcile.cycle(
                    host,
                    policy,
                    lock_seconds=_PREPARE_LOCK_SECONDS,
                    stop=lambda: time.monotonic() >= until - _PREPARE_ENDS_SECONDS,
                )
                if context.json:
                    context.document(documents.acting("prepare", report))
                elif not context.quiet and (report.outcomes or report.warnings):
                    context.tell(plans.outcomes(report))
                _tell_doubted(host, report)
            for host in hosts:
                durability.sync_noted(host, policy, lambda: False)
    except (WatchError, OSError, MemoryError, RuntimeError, _TimeIsUp) as error:
        complain(f"ollama-watch: {named(error) or error}")
    return Exit.HEALTHY


def _tell_doubted(host: Host, report: reconcile.Report) -> None:
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


def _keep_wanted(host: Host, policy: Policy) -> None:
    """The times first, and quickly: whatever else there is time for, the start deletes nothing."""
    quickly = replace(policy, repair=False, read_limit_bytes=0)
    plan = reconcile.cycle(replace(host, keeps=False), quickly).plan
    if not plan.actions:
        return
    try:
        reconcile.keep_fresh(host, quickly, plan, _REFRESH_LOCK_SECONDS)
    except LockedError:
        # Who has the lock may have it for long. Without it the own times can't be remembered, but
        # a download whose times are too fresh is worth more than one that is gone.
        refresh.set_times_now(host.store, plan.actions, host.clock())
    except OSError:
        pass  # nothing can be written down; the cycle that follows says why


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


def act(
    context: Context,
    name: str,
    policy: Policy,
    named: tuple[str, ...],
    *,
    dry_run: bool,
    yes: bool,
    wait: bool = False,
    until_free: int | None = None,
) -> Exit:
    """One acting command over all stores: what `policy` plans of the named, shown, asked, done."""
    codes = [Exit.HEALTHY]
    hosts = context.hosts(keeps=not dry_run, named=bool(named))
    problems: dict[str, str] = {}
    if policy.online:
        with patience("asking registries"):
            looked = [lookup.look_up(host, named) for host in hosts]
        hosts = [each.host for each in looked]
        problems = {key: why for each in looked for key, why in each.problems.items()}
    with lookup.blamed(problems):
        approve, meant = _meant(hosts, named, context.elsewhere)
    for host in hosts:
        state_folder.check(host.store)  # what only looks tells it, too
        chosen = _Choice(context, approve, until_free, dry_run=dry_run, yes=yes)
        report = _until_quiet(context, host, policy, chosen, wait=wait and not dry_run)
        report = replace(report, plan=chosen.plan)
        left = _remaining(report, policy, meant)
        if context.json:
            context.document(documents.acting(name, report, left))
        else:
            if report.outcomes:
                context.tell(plans.outcomes(report))
            elif not chosen.shown:
                _tell_nothing_done(context, report, name, left)
            context.tell(plans.remaining(left))
        if not report.outcomes:
            for trouble in report.warnings:
                complain(trouble)
        codes.append(chosen.unasked or _code(report, left, dry_run=dry_run))
        if until_free is not None:
            codes.append(_tell_shortage(report, until_free, dry_run=dry_run))
    return max(codes)


def _until_quiet(
    context: Context, host: Host, policy: Policy, chosen: _Choice, *, wait: bool
) -> reconcile.Report:
    """One cycle; where somebody waits, more of them until nothing has to wait any longer."""
    while True:
        report = reconcile.cycle(host, policy, approve=chosen)
        left = [
            refusal.seconds_left
            for refusal in chosen.plan.refusals
            if refusal.seconds_left is not None and refusal.kind is RefusalKind.NOT_QUIET
        ]
        asked = context.can_ask() and policy.repair and host.keeps
        if not left or chosen.unasked or not (wait or asked):
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

    def __init__(
        self,
        context: Context,
        meant: Approve,
        until_free: int | None,
        *,
        dry_run: bool,
        yes: bool,
    ) -> None:
        self._context, self._meant, self._until_free = context, meant, until_free
        self._dry_run, self._yes = dry_run, yes
        self.plan = Plan()
        self.shown = False
        #: Set where somebody would have to be asked and nobody is there.
        self.unasked: Exit | None = None

    def __call__(self, planned: Plan) -> Plan:
        self.plan = self._meant(planned)
        if self._until_free is not None:
            self.plan = enough.until_free(self.plan, self._until_free)
        if self._yes and not self._dry_run:
            return self.plan
        if not self._context.json and (self.plan.actions or not self._context.quiet):
            self._show()
        if self._dry_run or not self.plan.actions:
            return reconcile.nothing(self.plan)
        agreed = self._context.agreed("Do it?", "say --yes to do it, -n to only look")
        self.unasked = Exit.USAGE if agreed is None else None
        return self.plan if agreed else reconcile.nothing(self.plan)

    def _show(self) -> None:
        told = plans.plan(self.plan)
        self._context.tell(told)
        self.shown = bool(told)


def _meant(
    hosts: list[Host], named: tuple[str, ...], elsewhere: list[Known]
) -> tuple[Approve, remaining.Meant]:
    """The consent to what is about some models or digests, and what that is.

    Raises TargetError.
    """
    found = targets.find(hosts, named, elsewhere)
    return (
        (reconcile.everything, remaining.everything) if found is None else (found.of, found.meant)
    )


def _remaining(
    report: reconcile.Report, policy: Policy, meant: remaining.Meant
) -> remaining.Remaining:
    """What is wrong still with what a command was about, as far as it was to mend or free it."""
    seen, diagnosis = report.evidence, report.diagnosis
    if policy.clean:
        return remaining.of_cleaning(seen, diagnosis, meant)
    if policy.repair:
        actions = (*report.plan.actions, *(each.action for each in report.outcomes))
        told = [refusal.subject for refusal in report.plan.refusals]
        told += [action.subject for action in actions if action.kind not in _LOOKS]
        return remaining.of_repair(seen, diagnosis, told, meant)
    return remaining.Remaining()


def _tell_nothing_done(
    context: Context, report: reconcile.Report, name: str, left: remaining.Remaining
) -> None:
    if report.plan.refusals:
        context.tell(plans.plan(report.plan))
    elif not context.quiet and not left.findings and not left.blind:
        sys.stdout.write(f"nothing to {name}\n")


def _tell_shortage(report: reconcile.Report, wanted: int, *, dry_run: bool) -> Exit:
    """Tell what more it would take for so many bytes to be free; HEALTHY where they are."""
    freed = sum(outcome.freed for outcome in report.outcomes)
    left = wanted - report.plan.free - (report.plan.frees if dry_run else freed)
    if left <= 0:
        return Exit.HEALTHY
    complain(plans.render(plans.shortage(report.plan, left), color=False).rstrip())
    return Exit.FINDINGS


def _code(
    report: reconcile.Report,
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
