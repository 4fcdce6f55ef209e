"""``clean``: free what is worth nothing."""

from __future__ import annotations

import sys
from dataclasses import replace

from watcher import cycle, names
from watcher.commands.context import Context, complain
from watcher.errors import Exit
from watcher.model import Action, Plan, Refusal, Result
from watcher.show import documents


def clean(context: Context, targets: tuple[str, ...], *, dry_run: bool, yes: bool) -> Exit:
    """Show the plan, ask, and do it. Without a terminal and without `yes` nothing is done."""
    codes = [Exit.HEALTHY]
    for world in context.worlds(keeps=not dry_run):
        chosen = _Choice(context, targets, dry_run=dry_run, yes=yes)
        report = cycle.cycle(world, context.policy, consent=chosen)
        report = replace(report, plan=chosen.plan)
        if context.json:
            context.document(documents.clean(report))
        elif report.outcomes:
            _tell(context, report)
        elif not chosen.shown:
            _tell_nothing_done(context, report)
        for trouble in report.troubles if not report.outcomes else ():
            complain(trouble)
        codes.append(chosen.unasked or _code(report, dry_run=dry_run))
    return max(codes, key=_rank)


class _Choice:
    """The consent of this command: a plan cut down to the targets, shown, and asked about."""

    def __init__(
        self, context: Context, targets: tuple[str, ...], *, dry_run: bool, yes: bool
    ) -> None:
        self._context, self._targets, self._dry_run, self._yes = context, targets, dry_run, yes
        self.plan = Plan()
        self.shown = False
        #: Set where somebody would have to be asked and nobody is there.
        self.unasked: Exit | None = None

    def __call__(self, planned: Plan) -> Plan:
        self.plan = only(planned, self._targets)
        if self._yes and not self._dry_run:
            return self.plan
        if not self._context.json and (self.plan.actions or not self._context.quiet):
            self._show()
        if self._dry_run or not self.plan.actions:
            return cycle.nothing(self.plan)
        if self._context.json or not (sys.stdin.isatty() and sys.stdout.isatty()):
            complain("nothing was done: nobody to ask here; say --yes to do it, -n to only look")
            self.unasked = Exit.USAGE
            return cycle.nothing(self.plan)
        import click

        agreed = click.confirm("Do it?", default=False)
        return self.plan if agreed else cycle.nothing(self.plan)

    def _show(self) -> None:
        from watcher.show import tables

        parts = tables.plan(self.plan)
        if parts:
            self._context.show(parts)
            self.shown = True


def only(planned: Plan, targets: tuple[str, ...]) -> Plan:
    """The part of a plan that is about some models or digests; all of it without targets."""
    if not targets:
        return planned
    return replace(
        planned,
        actions=tuple(each for each in planned.actions if _meant(each, targets)),
        refusals=tuple(each for each in planned.refusals if _meant(each, targets)),
    )


def _meant(item: Action | Refusal, targets: tuple[str, ...]) -> bool:
    for target in targets:
        model = names.parse_model(target)
        if model is not None and model.shown in item.models:
            return True
        digest = target.removeprefix("sha256:").removeprefix("sha256-").lower()
        if len(digest) >= 4 and item.subject.lower().removeprefix("sha256-").startswith(digest):
            return True
    return False


def _tell(context: Context, report: cycle.Report) -> None:
    from watcher.show import tables

    context.show(tables.outcomes(report))


def _tell_nothing_done(context: Context, report: cycle.Report) -> None:
    from watcher.show import tables

    if report.plan.refusals:
        context.show(tables.plan(report.plan))
    elif not context.quiet:
        sys.stdout.write("nothing to clean\n")


def _code(report: cycle.Report, *, dry_run: bool) -> Exit:
    results = {outcome.result for outcome in report.outcomes}
    if Result.FAILED in results:
        return Exit.FAILED
    if report.plan.refusals or Result.REFUSED in results:
        return Exit.REFUSED
    undone = len(report.plan.actions) > len(report.outcomes)
    return Exit.FINDINGS if undone or (dry_run and report.plan.actions) else Exit.HEALTHY


def _rank(code: Exit) -> int:
    """Of several stores the worst counts: 1 yields to 3, and 3 to 4."""
    return int(code)
