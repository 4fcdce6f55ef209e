"""A pull that is driven here, and what was seen of it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.repair.scenes import seed_of
from tests.support.driving import is_right
from tests.support.runs import rules
from tests.support.servers import Server
from watcher.demo.registry import Layer, Model, Registry
from watcher.observe.host import Host
from watcher.ollama import sidecars
from watcher.pull.account import Options, Update
from watcher.pull.driver import Pull
from watcher.pull.failures import End
from watcher.pull.target import Target
from watcher.state import records
from watcher.state.records import State
from watcher.transfer.questions import asking

MB = 1_000_000
MIB = 1 << 20
#: Two parts by the server's own rule.
SIZE = 120 * MB
POLICY = rules(writers_visible=True)
OPTIONS = Options(insecure=True)


@dataclass
class Seen:
    """Every update of a pull, checked as it comes."""

    updates: list[Update] = field(default_factory=list)
    end: End = field(default_factory=End)

    @property
    def notes(self) -> list[str]:
        """What was said in words."""
        return [each.note for each in self.updates if each.note]

    @property
    def states(self) -> list[State]:
        """The states, repetitions left out."""
        found: list[State] = []
        for each in self.updates:
            if found[-1:] != [each.record.state]:
                found.append(each.record.state)
        return found

    def add(self, update: Update) -> None:
        """One more; it must be able to follow the one before."""
        if self.updates:
            before, now = self.updates[-1].record, update.record
            assert records.may_follow(before.state, now.state), (before.state, now.state)
            assert now.progress_percent >= before.progress_percent, (before, now)
        self.updates.append(update)


@contextmanager
def at_a_port(kind: type[Server], folder: Path) -> Iterator[Server]:
    """A server that is not started, and comes back at the same port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with kind(folder / "models", {"OLLAMA_HOST": f"127.0.0.1:{port}"}) as made:
        made.port = port
        yield made


def site(server: Server) -> Target:
    """The site of a server whose store is here."""
    return Target(server.url, POLICY.settings, asking(Host(str(server.store))))


def add(
    registry: Registry, server: Server, size: int = SIZE, name: str = "demo", seed: str = ""
) -> Model:
    """A model of one layer, another one for each test."""
    layers = [Layer(size, seed=seed_of(server.store / name / seed))]
    return registry.add_model(name, "1b", layers, extras=False)


def drive(
    where: Target,
    model: Model | str,
    options: Options = OPTIONS,
    cancelled: Callable[[], bool] = lambda: False,
    on_update: Callable[[Update], object] = lambda _: None,
) -> Seen:
    """Drive a pull to its end."""
    pull = Pull(where, model if isinstance(model, str) else model.name, options, cancelled)
    seen = Seen()
    for update in pull.updates():
        seen.add(update)
        on_update(update)
    seen.end = pull.end
    last = seen.updates[-1].record
    if seen.end.cause is None:
        assert last.state is State.COMPLETED
        assert last.progress_percent == 100.0
    else:
        assert last.state is State.ERROR
        assert last.error
        assert seen.end.cause.step
    return seen


def arrived(server: Server, model: Model) -> bool:
    """Whether all blobs are right, and the manifest is the registry's."""
    path = server.store / "manifests" / model.name.removeprefix("http://").replace(":1b", "/1b")
    blobs = all(is_right(server.store, digest) for digest in (*model.digests, model.config))
    return blobs and path.read_bytes() == model.manifest


def claimed(server: Server, model: Model) -> int:
    """Bytes of the unfinished layer that a pull need not fetch, by its sidecars."""
    blobs = server.store / "blobs"
    found = blobs.glob(f"{model.digests[0].replace(':', '-')}-partial-*")
    return sum(sidecars.parse(path.read_bytes()).completed for path in found)
