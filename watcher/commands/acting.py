"""What the commands that change a store share: ask registries, show the plan, ask, do, report."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from watcher import reconcile
from watcher.commands.context import Context, complain, patience, transient
from watcher.decide import cleaning, remaining
from watcher.errors import Exit, TargetError, WatchError
from watcher.model import ActionKind, Approve, Mode, Plan, RefusalKind, Result
from watcher.observe import scan, targets
from watcher.observe.host import Host
from watcher.observe.targets import Targets
from watcher.ollama import manifests, names
from watcher.ollama.names import ModelName
from watcher.reconcile import Reconciler, Report
from watcher.show import documents, plans, text
from watcher.state import folders, registry_cache, state_folder
from watcher.system import advice

_FRESH_SECONDS = 3600.0  #: what was heard within that time is not asked again
#: What is done by them repairs nothing.
_LEAVES = reconcile.QUESTIONS | {ActionKind.REFRESH, ActionKind.QUARANTINE_BLOB}


class Request(NamedTuple):
    command: str
    mode: Mode
    named: tuple[str, ...] = ()  #: models and digests; empty: all
    dry_run: bool = False
    yes: bool = False
    wait: bool = False  #: wait until files that changed lately are quiet
    until_free: int | None = None  #: remove no more than it takes for so many bytes to be free


class _Choice:
    """The consent of this command: a plan cut down to what is meant, shown, and asked about."""

    def __init__(self, context: Context, asked: Request, meant: Approve) -> None:
        self._context, self._asked, self._meant = context, asked, meant
        self._answered: set[tuple[ActionKind, str]] = set()
        self.plan = Plan()
        self.shown = False
        self.unasked: Exit | None = None  #: nobody is there to be asked

    def __call__(self, planned: Plan) -> Plan:
        self.plan = self._meant(planned)
        if self._asked.until_free is not None:
            self.plan = cleaning.until_free(self.plan, self._asked.until_free)
        if self._asked.yes and not self._asked.dry_run:
            if not self._asked.mode.prove:  # nobody waits for what exactly is fetched
                self.plan = self.plan.filtered(lambda each: each.kind is not ActionKind.PROVE)
            return self.plan
        if not self._asked.dry_run and self._context.can_ask():
            # What only finds something out comes before the one prompt, which names the result.
            open_ones = self.plan.filtered(lambda each: each.kind in reconcile.QUESTIONS)
            before = frozenset(self._answered)
            self._answered |= {(each.kind, each.subject) for each in open_ones.actions}
            if self._answered - before:
                return open_ones
            self.plan = self.plan.filtered(lambda each: each.kind not in reconcile.QUESTIONS)
            transient("")
        if not self._context.json and (self.plan.actions or not self._context.quiet):
            lines = list(plans.plan(self.plan))
            self._context.show(lines)
            self.shown = bool(lines)
        if self._asked.dry_run or not self.plan.actions:
            return reconcile.approve_none(self.plan)
        fetches = self.plan.fetches
        question = "Do it?"
        if fetches:
            most = text.size(sum(each.budget for each in self.plan.actions))
            fetched = f"fetch at most {text.size(fetches)} ({most} if some arrive damaged)"
            question = f"Do it, and {fetched}?"
        rest = self.plan.filtered(lambda each: not each.fetches)
        if fetches and rest.actions and self._context.can_ask():
            answer = self._context.ask_of_part(question, "without fetching")
            return rest if answer is None else self._if_agreed(answer)
        return self._if_agreed(
            self._context.ask(question, "add --yes to do it, or -n to see the plan")
        )

    def _if_agreed(self, answer: Exit) -> Plan:
        self.unasked = answer if answer is Exit.USAGE else None
        return reconcile.approve_none(self.plan) if answer else self.plan


def act(context: Context, asked: Request) -> Exit:
    """One acting command over all stores. Raises TargetError for what no store knows."""
    knows = targets.known if asked.named else None
    hosts = context.hosts(changes=not asked.dry_run, knows=knows)
    problems: dict[str, str] = {}
    if asked.mode.online:
        with patience("asking registries"):
            looked = [look_up(host, asked.named, keep=not asked.dry_run) for host in hosts]
        hosts = [host for host, _ in looked]
        problems = {key: why for _, each in looked for key, why in each.items()}
    with blamed(problems):
        about = targets.find(hosts, asked.named, context.elsewhere)
    return max(act_on(context, host, asked, about) for host in hosts)


def look_up(host: Host, wanted: Iterable[str], *, keep: bool = True) -> tuple[Host, dict[str, str]]:
    """Ask about the models among `wanted`, as people name them, and know what their layers are.

    Where nothing is wanted but downloads lie there that nobody knows: about all models that the
    store and its queue name. `keep`: what is heard goes into the store.
    Gives the host with that knowledge; and why nothing was heard, by the model's key.
    """
    typed = [model for text in wanted if (model := names.parse_model(text)) is not None]
    heard: dict[str, registry_cache.Cached] = {}
    problems: dict[str, str] = {}
    silent: set[str] = set()
    with contextlib.suppress(OSError), folders.opened_store(host.store) as store:
        before = registry_cache.cached(store)
        for model in dict.fromkeys(_unsure(host.store, store, typed)):
            known = before.get(model.key)
            if known is not None and known.sizes and 0 <= host.clock() - known.at < _FRESH_SECONDS:
                continue
            if model.host in silent:
                problems[model.key] = f"{model.host} did not answer"
                continue
            assert host.registry_manifest is not None
            answer = host.registry_manifest(store if keep else None, model)
            if answer.problem:
                problems[model.key] = answer.problem
            elif answer.raw is not None and not manifests.sizes(answer.raw):
                problems[model.key] = f"the manifest that {model.host} gives names no layer"
            if answer.problem and answer.silent:
                silent.add(model.host)
            if answer.raw is not None:
                heard[model.key] = registry_cache.as_kept(answer.raw, host.clock())
    layers = partial(registry_cache.known_layers, more=heard)
    return replace(host, known_layers=layers), problems


def _unsure(path: str, store: int, typed: list[ModelName]) -> Iterator[ModelName]:
    """The models, of those typed or, without any, of all, whose layers may be here unnamed."""
    known = targets.known(path)
    here = {shown.lower() for shown in known.models}
    nameless = not scan.unfinished(store) <= frozenset().union(*known.models.values())
    if typed:
        yield from (each for each in typed if nameless or each.key not in here)
        return
    if not nameless:
        return
    from watcher.pull import queue  # to ask about what waits in it is rare

    queued: list[str] = []
    with contextlib.suppress(WatchError):
        queued = [item.model for item in queue.FILE.read(store).line]
    yield from filter(None, map(names.parse_model, (*queued, *known.models)))


@contextlib.contextmanager
def blamed(problems: Mapping[str, str]) -> Iterator[None]:
    """Add to an unknown name what its registry answers."""
    try:
        yield
    except TargetError as error:
        # The sentence ends in the name that means nothing.
        model = names.parse_model(error.message.rpartition(": ")[2])
        why = "" if model is None else problems.get(model.key, "")
        if not why:
            raise
        raise TargetError(f"{error.message}; {why}", error.next_step) from None


def act_on(context: Context, host: Host, asked: Request, about: Targets | None = None) -> Exit:
    """One acting command on a store: show the plan, ask, do it, report the results."""
    state_folder.check(host.store)  # a dry run reports it, too
    if asked.mode.fetch or asked.mode.prove:
        from watcher.transfer.mending import Mender

        mender = Mender(host, context.settings, transient, has_asked=not asked.yes)
        host = replace(host, fetch=mender.fetch, sums=mender.sums)
    chosen = _Choice(context, asked, about.of if about else reconcile.approve_all)
    host = replace(host, watch=_watch)
    report = _until_quiet(context, host, asked, chosen)._replace(plan=chosen.plan)
    transient("")
    left = _remaining(report, asked.mode, about.meant if about else remaining.everything)
    if context.json:
        context.document(documents.acting(asked.command, report, left))
    else:
        if report.outcomes:
            context.show(plans.outcomes(report))
        elif not chosen.shown and report.plan.refusals:
            context.show(plans.plan(report.plan))
        elif not chosen.shown and not left.findings and not left.blind:
            kept = sum(each.frees for each in report.plan.spared)
            when = advice.duration(context.settings.stale_after)
            later = f" yet: {text.size(kept)} becomes stale after {when} without bytes"
            context.note(f"nothing to {asked.command}{later if kept else ''}")
        context.show(plans.remaining(left))
    if not report.outcomes:
        for warning in report.warnings:
            complain(warning)
    code = chosen.unasked or _code(report, left, dry_run=asked.dry_run)
    if asked.until_free is not None:
        freed = sum(outcome.freed for outcome in report.outcomes)
        gained = report.plan.frees if asked.dry_run else freed
        short = asked.until_free - report.plan.free - gained
        if short > 0:
            complain(text.render(plans.shortage(report.plan, short), color=False).rstrip())
            code = max(code, Exit.FINDINGS)
    return code


def _watch(done: int, total: int) -> None:
    transient(f"read {text.part_of(done, total)}, Ctrl-C to stop ")


def _until_quiet(context: Context, host: Host, asked: Request, chosen: _Choice) -> Report:
    """One run; where somebody waits, more of them until nothing has to wait any longer."""
    reconciler = Reconciler(host, context.settings)
    if asked.dry_run:
        report = reconciler.inspect(asked.mode)
        chosen(report.plan)
        return report
    waits = asked.wait or (asked.mode.repair and context.can_ask())
    while True:
        report = reconciler.reconcile(asked.mode, approve=chosen)
        live = (each for each in chosen.plan.refusals if each.kind is RefusalKind.NOT_QUIET)
        left = [each.seconds_left for each in live if each.seconds_left is not None]
        if not left or chosen.unasked or not waits:
            return report
        until = time.monotonic() + max(left)
        while (seconds := until - time.monotonic()) > 0:
            transient(f"waiting for writes to stop ({advice.duration(seconds)}), Ctrl-C to stop ")
            time.sleep(min(1.0, seconds))
        transient("")


def _remaining(report: Report, mode: Mode, meant: remaining.Meant) -> remaining.Remaining:
    seen, diagnosis = report.evidence, report.diagnosis
    if mode.clean:
        return remaining.of_cleaning(seen, diagnosis, meant)
    if mode.repair:
        actions = (*report.plan.actions, *(each.action for each in report.outcomes))
        named = [refusal.subject for refusal in report.plan.refusals]
        named += [action.subject for action in actions if action.kind not in _LEAVES]
        return remaining.of_repair(seen, diagnosis, named, meant)
    return remaining.Remaining()


def _code(report: Report, left: remaining.Remaining, *, dry_run: bool) -> Exit:
    results = {outcome.result for outcome in report.outcomes}
    if Result.FAILED in results or report.stuck or left.blind:
        return Exit.FAILED
    if report.plan.refusals or Result.REFUSED in results:
        return Exit.REFUSED
    undone = len(report.plan.actions) > len(report.outcomes) or left.findings
    return Exit.FINDINGS if undone or (dry_run and report.plan.actions) else Exit.HEALTHY
