"""Mirrors: asked first, trusted by the hash alone, left alone once they fail, told no secret."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from itertools import pairwise

import pytest

from watcher.demo.registry import Fault, Manners, Model, Registry
from watcher.demo.registry import Layer as Made
from watcher.model import MIB
from watcher.state import transfers
from watcher.transfer import values
from watcher.transfer.client import Answer, Client, Request, Sink

from .driven import BOOT, Background, Here, wait_for, with_options


class Mirror(Registry):
    """A registry that has the model of the test, as a plain OCI one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.manners = Manners(plain=True)
        self.model: Model = self.add_model("demo", "1b", [Made(size)], extras=False)

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]


@pytest.fixture
def mirror(here: Here) -> Iterator[Mirror]:
    with Mirror(here.size) as found:
        assert found.model.digests == here.model.digests
        yield found


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def test_it_is_asked_first_and_brings_every_byte(here: Here, mirror: Mirror) -> None:
    here.pull(mirrors=(mirror.url,))
    assert here.served == 0
    assert mirror.bytes_served(here.model.digests[0]) == here.size + 1
    assert not here.notices()
    assert not any("/manifests/" in path for path in mirror.paths)


@pytest.mark.parametrize("plain", [True, False])
def test_a_mirror_gets_no_credentials_of_the_registry(
    here: Here, mirror: Mirror, plain: bool
) -> None:
    here.registry.manners = Manners(wants="bearer")
    mirror.manners = Manners(plain=plain)
    here.pull(mirrors=(mirror.url,))
    assert here.registry._tokens
    assert here.served == 0
    assert not any("authorization" in map(str.lower, headers) for _, headers in mirror.asked)


def test_a_mirror_that_wants_credentials_is_left_alone(here: Here, mirror: Mirror) -> None:
    mirror.manners = Manners(plain=True, wants="bearer")
    here.pull(mirrors=(mirror.url,))
    assert len(mirror.paths) == len({*mirror.paths}), "layers that are asked for at once, each once"
    assert here.served == here.size + 1
    assert f"the mirror {mirror.url} is no longer used: " in here.notices()


def test_one_that_nobody_answers_at_is_asked_once(here: Here) -> None:
    address = closed_port()
    here.pull(mirrors=(address,))
    assert here.notices().count(address) == 1
    assert here.served == here.size + 1
    assert not here.waits()


def test_a_mirror_gets_three_seconds_to_connect(
    here: Here, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Request] = []
    real = Client.ask

    async def ask(self: Client, request: Request, sink: Sink | None = None) -> Answer:
        asked.append(request)
        return await real(self, request, sink)

    monkeypatch.setattr(Client, "ask", ask)
    here.pull(mirrors=(mirror.url,))
    found = {request.url.startswith(mirror.url): request.connect for request in asked}
    assert found == {True: 3.0, False: 15.0}


def test_the_second_one_is_asked_where_the_first_one_lacks_the_layer(
    here: Here, mirror: Mirror
) -> None:
    with Registry() as empty:
        here.pull(mirrors=(empty.url, mirror.url))
        assert empty.asked
    assert here.served == 0
    assert not here.notices()


@pytest.mark.parametrize(
    "fault",
    [
        Fault("reset", after=300_000, begin=1),
        Fault("truncate", after=300_000, begin=1),
        Fault("page", begin=1),
        Fault("page", status=429, begin=1, headers={"Retry-After": "100"}),
        Fault("ignore_range", begin=1),
        Fault("wrong_total"),
        Fault("gzip", begin=1),
    ],
    ids=lambda fault: fault.kind,
)
def test_one_that_fails_is_left_alone_and_the_rest_is_the_registrys(
    here: Here, mirror: Mirror, fault: Fault
) -> None:
    mirror.add_fault(fault)
    here.pull(with_options(connections=2), mirrors=(mirror.url,))
    assert here.notices().count(f"the mirror {mirror.url} is no longer used") == 1
    assert here.served > 0
    assert not here.waits()


