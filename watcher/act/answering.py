"""Answering what has to be known before anything is decided: registries asked, files hashed."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain

from watcher.act import hashing
from watcher.act.journal import Journal, locked
from watcher.decide import transitions
from watcher.model import Action, ActionKind, Outcome, Result, Rules
from watcher.observe import place
from watcher.observe.host import Host
from watcher.ollama import names, registry
from watcher.ollama.names import ModelName
from watcher.state import folders

#: Answers are written down this often, so that a kill loses little.
_KEEP_SECONDS = 30.0
#: So often a registry may leave one question after another unanswered.
_SILENT_TIMES = 3


def answer(
    host: Host, rules: Rules, questions: Iterable[Action]
) -> tuple[tuple[Outcome, ...], bool]:
    """Ask and hash, with no lock held meanwhile, and keep the answers in the memory.

    Gives back the answers, and whether they could be kept.
    """
    asked = [action for action in questions if action.kind is ActionKind.ASK_REGISTRY]
    hashed = [action for action in questions if action.kind is ActionKind.HASH]
    answers: list[Outcome] = []
    kept, is_kept = 0, True
    with folders.opened_store(host.store) as store:
        keep_at = time.monotonic() + _KEEP_SECONDS
        found = chain(ask(asked, host), hashing.find_out(store, hashed, host))
        for outcome in found:
            answers.append(outcome)
            if time.monotonic() >= keep_at:
                is_kept &= _keep(host, rules, store, answers[kept:])
                kept, keep_at = len(answers), time.monotonic() + _KEEP_SECONDS
        is_kept &= _keep(host, rules, store, answers[kept:])
    return tuple(answers), is_kept


def _keep(host: Host, rules: Rules, store: int, answers: list[Outcome]) -> bool:
    # Where nothing can be written the answers still tell what to do; that it can't be done is told
    # by who acts.
    with contextlib.suppress(OSError), locked(store, rules.mode.lock_seconds):
        journal = Journal(store, rules.settings, host)
        start, now = place.start(host), host.clock()
        known = transitions.proved(journal.recall(), answers, now, start.id, start.at)
        return journal.save(known)
    return False


def ask(actions: Iterable[Action], host: Host) -> Iterator[Outcome]:
    """Ask for each action's digest, by its models in turn until one's registry knows it.

    The length of an unfinished download is believed only if the registry's manifest of the model
    has it, too, and only that of the registry which its first model comes from: whoever has a
    registry can say anything of a digest.

    What was not asked when `host.stops` has no outcome. A registry that does not
    answer some times in a row is asked nothing more.
    """
    silent: Counter[str] = Counter()
    for action in actions:
        if host.stops():
            return
        length, said = None, "the registry has nothing"
        models = list(filter(None, map(names.parse_model, action.models)))
        if action.expects:
            models = [each for each in models if each.host == models[0].host]
        for model in models:
            if silent[model.host] >= _SILENT_TIMES:
                said = f"{model.host} does not answer"
                continue
            try:
                length = host.registry_length(model, action.subject)
                doubt = _doubt(host, model, action, length)
            except OSError as error:
                silent[model.host] += 1
                said = f"{model.host} does not answer: {error.strerror or error}"
                continue
            silent[model.host] = 0
            if doubt:
                length, said = None, doubt
            elif length is not None:
                said = f"the registry has {length} bytes of it"
                break
        yield Outcome(action, Result.DONE, said, length=length)


def _doubt(host: Host, model: ModelName, action: Action, length: int | None) -> str:
    """Why a length that a registry says is not believed. Raises OSError."""
    if length is None or not action.expects:
        return ""
    raw = host.registry_manifest(None, model).raw
    if raw is None:
        return f"{model.host} says {length:,} bytes, and gives no manifest of {model.shown}"
    named = registry.sizes(raw).get(action.subject)
    if named == length:
        return ""
    says = "does not name it" if named is None else f"says {named:,}"
    return f"{model.host} says {length:,} bytes, and its manifest of {model.shown} {says}"
