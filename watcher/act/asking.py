"""Asking the registry that a model came from what it has of a digest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from watcher import names
from watcher.model import Action, Outcome, Result
from watcher.world import World


def ask(actions: Iterable[Action], world: World) -> Iterator[Outcome]:
    """Ask for each action's digest, by its models in turn until one's registry knows it."""
    for action in actions:
        length = None
        for shown in action.models:
            model = names.parse_model(shown)
            if model is not None:
                length = world.registry_length(model, action.subject)
            if length is not None:
                break
        said = "nothing" if length is None else f"{length} bytes of it"
        yield Outcome(action, Result.DONE, f"the registry has {said}", length=length)