def test_one_that_fails_at_one_layer_is_asked_for_no_other(here: Here, mirror: Mirror) -> None:
    layers = [Made(6 * MIB), Made(12 * MIB)]
    mirror.add_model("demo", "1b", layers, extras=False)
    here.model = here.registry.add_model("demo", "1b", layers, extras=False)
    first, second = here.model.digests
    mirror.add_fault(Fault("reset", after=MIB, digest=first))
    for digest in (first, second):
        mirror.hold(digest, at=(1000,))
    options = with_options(connections=2, piece=6 * MIB)
    with Background(here.transfer(options, mirrors=(mirror.url,))) as running:
        for digest in (first, second):
            mirror.wait_held(digest, 1)
        mirror.release(first)
        wait_for(lambda: "is no longer used" in here.notices())
        mirror.release(second)
        here.publish(running.result())
    assert mirror.bytes_served(second) == 6 * MIB + 1


def test_one_that_is_silent_gives_the_rest_to_the_registry(here: Here, mirror: Mirror) -> None:
    mirror.add_fault(Fault("stall", after=300_000, begin=1))
    here.pull(with_options(connections=1, stall=1.0), mirrors=(mirror.url,))
    assert "is no longer used: the connection was silent for 1 s" in here.notices()


def test_a_mirror_that_sends_wrong_bytes_costs_them_once(here: Here, mirror: Mirror) -> None:
    mirror.add_fault(Fault("flip", begin=2 * MIB, after=1000))
    here.pull(mirrors=(mirror.url,))
    assert "from mirrors must be downloaded again" in here.notices()
    progress = [each for each in here.events if isinstance(each, values.Progress)]
    arrived = [each.arrived for each in progress if each.digest == here.digest]
    assert sum(max(0, was - now) for was, now in pairwise(arrived)) == here.size
    assert here.served == here.size + 1
    assert mirror.bytes_served(here.model.digests[0]) == here.size + 1


def test_of_one_that_lied_and_broke_its_own_bytes_alone_are_fetched_anew(
    here: Here, mirror: Mirror
) -> None:
    mirror.add_fault(Fault("reset", begin=6 * MIB))
    mirror.add_fault(Fault("flip", begin=2 * MIB, end=2 * MIB + 1, after=1000))
    here.pull(with_options(connections=1), mirrors=(mirror.url,))
    assert mirror.bytes_served(here.model.digests[0]) == 6 * MIB + 1
    assert "6.3 MB from mirrors must be downloaded again" in here.notices()
    assert here.served == here.size + 1


def test_a_kill_leaves_what_came_and_may_come_from_it_as_doubted(
    here: Here, mirror: Mirror
) -> None:
    mirror.hold(here.model.digests[0], at=(4 * MIB,))
    with Background(here.transfer(with_options(connections=1), mirrors=(mirror.url,))):
        wait_for(lambda: here.written_if_any() >= 3 * MIB)
        assert (here.folder / transfers.LEDGER).exists()
        with here.opened() as opened, transfers.opened(opened._ours, here.digest) as folder:
            kept = transfers.kept(folder, here.digest, here.size)
        assert kept.mirrored == ((0, here.size),)
    with here.ledger(BOOT) as ledger:
        assert ledger.mirrored == ((0, here.size),)


def test_the_registry_alone_gives_the_manifest_while_it_answers(here: Here, mirror: Mirror) -> None:
    here.registry.remove_tag("library/demo", "1b")
    with pytest.raises(values.TransferError) as caught:
        here.fetch(mirrors=(mirror.url,))
    assert caught.value.cause is values.Cause.NO_SUCH_MODEL
    assert not mirror.asked


def test_a_manifest_is_the_mirrors_where_nobody_answers_for_the_registry(
    here: Here, mirror: Mirror
) -> None:
    gone = here.name._replace(host=closed_port().removeprefix("http://"))
    fetched = here.fetch(mirrors=(mirror.url,), model=gone)
    assert fetched.manifest == here.model.manifest
    assert f"using the manifest of the mirror {mirror.url}" in here.notices()
    assert not here.waits()


def test_a_mirror_without_the_model_changes_nothing_about_the_error(here: Here) -> None:
    gone = here.name._replace(host=closed_port().removeprefix("http://"))
    with Registry() as empty, pytest.raises(values.TransferError) as caught:
        here.fetch(with_options(tries=1), mirrors=(empty.url,), model=gone)
    assert caught.value.cause is values.Cause.NETWORK
