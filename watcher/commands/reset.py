"""``reset``: forget downloads."""

from collections.abc import Mapping

from watcher.commands import complete, declare
from watcher.commands.context import Context, patience
from watcher.errors import Exit, NoPermissionError, TargetError
from watcher.ollama import names


@declare.command(
    examples=["reset llama3", "reset --yes llama3"], read_on="docs/safety.md: what is never removed"
)
@complete.MODELS
@declare.yes
@declare.offline
def reset(context: Context, models: tuple[str, ...], yes: bool, offline: bool) -> Exit:
    """Forget a download and remove its data.

    Asks first. Refuses while the model is being pulled.
    """
    from watcher.commands import acting
    from watcher.observe.host import Host
    from watcher.pull.manager import ModelDownloadManager, StoreFiles
    from watcher.show import text
    from watcher.transfer import questions

    for model in models:
        names.to_model(model)
    store = context.only_place("a download is of one").path
    problems: Mapping[str, str] = {}
    if not offline:
        with patience("asking registries"):
            _, problems = acting.look_up(questions.asking(Host(store)), models)
    manager = ModelDownloadManager(StoreFiles(store), policy=context.settings)
    done: list[dict[str, object]] = []
    try:
        for model in models:
            found = manager.detect_partial_downloads(model)
            before = manager.get_download_state(model)["status"]
            layers = [each["digest"] for each in found]
            size = sum(each["partial_size"] for each in found)
            shown = names.printable(model)
            if not found and before in ("idle", "completed", "reset"):
                with acting.blamed(problems):
                    _check_known(store, model, before)
                after, result = before, "there is no download to forget"
            else:
                what = f"{text.size(size)} of {text.count(len(layers), 'unfinished layer')}"
                answer = Exit.HEALTHY if yes else context.ask(f"Remove {what} of {shown}?")
                if answer:
                    return answer
                after = manager.reset_download(model)["status"]
                result = f"download forgotten; removed {what}"
            row = {"model": names.exact(model), "status": after}
            done.append({**row, "removed": layers, "removed_bytes": size})
            context.note(f"{shown}: {result}")
    finally:
        if context.json:
            where = {"schema": "ollama-watch/reset/1", "store": names.exact(store)}
            context.document({**where, "models": done})
    return Exit.HEALTHY


def _check_known(store: str, model: str, state: str) -> None:
    """Raise NoPermissionError where that can't be looked at, TargetError for an unknown name."""
    from watcher.observe import targets

    known = targets.known(store)
    if unseen := targets.not_seen([known]):
        shown = names.printable(model)
        raise NoPermissionError(f"{shown}: whether anything of it is here is not known", unseen)
    key = names.to_model(model).key
    if state == "idle" and all(names.to_model(each).key != key for each in known.models):
        helps = targets.perhaps(model, known.models) or "check its spelling"
        raise TargetError(f"unknown model: {names.printable(model)}", helps)
