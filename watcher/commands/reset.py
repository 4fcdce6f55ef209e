"""``reset``: forget downloads."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from watcher.commands import lookup
from watcher.commands.context import Context, patience
from watcher.errors import Exit, NoPermissionError, TargetError
from watcher.observe import targets
from watcher.observe.host import Host
from watcher.ollama import names
from watcher.pull.manager import ModelDownloadManager, StoreFiles
from watcher.show import documents, text
from watcher.show.text import count

_NOTHING_TO_RESET = frozenset({"idle", "completed", "reset"})


def reset(context: Context, models: tuple[str, ...], *, yes: bool, offline: bool) -> Exit:
    """Forget downloads and remove what there is of them, after asking.

    `offline`: no registry is asked which layers a model has.
    """
    for model in models:
        names.to_model(model)
    store = context.only_place("a download is of one").path
    problems: Mapping[str, str] = {}
    if not offline:
        with patience("asking registries"):
            problems = lookup.look_up(Host(store), models).problems
    manager = ModelDownloadManager(StoreFiles(store), policy=context.settings)
    done: list[documents.Reset] = []
    try:
        for model in models:
            found = manager.detect_partial_downloads(model)
            before = manager.get_download_state(model)["status"]
            layers = [each["digest"] for each in found]
            size = sum(each["partial_size"] for each in found)
            shown = names.printable(model)
            if not found and before in _NOTHING_TO_RESET:
                _check_known(store, model, problems, before)
                done.append(documents.Reset(model, before, (), 0))
                _say(context, f"{shown}: nothing of a download is here")
                continue
            what = f"{text.size(size)} of {count(len(layers), 'unfinished layer')}"
            agreed = yes or context.agreed(f"Remove {what} of {shown}?")
            if not agreed:
                return Exit.USAGE if agreed is None else Exit.FINDINGS
            after = manager.reset_download(model)["status"]
            done.append(documents.Reset(model, after, tuple(layers), size))
            _say(context, f"{shown}: forgotten; {what} removed")
    finally:
        if context.json:
            context.document(documents.reset(store, done))
    return Exit.HEALTHY


def _check_known(store: str, model: str, problems: Mapping[str, str], state: str) -> None:
    """Raise where it can't be said that nothing of a model is here.

    NoPermissionError where something could not be looked at, TargetError for a name that nothing
    knows.
    """
    known = targets.known(store)
    if unseen := targets.not_seen([known]):
        shown = names.printable(model)
        raise NoPermissionError(f"{shown}: whether anything of it is here is not known", unseen)
    key = names.to_model(model).key
    if state != "idle" or any(names.to_model(each).key == key for each in known.models):
        return
    with lookup.blamed(problems):
        raise TargetError(
            f"nothing here knows a model of that name: {names.printable(model)}",
            targets.perhaps(model, known.models) or "look at its spelling",
        )


def _say(context: Context, text: str) -> None:
    if not (context.quiet or context.json):
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
