"""What people mean by a model or a digest, as far as a store knows it."""

import contextlib
import difflib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from watcher.errors import TargetError
from watcher.model import Known, Plan, digest_of
from watcher.observe import scan
from watcher.observe.host import Host
from watcher.ollama import names
from watcher.state import folders, memory, registry_cache, state_folder, transfers

_DIGITS = re.compile(r"(?:sha256[:-])?([0-9a-fA-F]{4,64})(?:-partial(?:-[0-9]+)?|\.tmp)?")
_MOST_NEAREST = 5


class Targets(NamedTuple):
    """Those models (shown names in lower case) and digests (in lower case) that are meant."""

    models: frozenset[str]
    digests: frozenset[str]

    def of(self, planned: Plan) -> Plan:
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
    """The targets of a command (`elsewhere`: treated by others); None for all. TargetError."""
    here = (known(host.store, host.known_layers) for host in hosts)
    return among([*here, *elsewhere], wanted) if wanted else None


def among(known: Sequence[Known], wanted: Sequence[str]) -> Targets:
    """The targets among what is known. Raises TargetError as `find` does."""
    found = [_model(text, known) or _digest(text, known) for text in wanted]
    models = frozenset().union(*(each.models for each in found))
    return Targets(models, frozenset().union(*(each.digests for each in found)))


def known(
    path: str, layers: Callable[[int], registry_cache.KnownLayers] = registry_cache.known_layers
) -> Known:
    """What is in a store, and what `layers` knows of; nothing where it can't be read."""
    models: dict[str, set[str]] = {}
    digests: set[str] = set()
    unseen: list[str] = []
    with contextlib.suppress(OSError), folders.opened_store(path) as store:
        named = scan.scan_manifests(store)
        digests.update(named.digests)
        for shown in (*named.models, *(odd.model for odd in named.odd if odd.model)):
            models.setdefault(shown, set())
        downloads = memory.load(store).downloads.items()
        for digest, by in itertools.chain(
            ((digest, named.models_of(digest)) for digest in named.digests),
            ((digest_of(key), each.models) for key, each in downloads),
            ((digest, layer.models) for digest, layer in layers(store).items()),
        ):
            for shown in by:
                models.setdefault(shown, set()).add(digest)
        with contextlib.suppress(OSError), state_folder.opened(store) as ours:
            digests.update(transfers.digests(ours))
        unseen = [*named.unlisted, *(each.path for each in named.unseen)]
        try:
            with folders.opened_blobs(store, foreign_too=True) as blobs:
                digests |= {names.parse_blob(name).digest for name in os.listdir(blobs)} - {""}
        except FileNotFoundError:
            pass
        except OSError:
            unseen.append("blobs")
    digests_of = {shown: frozenset(some) for shown, some in models.items()}
    return Known(digests_of, frozenset(digests), tuple(unseen))


def _model(text: str, known: Iterable[Known]) -> Targets | None:
    model = names.parse_model(text)
    if model is None:
        return None
    shown = model.shown.lower()
    named = [pair for each in known for pair in each.models.items() if pair[0].lower() == shown]
    digests = frozenset(digest.lower() for _, some in named for digest in some)
    return Targets(frozenset({shown}), digests) if named else None


def _digest(text: str, known: Sequence[Known]) -> Targets:
    match = _DIGITS.fullmatch(text)
    start = match[1].lower() if match else ""
    every = {digest.lower() for each in known for digest in each.digests}
    found = sorted(digest for digest in every if match and digest.startswith(start))
    if not found:
        cut = {digest[: len(start)]: digest for digest in sorted(every)} if start else {}
        close = difflib.get_close_matches(start, cut, n=_MOST_NEAREST, cutoff=0.6)
        models = {shown for each in known for shown in each.models}
        meant = not_seen(known) or perhaps(text, models, [names.short(cut[each]) for each in close])
        helps = "`repair MODEL` asks the registry of a model; a digest is as `audit` shows it"
        why = f"neither a model nor a digest of this store: {names.printable(text)}"
        raise TargetError(why, meant or helps)
    if len(found) > 1:
        shown = ", ".join(f"sha256-{digest[:20]}…" for digest in found[:_MOST_NEAREST])
        more = f" and {len(found) - _MOST_NEAREST} more" if len(found) > _MOST_NEAREST else ""
        why = f"{names.printable(text)} is the beginning of {len(found)} digests: {shown}{more}"
        raise TargetError(why, "give more of its digits")
    return Targets(frozenset(), frozenset(found))


def not_seen(known: Iterable[Known]) -> str:
    """Why a name that nothing knows may be one all the same; "" where all could be read."""
    for path in (path for each in known for path in each.unseen):
        shown = names.printable(path)
        return f"{shown} can't be read, and what is in there is not known; `audit` shows what helps"
    return ""


def perhaps(text: str, models: Iterable[str], digests: Sequence[str] = ()) -> str:
    """Which of some models or digests was perhaps meant, in words; empty where there are none."""
    known = sorted(models)
    lower = {shown.lower(): shown for shown in known}
    base = text.lower().partition(":")[0]
    tags = [shown for each, shown in lower.items() if each.partition(":")[0] == base]
    close = difflib.get_close_matches(text.lower(), lower, n=_MOST_NEAREST, cutoff=0.5)
    near = list(dict.fromkeys((*tags, *(lower[each] for each in close))))[:_MOST_NEAREST]
    near.extend(digests)
    if near:
        return f"did you mean {', '.join(near)}?"
    more = ", …" if len(known) > _MOST_NEAREST else ""
    return f"it has {', '.join(known[:_MOST_NEAREST])}{more}" if known else ""
