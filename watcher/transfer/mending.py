"""Damaged and missing blobs: what is wrong of one is fetched beside it, before it is replaced."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from rich.filesize import decimal

from watcher.config import Settings
from watcher.errors import ChangedError, EndedError, WatchError
from watcher.model import Action, Entry, Scope
from watcher.observe import place, scan
from watcher.observe.host import Host
from watcher.ollama import names, ranges
from watcher.ollama.names import ModelName
from watcher.reconcile import Reconciler
from watcher.state import folders, state_folder, transfers
from watcher.transfer import auth, taking_over, values
from watcher.transfer.ledger import Identity
from watcher.transfer.model import Fetched, Transfer
from watcher.transfer.rate import Limit
from watcher.transfer.values import Layer, Order, Partial, Progress, TransferError

T = TypeVar("T")
_TICK_SECONDS = 0.2


class Mender:
    """Fetches for one store. `show` takes a line for people now and then.

    `has_asked`: somebody has agreed to the bytes of each action, and no more of them are fetched
    than its budget. `limit` may be changed while it runs.
    """

    def __init__(
        self,
        host: Host,
        settings: Settings,
        show: Callable[[str], None] = lambda _: None,
        *,
        has_asked: bool = False,
    ) -> None:
        self._host, self._settings, self._show = host, settings, show
        self.limit = Limit(settings.rate)
        self._has_asked, self._budget = has_asked, values.Budget()
        self._noticed = ""  #: of mirrors

    def fetch(self, action: Action) -> tuple[Entry, int]:
        """Have a blob beside the damaged one, with its right hash: its file, and bytes that came.

        Raises TransferError, ChangedError, EndedError where the host stops, and OSError.
        """
        self._budget = values.Budget(action.budget if self._has_asked else None)
        for verified in self._fetched(action).verified:
            with (
                folders.opened_store(self._host.store) as store,
                state_folder.opened(store) as ours,
                transfers.opened(ours, action.subject) as folder,
            ):
                found = scan.look(transfers.DATA, folder)
            if found and Identity(*found.identity, found.size, found.mtime_ns) == verified.identity:
                return found, self._budget.came
        raise ChangedError(f"another process has replaced {names.short(action.subject)}")

    def sums(self, action: Action) -> None:
        """Have the sums of a layer's chunks kept, where one of its registries serves them.

        Raises as `fetch` does.
        """
        for model in _models(action):
            transfer = self._transfer(self._order(action, model, action.length))
            if self._run(transfer, transfer.sums):
                return

    def _fetched(self, action: Action) -> Fetched:
        """From the first of its models' registries that has it."""
        short = names.short(action.subject)
        failed: WatchError = ChangedError(f"no known model has {short}", "name its model")
        for model in _models(action):
            try:
                return self._from(action, model)
            except values.OverBudgetError as error:
                text = "; ".join(filter(None, (error.message, self._noticed)))
                raise values.OverBudgetError(text, error.next_step, error.cause) from None
            except TransferError as error:
                failed = error
        raise failed

    def _from(self, action: Action, model: ModelName) -> Fetched:
        order = self._order(action, model, action.needs)
        transfer = self._transfer(order._replace(partials=tuple(self._sources(action))))
        return self._run(transfer, transfer.run)

    def _transfer(self, order: Order) -> Transfer:
        return Transfer(order, self._options(), self._heard)

    def _run(self, transfer: Transfer, work: Callable[[], T]) -> T:
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(work)
            try:
                while not wait([job], _TICK_SECONDS).done:
                    if self._host.stops():
                        transfer.stop()
            finally:
                transfer.stop()
                self._show("")
        try:
            return job.result()
        except values.StoppedError:
            raise EndedError from None

    def _order(self, action: Action, model: ModelName, size: int) -> Order:
        return Order(
            self._host.store,
            model,
            place.boot(self._host),
            key=auth.usual_key(),
            layers=(Layer(action.subject, size),),
            mirrors=self._settings.mirrors,
        )

    def _sources(self, action: Action) -> Iterator[Partial]:
        """What is copied: the damaged blob, or what a server has left of a missing one."""
        for source in filter(None, (action.content, *action.expects)):
            # Of one with its right length nothing may be known, but that it is wrong.
            size, most = source.size, action.needs
            here = ((0, min(size, most)),) if size != most or action.doubts else ()
            trusted = ranges.difference(here, action.doubts)
            yield Partial(action.subject, *source.identity, trusted, is_blob=True)
            return
        scope = Scope(frozenset({action.subject}))
        seen = Reconciler(self._host, self._settings).inspect(scope=scope)
        for each in taking_over.live(seen):
            raise ChangedError(f"the server pulls {names.short(each.digest)}", "wait until it ends")
        left = taking_over.partials(seen)
        yield from left or taking_over.damaged(self._host.store, {action.subject: action.needs})

    def _options(self) -> values.Options:
        return values.Options(
            connections=self._settings.connections,
            limit=self.limit,
            budget=self._budget,
            reserve=transfers.reserve(os.statvfs(self._host.store)),
        )

    def _heard(self, event: values.Event) -> None:
        match event:
            case values.Noticed("", text):
                self._noticed = text
            case Progress(digest, total, arrived):
                here = f"{decimal(arrived)} of {decimal(total)}"
                self._show(f"fetching {names.short(digest)}: {here} on disk, Ctrl-C to stop ")
            case values.Waiting(_, reason) if reason.startswith("the disk"):
                step = "free space (`ollama-watch df` shows what uses it), then run it again:"
                step += " it goes on from there"
                raise TransferError(reason, step, values.Cause.DISK)


def _models(action: Action) -> list[ModelName]:
    """One of each registry."""
    found = filter(None, map(names.parse_model, action.models))
    return list({model.host: model for model in reversed([*found])}.values())[::-1]
