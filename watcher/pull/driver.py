"""One model's pull, driven to its end over whatever breaks on the way.

`Pull.updates` is the sequence: choose who moves the bytes, attempt, verify, and after a failure
whatever another attempt takes.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from watcher.errors import WatchError, without_secrets
from watcher.observe.host import Host
from watcher.ollama import names
from watcher.pull import before, verification
from watcher.pull.account import Account, Options, Update
from watcher.pull.by_server import ByServer
from watcher.pull.failures import Cause, End
from watcher.pull.speed import Meter
from watcher.pull.target import Target
from watcher.state import folders, records
from watcher.state.event_log import EventType

if TYPE_CHECKING:
    from watcher.pull.by_transfer import ByTransfer


@dataclass(slots=True)
class Pull:
    """A pull of `model` (as people write it). Iterate over `updates`; then `end` has its end.

    `cancelled` is asked several times a second. When it returns True, what was downloaded is made
    resumable, and the updates end.
    """

    target: Target
    model: str
    options: Options = field(default_factory=Options)
    cancelled: Callable[[], bool] = lambda: False
    end: End = field(default_factory=End)
    fault: Exception | None = None  #: a bug of ours, where that ended it
    account: Account = field(init=False)
    _way: ByServer | ByTransfer = field(init=False)
    #: Those that were downloaded once more because they were missing or damaged.
    _fetched_again: frozenset[str] = frozenset()
    _is_verified: bool = False  #: what `Options.verify` asks for was done

    def __post_init__(self) -> None:
        """Raises TargetError for what is not a model's name."""
        self.account = Account(self.target, self.model, self.options)

    @property
    def name(self) -> names.ModelName:
        return self.account.name

    @property
    def record(self) -> records.Record:
        return self.account.record

    @property
    def meter(self) -> Meter:
        return self.account.meter

    @property
    def step(self) -> str:
        """What helps against its end, in words."""
        return self.end.step or ("" if self.end.cause is None else self.end.cause.step)

    @property
    def command(self) -> str:
        """The same as a command that can be pasted; "" where none does."""
        return "" if self.end.cause is None else self.account.helps(self.end.cause)

    def updates(self) -> Iterator[Update]:
        """Drive the pull to its end. Whatever goes wrong is the end of this pull alone."""
        account = self.account
        account.why_server = why_server(self.target, self.name)
        if account.why_server:
            self._way = ByServer(account, self._is_cancelled)
        else:
            from watcher.pull.by_transfer import ByTransfer  # it takes asyncio

            self._way = ByTransfer(account, self._is_cancelled)
        try:
            account.begin()
            self.end = yield from self._drive()
            if self.end.cause is None:
                yield account.change(state=records.State.COMPLETED)
                account.log(EventType.PULL_COMPLETED, f"{self.name.shown} is complete")
            else:
                yield from self._failed(self.end)
        except WatchError as error:
            yield from self._failed(End(Cause.UNKNOWN, str(error)))
        except Exception as error:
            self.fault = error
            text = names.printable(without_secrets(f"{type(error).__name__}: {error}"))
            yield from self._failed(End(Cause.FAULT, text))
        finally:
            account.end()

    def _is_cancelled(self) -> bool:
        # Whoever shows the updates may replace what is asked.
        return self.cancelled()

    def _drive(self) -> Generator[Update, None, End]:
        yield from self._way.begin()
        while True:
            self.end = end = yield from self._attempt_and_verify()
            if end.cause is None:
                return end
            final = yield from self._way.after(end)
            if final is not None:
                return final

    def _failed(self, end: End) -> Iterator[Update]:
        assert end.cause is not None
        self.end = end
        yield self.account.fail(end.text)
        text = f"{self.name.shown}: {end.text}"
        self.account.log(EventType.PULL_FAILED, text, cause=end.cause.code)

    def _attempt_and_verify(self) -> Generator[Update, None, End]:
        """An attempt, and whether its layers are right; those that are not are pulled again."""
        while True:
            end = yield from self._way.attempt()
            if end.cause is None:
                end = self._check_stored_manifest()
            if end.cause is not None:
                return end
            proof = yield from self._verify()
            if not proof.gone:
                return proof.end
            if proof.gone <= self._fetched_again:
                missing = names.short(min(proof.gone))
                why = f"{missing} was downloaded again, but is missing or damaged"
                return End(Cause.DAMAGED, why)
            self._fetched_again |= proof.gone

    def _check_stored_manifest(self) -> End:
        with self.account.opened() as store:
            if store is None:
                return End()
            try:
                return before.flaw(verification.read(f"manifests/{self.name.path}", store))
            except OSError:
                return End()  # it is not in the store that is known here

    def _verify(self) -> Generator[Update, None, verification.Proof]:
        """Whether the layers match their names, as far as that is in doubt or asked for.

        What was downloaded just now was hashed by whoever did that, and nothing else.
        """
        account = self.account
        doubted = self._in_doubt()
        if doubted is None or (self.options.verify and self.target.host is None):
            if not self.options.verify:
                return verification.Proof()
            why = self.target.why or "its manifest is not in this store"
            return verification.Proof(end=End(Cause.UNVERIFIED, why))
        if self.options.verify and not self._is_verified:
            doubted |= account.digests if account.present is None else account.present
        if not doubted:
            return verification.Proof()
        if records.may_follow(self.record.state, records.State.VERIFYING):
            yield account.change(state=records.State.VERIFYING)
        proving = verification.prove(self.target, doubted, self._is_cancelled)
        found = yield from account.noted(proving)
        self._is_verified = found.end.cause is None
        return found

    def _in_doubt(self) -> frozenset[str] | None:
        """The layers that are perhaps not right; None where the model is not in a store here."""
        with self.account.opened() as store:
            sizes = None if store is None else verification.layers(store, self.name)
            if store is None or sizes is None:
                return None
            return verification.in_doubt(store, sizes, self.account.boot)


def why_server(target: Target, model: names.ModelName) -> str:
    """Why the server moves the bytes; "" where we can, since a transfer fetches no byte twice."""
    if model.tag.lower().endswith("cloud"):
        return "it runs in the cloud"
    if target.host is None:
        return target.why
    return _of_blobs(target.host) or _of_python()


def _of_blobs(host: Host) -> str:
    """Why what is fetched beside ``blobs/`` can't be renamed into it."""
    with contextlib.suppress(OSError), folders.opened_store(host.store) as store:
        blobs = folders.look_at_blobs(store)
        if blobs.foreign is not None:
            return names.of_link(blobs.foreign)
        if blobs.status is not None and blobs.status.st_dev != os.fstat(store).st_dev:
            return "blobs/ is on another file system than the store"
    return ""


def _of_python() -> str:
    try:
        importlib.import_module("pycurl")
    except ImportError as error:
        return f"pycurl can't be loaded ({error}): pip install pycurl"
    return ""
