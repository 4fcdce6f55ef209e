"""Judgements and policy to a `Plan`: actions, typed refusals, and when to look again. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from watcher.config import Settings
from watcher.decide import actions, cleaning, quarantine, questions, repairing, safety
from watcher.model import (
    LIVE_LOOK_SECONDS,
    QUIET_SECONDS,
    Action,
    ActionKind,
    Condition,
    Diagnosed,
    Due,
    Evidence,
    Plan,
    Refusal,
    RefusalKind,
    Rules,
)
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


def _steps(
    diagnosed: tuple[Diagnosed, ...], evidence: Evidence, rules: Rules
) -> Iterator[Action | Refusal]:
    for each in diagnosed:
        if rules.mode.clean:
            yield from cleaning.by_the_clock(each, evidence, rules)
        if each.stale and rules.mode.clean:
            yield from cleaning.of_download(each, evidence)
        elif rules.mode.repair and (rules.mode.repair_stale or not each.stale):
            if rules.mode.hash:
                yield from questions.of_download(each)
            yield from repairing.of_download(each, evidence, rules)
    if rules.mode.hash and evidence.scope is None:
        yield from questions.blobs_in_doubt(evidence)
    if rules.mode.online and evidence.scope is None:
        yield from questions.of_registry(diagnosed, evidence)
    if rules.mode.verify:
        yield from questions.all_blobs(evidence)
    if rules.mode.repair:
        yield from repairing.damaged_blobs(evidence, rules)
    if rules.mode.refresh:
        yield from repairing.refresh(diagnosed, evidence, rules)
    yield from quarantine.steps(evidence, rules)
    if rules.mode.clean and evidence.scope is None:
        # Whether nothing else names a blob takes all manifests, so a narrow look plans none of it.
        yield from cleaning.orphans(evidence, rules)
        yield from cleaning.temporaries(evidence)


def _with_command(
    refused: Refusal, diagnosed: tuple[Diagnosed, ...], evidence: Evidence, rules: Rules
) -> Refusal:
    """The refusal with the command that does what was refused, once that is possible."""
    if refused.command:
        return refused
    root = refused.kind is RefusalKind.OWNER and evidence.caller.uid != 0
    root |= refused.kind is RefusalKind.SIGHT and safety.root_sees_more(evidence)
    waits = refused.kind is RefusalKind.NOT_QUIET and refused.action is ActionKind.WRITE_SIDECARS
    if not (root or waits):
        return refused
    words = _asked_again(refused, diagnosed, rules)
    if waits:
        words = (words[0], "--wait", *words[1:])
    return refused._replace(command=advice.watch(evidence, *words, root=root))


def _asked_again(
    refused: Refusal, diagnosed: tuple[Diagnosed, ...], rules: Rules
) -> tuple[str, ...]:
    """The words of the command that does what was refused, and nothing else where that is said."""
    command = actions.row(refused.action).command
    if command[0] == "quarantine":
        return *command, refused.subject
    after = rules.settings.stale_after
    usual = after == Settings().stale_after
    options = () if usual else ("--stale-after", f"{after:.0f}s")
    if command == ("clean",):
        return *command, *options
    digest = names.parse_blob(refused.subject).digest or refused.subject
    stale = any(each.stale and each.digest == digest for each in diagnosed)
    if stale and rules.mode.clean:
        return "clean", *options, names.short(digest)
    return *command, names.short(digest)


def _due(
    diagnosed: tuple[Diagnosed, ...], evidence: Evidence, rules: Rules, refusals: list[Refusal]
) -> tuple[Due, ...]:
    """When each download is worth another look, by itself: quiet ends, it turns stale."""
    when: list[Due] = []
    for each in diagnosed:
        if each.condition is Condition.LIVE:
            # With a writer the close of its file tells; without one only time does.
            after = LIVE_LOOK_SECONDS if each.download.writers else QUIET_SECONDS - each.quiet
            when.append(Due(evidence.now + after, each.digest))
        elif not each.stale:
            when.append(Due(evidence.now - each.age + rules.settings.stale_after, each.digest))
    digests = {each.digest for each in diagnosed}
    when.extend(
        Due(evidence.now + refusal.seconds_left, refusal.subject)
        for refusal in refusals
        if refusal.seconds_left is not None and refusal.subject in digests
    )
    return tuple(sorted(when))
