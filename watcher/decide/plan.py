"""Judgements and policy to a `Plan`: actions, typed refusals, and when to look again. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from watcher.decide import cleaning, quarantine, questions, repairing, safety
from watcher.model import (
    LIVE_LOOK_SECONDS,
    QUIET_SECONDS,
    Action,
    Condition,
    Due,
    Evidence,
    Judged,
    Plan,
    Policy,
    Refusal,
    RefusalKind,
    Verb,
)
from watcher.ollama import names
from watcher.system import advice

#: In this order: finding out, mending, freeing; times last, since they cover new sidecars, too.
_ORDER = (
    Verb.ASK_REGISTRY,
    Verb.HASH,
    Verb.WRITE_SIDECARS,
    Verb.QUARANTINE_BLOB,
    Verb.RESTORE,
    Verb.PURGE,
    Verb.REMOVE_SURPLUS,
    Verb.REMOVE_DOWNLOAD,
    Verb.REMOVE_ORPHAN,
    Verb.REMOVE_TEMPORARY,
    Verb.REFRESH,
)


def make(judged: tuple[Judged, ...], evidence: Evidence, policy: Policy) -> Plan:
    """All that the policy allows to do, and what is refused of it."""
    actions: list[Action] = []
    refusals: list[Refusal] = []
    for step in _steps(judged, evidence, policy):
        if isinstance(step, Action):
            actions.append(step)
        else:
            refusals.append(_with_command(step, judged, evidence, policy))
    actions.sort(key=lambda each: (_ORDER.index(each.verb), -each.frees, -each.saves, each.subject))
    return Plan(
        tuple(actions),
        tuple(refusals),
        _due(judged, evidence, policy, refusals),
        cleaning.spared(judged, evidence, policy) if policy.clean else (),
        evidence.place.free_bytes,
    )


def _steps(
    judged: tuple[Judged, ...], evidence: Evidence, policy: Policy
) -> Iterator[Action | Refusal]:
    for each in judged:
        if policy.clean:
            yield from cleaning.by_the_clock(each, evidence, policy)
        if each.stale and policy.clean:
            yield from cleaning.of_download(each, evidence)
        elif policy.repair and (policy.repair_stale or not each.stale):
            if policy.hash:
                yield from questions.of_download(each)
            yield from repairing.of_download(each, evidence, policy)
    if policy.hash and evidence.scope is None:
        yield from questions.blobs_in_doubt(evidence)
    if policy.online and evidence.scope is None:
        yield from questions.of_registry(judged, evidence)
    if policy.verify:
        yield from questions.all_blobs(evidence)
    if policy.repair:
        yield from repairing.damaged_blobs(evidence, policy)
    if policy.refresh:
        yield from repairing.refresh(judged, evidence, policy)
    yield from quarantine.steps(evidence, policy)
    if policy.clean and evidence.scope is None:
        # Whether nothing else names a blob takes all manifests, so a narrow look plans none of it.
        yield from cleaning.orphans(evidence, policy)
        yield from cleaning.temporaries(evidence)


def _with_command(
    refused: Refusal, judged: tuple[Judged, ...], evidence: Evidence, policy: Policy
) -> Refusal:
    """The refusal with the command that does what was refused, once that is possible."""
    if refused.command:
        return refused
    root = refused.kind is RefusalKind.OWNER and evidence.caller.uid != 0
    root |= refused.kind is RefusalKind.SIGHT and safety.root_sees_more(evidence)
    waits = refused.kind is RefusalKind.NOT_QUIET and refused.verb is Verb.WRITE_SIDECARS
    if not (root or waits):
        return refused
    words = _asked_again(refused, judged, policy)
    if waits:
        words = (words[0], "--wait", *words[1:])
    return refused._replace(command=advice.watch(evidence, *words, root=root))


def _asked_again(refused: Refusal, judged: tuple[Judged, ...], policy: Policy) -> tuple[str, ...]:
    """The words of the command that does what was refused, and nothing else where that is said."""
    if refused.verb in (Verb.RESTORE, Verb.PURGE):
        return "quarantine", refused.verb.value, refused.subject
    after = () if policy.stale_after == Policy().stale_after else (f"{policy.stale_after:.0f}s",)
    options = ("--stale-after", *after) if after else ()
    if refused.verb in (Verb.REMOVE_ORPHAN, Verb.REMOVE_TEMPORARY):
        return "clean", *options
    digest = names.parse_blob(refused.subject).digest or refused.subject
    stale = any(each.stale and each.digest == digest for each in judged)
    if stale and policy.clean:
        return "clean", *options, names.short(digest)
    return "repair", names.short(digest)


def _due(
    judged: tuple[Judged, ...], evidence: Evidence, policy: Policy, refusals: list[Refusal]
) -> tuple[Due, ...]:
    """When each download is worth another look, by itself: quiet ends, it turns stale."""
    when: list[Due] = []
    for each in judged:
        if each.condition is Condition.LIVE:
            # With a writer the close of its file tells; without one only time does.
            after = LIVE_LOOK_SECONDS if each.download.writers else QUIET_SECONDS - each.quiet
            when.append(Due(evidence.now + after, each.digest))
        elif not each.stale:
            when.append(Due(evidence.now - each.age + policy.stale_after, each.digest))
    digests = {each.digest for each in judged}
    when.extend(
        Due(evidence.now + refusal.seconds_left, refusal.subject)
        for refusal in refusals
        if refusal.seconds_left is not None and refusal.subject in digests
    )
    return tuple(sorted(when))
