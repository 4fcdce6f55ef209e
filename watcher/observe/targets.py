"""What people mean by a model or a digest, as far as a store knows it."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from watcher.errors import TargetError
from watcher.model import Known, Plan
from watcher.observe import scan
from watcher.observe.host import Host
from watcher.ollama import names
from watcher.state import folders, memory, registry_cache

#: Fewer than four digits are more likely a slip than a digest.
_DIGITS = re.compile(r"(?:sha256[:-])?([0-9a-fA-F]{4,64})(?:-partial(?:-[0-9]+)?|\.tmp)?")
_MOST_NEAREST = 5


Layers: TypeAlias = Callable[[int], Mapping[str, registry_cache.KnownLayer]]


class Targets(NamedTuple):
    """Those models (shown names in lower case) and digests (in lower case) that are meant."""

    models: frozenset[str]
    digests: frozenset[str]

    def of(self, planned: Plan) -> Plan:
        """The part of a plan that is about them."""
        return planned.only(self.meant)

    def meant(self, models: Iterable[str], subjects: Iterable[str]) -> bool:
        """Whether one of these models or subjects (digests, names of files) is meant."""
        if not self.models.isdisjoint(map(str.lower, models)):
            return True
        digests = (names.parse_blob(each).digest or each for each in subjects)
        return not self.digests.isdisjoint(map(str.lower, digests))


def find(
    hosts: Sequence[Host], wanted: Sequence[str], elsewhere: Sequence[Known] = ()
) -> Targets | None:
    """The targets of a command over some stores; None where all is meant.

    `elsewhere` is what stores know that are treated by other processes.

    Raises TargetError for what no store knows, and for a digest's beginning that several have.
    """
    if not wanted:
        return None
    here = [known(host.store, host.known_layers) for host in hosts]
    return among([*here, *elsewhere], wanted)


def among(known: Sequence[Known], wanted: Sequence[str]) -> Targets:
    """The targets among what is known. Raises TargetError as `find` does."""
    models: set[str] = set()
    digests: set[str] = set()
    for text in wanted:
        found = _model(text, known) or _digest(text, known)
        models |= found.models
        digests |= found.digests
    return Targets(frozenset(models), frozenset(digests))


def known(path: str, layers: Layers = registry_cache.known_layers) -> Known:
    """What is in a store; nothing where it can't be read: the look that follows says why.

    `layers` says what else is known of models, whose manifests are not there.
    """
    models: dict[str, frozenset[str]] = {}
    digests: set[str] = set()
    unseen: list[str] = []
    with contextlib.suppress(OSError), folders.opened_store(path) as store:
        named = scan.scan_manifests(store)
        for shown in (*named.models, *(odd.model for odd in named.odd if odd.model)):
            models.setdefault(shown, frozenset())
        for digest, (_, _, *indexes) in named.digests.items():
            digests.add(digest)
            for index in indexes:
                models[named.models[index]] |= {digest}
        for key, record in memory.load(store).downloads.items():
            for shown in record.models:
                models[shown] = models.get(shown, frozenset()) | {key.removesuffix(".tmp")}
        for digest, layer in layers(store).items():
            for shown in layer.models:
                models[shown] = models.get(shown, frozenset()) | {digest}
        unseen = [*named.unlisted, *(each.path for each in named.unseen)]
        try:
            with folders.opened_blobs(store, foreign_too=True) as blobs:
                digests |= {names.parse_blob(name).digest for name in os.listdir(blobs)} - {""}
        except FileNotFoundError:
            pass
        except OSError:
            unseen.append("blobs")
    return Known(models, frozenset(digests), tuple(unseen))


def _model(text: str, known: Iterable[Known]) -> Targets | None:
    model = names.parse_model(text)
    if model is None:
        return None
    shown = model.shown.lower()
    found = [
        digests for each in known for name, digests in each.models.items() if name.lower() == shown
    ]
    if not found:
        return None
    return Targets(frozenset({shown}), frozenset(map(str.lower, frozenset().union(*found))))


def _digest(text: str, known: Sequence[Known]) -> Targets:
    match = _DIGITS.fullmatch(text)
    start = match[1].lower() if match else ""
    every = {digest.lower() for each in known for digest in each.digests}
    found = sorted(digest for digest in every if match and digest.startswith(start))
    if not found:
        raise TargetError(
            f"neither a model nor a digest of this store: {names.printable(text)}",
            not_seen(known) or _nearest(text, start, known, every),
        )
    if len(found) > 1:
        shown = ", ".join(f"sha256-{digest[:20]}…" for digest in found[:_MOST_NEAREST])
        more = f" and {len(found) - _MOST_NEAREST} more" if len(found) > _MOST_NEAREST else ""
        raise TargetError(
            f"{names.printable(text)} is the beginning of {len(found)} digests: {shown}{more}",
            "give more of its digits",
        )
    return Targets(frozenset(), frozenset(found))


def not_seen(known: Iterable[Known]) -> str:
    """Why a name that nothing knows may be one all the same; "" where all could be read."""
    paths = [names.printable(path) for each in known for path in each.unseen]
    return (
        f"{paths[0]} can't be read, and what is in there is not known; `audit` shows what helps"
        if paths
        else ""
    )


def _nearest(text: str, start: str, known: Iterable[Known], digests: Iterable[str]) -> str:
    """What was perhaps meant."""
    models = sorted({shown for each in known for shown in each.models})
    near = _alike(text, models)
    if start:
        cut = {digest[: len(start)]: digest for digest in sorted(digests)}
        close = difflib.get_close_matches(start, cut, n=_MOST_NEAREST, cutoff=0.6)
        near.extend(names.short(cut[each]) for each in close)
    unknown = "`repair MODEL` asks the registry of a model; a digest is as `audit` shows it"
    return _perhaps(near, models) or unknown


def perhaps(model: str, models: Iterable[str]) -> str:
    """Which of some models was perhaps meant, in words; empty where there are none."""
    known = sorted(models)
    return _perhaps(_alike(model, known), known)


def _perhaps(near: Sequence[str], models: Sequence[str]) -> str:
    if near:
        return f"did you mean {', '.join(near)}?"
    more = ", …" if len(models) > _MOST_NEAREST else ""
    return f"it has {', '.join(models[:_MOST_NEAREST])}{more}" if models else ""


def _alike(text: str, models: Sequence[str]) -> list[str]:
    """This model under its other tags, and those with a similar name."""
    lower = {shown.lower(): shown for shown in models}
    base = text.lower().partition(":")[0]
    tags = [shown for each, shown in lower.items() if each.partition(":")[0] == base]
    close = difflib.get_close_matches(text.lower(), lower, n=_MOST_NEAREST, cutoff=0.5)
    return list(dict.fromkeys((*tags, *(lower[each] for each in close))))[:_MOST_NEAREST]
