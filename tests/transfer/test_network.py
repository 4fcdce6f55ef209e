"""Lines that break, crawl and fall silent, addresses that expire, registries that are busy."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from watcher.demo.registry import Fault, Layer, Manners
from watcher.model import MIB
from watcher.ollama import names
from watcher.transfer import values as transfer
from watcher.transfer.growth import Growth
from watcher.transfer.values import Cause

from .driven import QUICK, SECONDS, Background, Here, wait_for, with_options


@pytest.mark.parametrize("kind", ["reset", "truncate"])
def test_a_connection_that_breaks_costs_no_byte_twice(here: Here, kind: str) -> None:
    here.registry.add_fault(Fault(kind, after=700_000, times=15))  # type: ignore[arg-type]
    here.pull()
    # A reset that comes before a byte was read drops what the kernel had.
    assert here.served <= here.size + 15 + 1
    assert not here.waits()  # each of them brought something


def test_resets_without_a_byte_end_it_after_as_many_tries_and_keep_the_rest(here: Here) -> None:
    here.registry.add_fault(Fault("reset", begin=5 * MIB))
    with pytest.raises(transfer.TransferError) as caught:
        here.fetch(with_options(tries=3, connections=1))
    assert caught.value.cause is Cause.NETWORK
    assert [each.attempt for each in here.waits()] == [1, 2]
    assert [each.seconds for each in here.waits()] == [0.01, 0.02]
    here.registry.clear_faults()
    before = here.served
    here.pull()
    assert here.served - before == here.size - 6 * MIB + 1


def test_a_silent_connection_gives_its_rest_to_another_one(here: Here) -> None:
    here.registry.add_fault(Fault("stall", after=300_000, begin=1, times=2))
    here.pull(with_options(stall=1.0))
    assert here.served == here.size + 1


def test_a_registry_that_does_not_answer_is_asked_again_after_the_stall(here: Here) -> None:
    here.registry.add_fault(Fault("hang", begin=1, times=2))
    here.pull(with_options(stall=1.0))
    assert any("silent for 1 s" in each.reason for each in here.waits())


def test_a_crawling_connection_is_replaced(here: Here) -> None:
    here.registry.add_fault(Fault("crawl", rate=50_000, begin=4 * MIB, end=6 * MIB, times=1))
    here.registry.throttle(8_000_000)
    here.pull(with_options(slow_seconds=0.5))
    assert "a slow connection is replaced" in here.notices()


def test_addresses_that_expire_are_asked_for_anew_without_a_wait(here: Here) -> None:
    here.registry.manners = Manners(lifetime=3)
    # Of several connections one may find that the others have used up the next address, too.
    here.pull(with_options(connections=1))
    assert "the address has expired (403)" in here.notices()
    assert not here.waits()
    assert here.registry.stats()["requests"]["direct"] >= 3


def test_a_registry_that_gives_an_expired_address_again_is_not_asked_in_a_frenzy(
    here: Here,
) -> None:
    here.registry.manners = Manners(lifetime=4, same=True)
    with pytest.raises(transfer.TransferError, match="403"):
        here.fetch(with_options(tries=3, connections=2))
    assert here.registry.stats()["requests"]["direct"] < 20


def test_an_address_that_never_worked_ends_with_its_words(here: Here) -> None:
    here.registry.manners = Manners(lifetime=0)
    with pytest.raises(transfer.TransferError, match="403: ExpiredRequest"):
        here.fetch(with_options(tries=2))


def test_a_busy_registry_is_asked_later_and_less(here: Here) -> None:
    busy = Fault("page", status=429, headers={"Retry-After": "1"}, body="slow down")
    busy.begin, busy.times = 1, 1
    here.registry.add_fault(busy)
    begun = time.monotonic()
    here.pull()
    assert time.monotonic() - begun >= 1
    waits = here.waits()
    assert "429: slow down" in waits[0].reason
    assert 0 < waits[0].seconds <= 1


def test_a_busy_registry_gets_half_the_connections(here: Here) -> None:
    digest = here.model.digests[0]
    busy = Fault("page", status=503, headers={"Retry-After": "0"}, times=1, begin=1)
    here.registry.add_fault(busy)
    here.registry.hold(digest, after=1000)
    options = with_options(piece=MIB, connections=4)
    with Background(here.transfer(options)) as running:
        here.registry.wait_held(digest, 3)
        wait_for(here.waits)
        assert len(here.registry.held(digest)) == 3  # of those that had begun, and no fourth one
        here.registry.release()
        running.result()


def test_more_connections_are_opened_where_they_bring_more(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, wanted = here.model.digests[0], [2]

    def look(growth: Growth, *_: object, **__: object) -> int:
        growth.number = wanted[-1]
        return growth.number

    monkeypatch.setattr(Growth, "look", look)
    here.registry.hold(digest, after=1000)
    options = with_options(piece=MIB, connections=(2, 5), stall=SECONDS, slow_seconds=0.1)
    with Background(here.transfer(options)) as running:
        assert len(here.registry.wait_held(digest, 2)) == 2
        wanted.append(5)
        assert len(here.registry.wait_held(digest, 5)) == 5
        wanted.append(1)
        here.registry.release()
        running.result()


def test_a_busy_registry_is_asked_once_by_all_who_need_the_answer(here: Here) -> None:
    later = {"Retry-After": "100"}
    here.registry.add_fault(Fault("page", on="direct", status=429, headers=later, times=1))
    with Background(here.transfer(with_options(connections=4))) as running:
        wait_for(lambda: len(here.waits()) >= 4)
        assert here.registry.stats()["requests"]["direct"] == 1
        running.work.stop()


def test_a_registry_that_is_away_for_a_while_is_waited_for(here: Here) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    gone = here.name._replace(host=f"localhost:{port}")
    with pytest.raises(transfer.TransferError) as caught:
        here.fetch(with_options(tries=3), model=gone)
    assert caught.value.cause is Cause.NETWORK
    assert [each.attempt for each in here.waits()] == [1, 2]


def test_a_transfer_without_a_limit_of_tries_goes_on_until_it_is_stopped(here: Here) -> None:
    here.registry.add_fault(Fault("reset", begin=1))
    with Background(here.transfer(with_options(tries=None))) as running:
        wait_for(lambda: max((each.attempt for each in here.waits()), default=0) > 10)
        running.work.stop()
        running.join()
    assert isinstance(running.error, transfer.StoppedError)


def test_resets_errors_and_cut_answers_together_cost_two_percent_at_most(here: Here) -> None:
    here.registry.manners = Manners(lifetime=5)
    here.registry.add_fault(Fault("reset", after=900_000, times=10, begin=2 * MIB))
    here.registry.add_fault(Fault("page", status=500, times=3, begin=4 * MIB))
    here.registry.add_fault(Fault("truncate", after=100_000, times=3, begin=6 * MIB))
    here.pull(QUICK)
    assert here.registry.sent <= 1.02 * here.size


@pytest.fixture
def proxy() -> Iterator[tuple[str, list[str]]]:
    """A proxy that refuses to connect anywhere, and what it was asked."""
    asked: list[str] = []

    def refuse() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                with connection:
                    asked.append(connection.recv(65536).decode())
                    connection.sendall(b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=refuse)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}", asked
        listening.shutdown(socket.SHUT_RDWR)
    thread.join()


def test_a_proxy_of_the_environment_is_used_and_its_password_is_in_no_text(
    here: Here, proxy: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, asked = proxy
    monkeypatch.setenv("https_proxy", f"http://me:secret@{address}")
    with pytest.raises(transfer.TransferError) as caught:
        here.fetch(with_options(tries=2), model=here.name._replace(host="registry.test"))
    assert asked[0].startswith("CONNECT registry.test:443 ")
    assert "407" in str(caught.value)
    assert not any("secret" in text for text in (str(caught.value), *map(repr, here.events)))


def test_this_machine_is_asked_without_a_proxy(
    here: Here, proxy: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, asked = proxy
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, f"http://{address}")
    here.pull()
    assert not asked


def test_a_registry_that_is_busy_and_says_at_once_is_not_asked_in_vain(here: Here) -> None:
    """Nor is one whose date has passed by a clock of ours that is ahead."""
    for value in "0", "Thu, 01 Jan 1970 00:00:10 GMT":
        busy = Fault("page", status=503, headers={"Retry-After": value})
        here.registry.add_fault(busy)
        with pytest.raises(transfer.TransferError, match="503"):
            here.fetch(with_options(tries=3))
        assert all(each.seconds > 0 for each in here.waits())
        here.registry.clear_faults()


def test_a_layer_whose_address_is_not_answered_keeps_no_other_waiting(here: Here) -> None:
    """As with thousands of small layers: a question takes longer than their bytes."""
    model = here.registry.add_model("two", "1b", [Layer(MIB), Layer(MIB, seed=3)], extras=False)
    first, second = model.digests
    here.registry.add_fault(Fault("hang", on="direct", digest=first))
    with Background(here.transfer(model=names.to_model(model.name))) as running:
        wait_for(lambda: here.registry.bytes_served(second) > MIB)
        assert not here.registry.bytes_served(first)
        here.registry.clear_faults()
        running.result()


#: The only name server never answers. In namespaces of its own: its port and the file are root's.
SILENT = """
import fcntl, os, socket, struct, subprocess, sys
store, config = sys.argv[1:]
dark = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
fcntl.ioctl(dark, 0x8914, struct.pack("16sh14x", b"lo", 0x41))  # SIOCSIFFLAGS: up, running
dark.bind(("127.0.0.1", 53))
subprocess.run(["mount", "--bind", config, os.path.realpath("/etc/resolv.conf")], check=True)
pull = [sys.executable, "-m", "watcher", "--store", store, "pull", "nowhere.example/a/b:1"]
process = subprocess.Popen(pull, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
dark.settimeout(60)
dark.recv(2000)
process.send_signal(2)
try:
    print(process.communicate(timeout=60)[1], process.returncode)
finally:
    process.kill()
"""


def test_ctrl_c_ends_it_while_no_name_server_answers(tmp_path: Path) -> None:
    for name in ("blobs", "manifests"):
        (tmp_path / "models" / name).mkdir(parents=True)
    config = tmp_path / "resolv.conf"
    config.write_text("nameserver 127.0.0.1\noptions timeout:30 attempts:5\n")
    command = ["unshare", "--map-root-user", "--net", "--mount", sys.executable, "-c", SILENT]
    command += [str(tmp_path / "models"), str(config)]
    env = os.environ | {"OLLAMA_HOST": "127.0.0.1:1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    if done.returncode and "TimeoutExpired" not in done.stderr:
        pytest.skip(f"needs namespaces of its own: {done.stderr}")
    assert done.stdout.split()[-2:] == ["nowhere.example/a/b:1", "130"], done
