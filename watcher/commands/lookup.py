"""Which layers a model has, asked of its registry by the model's name, and kept for all to read."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial

from watcher.errors import TargetError, WatchError
from watcher.observe import scan, targets
from watcher.observe.host import Host
from watcher.ollama import names, registry
from watcher.ollama.names import ModelName
from watcher.pull import queue
from watcher.state import folders, registry_cache

_FRESH_SECONDS = 3600.0  #: what was heard within that time is not asked again


def look_up(
    host: Host, wanted: Iterable[str], *, keep: bool = True
) -> tuple[Host, Mapping[str, str]]:
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
            answer = host.registry_manifest(store if keep else None, model)
            if answer.problem:
                problems[model.key] = answer.problem
            elif answer.raw is not None and not registry.sizes(answer.raw):
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
    line: Iterable[queue.Item] = ()
    with contextlib.suppress(WatchError):
        line = queue.FILE.read(store).line if nameless else ()
    for shown in (*(item.model for item in line), *(known.models if nameless else ())):
        model = names.parse_model(shown)
        if model is not None:
            yield model


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
