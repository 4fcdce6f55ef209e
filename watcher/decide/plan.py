"""Judgements and policy to a `Plan`: actions, typed refusals, and when to look again. Pure."""

from collections.abc import Iterator

from watcher import model
from watcher.config import Settings
from watcher.decide import actions, cleaning, quarantine, repairing, safety
from watcher.model import Action, Diagnosed, Due, Evidence, Plan, Planned, Refusal, Rules
from watcher.ollama import names
from watcher.system import advice


def make(diagnosed: tuple[Diagnosed, ...], evidence: Evidence, rules: Rules) -> Plan:
    """All that the rules allow to do, and what is refused of it."""
    steps: list[Action] = []
    refusals: list[Refusal] = []
    for step in _steps(diagnosed, evidence, rules):
        if isinstance(step, Action):
            steps.append(step)
        else:
            refusals.append(_with_command(step, diagnosed, evidence, rules))
    steps.sort(key=lambda each: (actions.ORDER[each.kind], -each.frees, -each.saves, each.subject))
    return Plan(
        tuple(steps),
        tuple(refusals),
        _due(diagnosed, evidence, rules, refusals),
        cleaning.spared(diagnosed, evidence, rules) if rules.mode.clean else (),
        evidence.place.free_bytes,
    )


def _steps(diagnosed: tuple[Diagnosed, ...], evidence: Evidence, rules: Rules) -> Iterator[Planned]:
    mode, is_whole = rules.mode, evidence.scope is None
    for each in diagnosed:
        yield from _of_download(each, evidence, rules)
    if mode.hash and is_whole:
        yield from repairing.blobs_in_doubt(evidence)
    if mode.online and is_whole:
        yield from repairing.questions_to_registries(diagnosed, evidence, rules)
    if mode.verify:
        yield from repairing.all_blobs(evidence)
    if mode.repair:
        yield from quarantine.damaged_blobs(evidence, rules)
        yield from quarantine.fetched(diagnosed, evidence, rules)
    if mode.refresh:
        yield from repairing.refresh(diagnosed, evidence, rules)
    yield from quarantine.steps(evidence, rules)
    if mode.clean and is_whole:
        # Whether nothing else names a blob takes all manifests, so a narrow look plans none of it.
        yield from cleaning.orphans(evidence, rules)
        yield from cleaning.temporaries(evidence)


def _of_download(each: Diagnosed, evidence: Evidence, rules: Rules) -> Iterator[Planned]:
    mode = rules.mode
    if mode.give_back and each.download.ours:
        yield repairing.give_back(each, evidence)
    if mode.take_over and repairing.is_left(each):
        yield repairing.take_over(each, evidence)
    if mode.clean:
        yield from cleaning.by_the_clock(each, evidence, rules)
    if each.stale and mode.clean:
        yield from cleaning.of_download(each, evidence)
    elif mode.repair and (mode.repair_stale or not each.stale):
        if mode.prove:
            yield from repairing.prove(each, evidence, rules)
        if mode.hash:
            yield from repairing.questions_of(each)
        yield from repairing.of_download(each, evidence, rules)


def _with_command(
    refused: Refusal, diagnosed: tuple[Diagnosed, ...], evidence: Evidence, rules: Rules
) -> Refusal:
    """The refusal with the command that does what was refused, once that is possible."""
    root = refused.kind is model.RefusalKind.OWNER and evidence.caller.uid != 0
    root |= refused.kind is model.RefusalKind.SIGHT and safety.root_sees_more(evidence)
    by_time = refused.kind is model.RefusalKind.NOT_QUIET
    waits = by_time and refused.action is model.ActionKind.WRITE_SIDECARS
    is_pulls = refused.action is model.ActionKind.TAKE_OVER  # which names its own way on
    if refused.command or is_pulls or not (root or waits):
        return refused
    command, after = actions.row(refused.action).command.split(), rules.settings.stale_after
    options = () if after == Settings().stale_after else ("--stale-after", f"{after:.0f}s")
    digest = names.parse_blob(refused.subject).digest or refused.subject
    stale = any(each.stale and each.digest == digest for each in diagnosed)
    if command[0] == "quarantine":
        words = (*command, refused.subject)
    elif command == ["clean"]:
        words = ("clean", *options)
    elif stale and rules.mode.clean:
        words = ("clean", *options, names.short(digest))
    else:
        words = (*command, names.short(digest))
    if waits:
        words = (words[0], "--wait", *words[1:])
    return refused._replace(command=advice.watch(evidence, *words, root=root))


def _due(
    diagnosed: tuple[Diagnosed, ...], evidence: Evidence, rules: Rules, refusals: list[Refusal]
) -> tuple[Due, ...]:
    """When each download is worth another look, by itself: quiet ends, it turns stale."""
    when: list[Due] = []
    for each in diagnosed:
        if each.condition is model.Condition.LIVE:
            after, then = model.QUIET_SECONDS - each.quiet, "counts as interrupted"
            if each.download.writers:  # the close of its file is an event
                after, then = model.LIVE_LOOK_SECONDS, ""
            when.append(Due(evidence.now + after, each.digest, then))
        elif not each.stale:
            stale_at = evidence.now - each.age + rules.settings.stale_after
            when.append(Due(stale_at, each.digest, "becomes stale"))
    digests = {each.digest for each in diagnosed}
    when.extend(
        Due(evidence.now + refusal.seconds_left, refusal.subject)
        for refusal in refusals
        if refusal.seconds_left is not None and refusal.subject in digests
    )
    return tuple(sorted(when))
