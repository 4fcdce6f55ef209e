"""What is wanted and the server's next start takes: told as a warning, and really kept."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.conftest import SERVERS
from tests.support.notation import MB, Store, age, digest_of
from tests.support.runs import changed, one_look, one_run, rules
from tests.support.servers import Server
from watcher.model import Finding, Severity
from watcher.state import fs
from watcher.state.state_folder import DAEMON_LOCK

KINDS = ("download_at_risk", "blob_at_risk")
Prepare = Callable[[Store], object]


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, models: Store) -> Iterator[Server]:
    with ExitStack() as stack:
        yield stack.enter_context(request.param(models.path))


def at_risk(store: Store) -> list[Finding]:
    policy = changed(rules(), repair=True, clean=True)
    report = one_look(store.host(), policy)
    return [each for each in report.diagnosis.findings if each.kind in KINDS]


def paused(store: Store) -> None:
    store.broken("10:10 0:0", aged="2h")


def old_sidecars(store: Store) -> None:
    """As while a pull goes on: its data is written, and its sidecars are not."""
    digest = store.broken("10:10 0:0", aged="2h")
    age(store.blobs / f"sha256-{digest}-partial", "5m")


def transfer(store: Store) -> None:
    path = store.blobs / f"sha256-{digest_of('tensor')}.tmp"
    path.write_bytes(b"tensor")
    age(path, "3h")


def finished_layer(store: Store) -> None:
    store.orphan(aged="2h")


def named_in_vain(store: Store) -> None:
    """A manifest spells the digest so that it protects nothing."""
    digest = store.blob(b"weights", aged="9d")
    store.manifest("m/latest", {f"sha256-{digest}": 7})


STATES = (paused, old_sidecars, transfer, finished_layer, named_in_vain)


@pytest.mark.parametrize("make", STATES)
def test_the_start_takes_it_unless_the_command_was_run(
    models: Store, server: Server, run: Callable[..., subprocess.CompletedProcess[bytes]],
    make: Prepare,
) -> None:  # fmt: skip
    models.model()
    make(models)
    before = models.names()
    (found,) = at_risk(models)
    assert found.severity is Severity.WARNING
    assert "next server start" in found.alone
    told = run("--store", str(models.path), "audit")
    assert told.returncode == 1
    assert b"at risk" in told.stdout
    words = found.command.split()
    where = words.index("repair")
    done = run("--store", str(models.path), *words[where:], "--yes")
    assert done.returncode == 0, done.stderr
    assert {each.severity for each in at_risk(models)} <= {Severity.INFO}
    server.start().wait_ready()
    assert set(before) <= set(models.names())


@pytest.mark.parametrize("make", STATES)
def test_a_server_start_deletes_files_that_are_reported_at_risk(
    models: Store, server: Server, make: Prepare
) -> None:
    models.model()
    make(models)
    before = models.names()
    assert at_risk(models)
    server.start().wait_ready()
    assert set(models.names()) < set(before)


def test_a_young_one_is_reported_for_information_with_its_time(models: Store) -> None:
    models.model()
    models.broken("10:10 0:0", aged="10m")
    (found,) = at_risk(models)
    assert found.severity is Severity.INFO
    assert "after" in found.alone


@pytest.mark.parametrize("aged", ["10m", "40m"])
def test_the_command_is_printed_once_it_does_something(
    models: Store, run: Callable[..., subprocess.CompletedProcess[bytes]], aged: str
) -> None:
    models.model()
    models.broken("10:10 0:0", aged=aged)
    said = run("--store", str(models.path), "audit", "-v").stdout
    assert b"next server start after" in said.splitlines()[0] + said.splitlines()[1]
    done = run("--store", str(models.path), "repair", "--yes").stdout
    printed = re.search(rb"(Run:|->) .* repair ", said) is not None
    assert printed is (b"nothing to repair" not in done)


def test_a_download_is_not_at_risk_once_its_finished_blob_was_found_right(models: Store) -> None:
    models.broken("0:0", aged="2h", total=5 / MB, name="layer")
    models.manifest("m/latest", {models.blob(b"layer"): 5})
    assert at_risk(models)
    one_run(models.host(), rules(repair=False, hash=True, verify=True))
    assert at_risk(models) == []


def test_stale_downloads_and_old_orphans_are_not_at_risk(models: Store) -> None:
    models.model()
    models.broken("10:10 0:0", aged="9d")
    models.orphan(aged="9d")
    assert at_risk(models) == []


def unit(store: Store, text: str) -> None:
    folder = Path(store.host().system) / "etc/systemd/system"
    folder.mkdir(parents=True)
    where = f"Environment=OLLAMA_MODELS={store.path}\n"
    (folder / "ollama.service").write_text(f"[Service]\n{where}{text}\n")


@contextmanager
def watched(store: Store) -> Iterator[None]:
    """By a daemon, as far as another process can tell."""
    (store.path / ".ollama-watch").mkdir()
    with (
        fs.opened_folder(str(store.path / ".ollama-watch")) as ours,
        fs.locked(DAEMON_LOCK, ours),
    ):
        yield


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("ExecStartPre=-/x/ollama-watch --store STORE -q prepare", True),
        ("ExecStartPre=-/x/ollama-watch --store /other -q prepare", False),
        ("Environment=OLLAMA_NOPRUNE=1", True),
        ("Environment=OLLAMA_NOPRUNE=false", False),
        ("", False),
    ],
)
def test_files_are_at_risk_unless_prepare_in_the_unit_protects_them(
    models: Store, text: str, kept: bool
) -> None:
    models.model()
    paused(models)
    finished_layer(models)
    unit(models, text.replace("STORE", str(models.path)))
    assert (at_risk(models) == []) is kept
    if kept:
        policy = changed(rules(), repair=True, clean=True)
        report = one_look(models.host(), policy)
        assert report.diagnosis.forecast is not None
        assert not report.diagnosis.forecast.deletes


def test_beside_a_daemon_only_files_that_it_failed_to_protect_are_at_risk(models: Store) -> None:
    models.model()
    digest = models.broken("10:10 0:0", aged="40m")
    with watched(models):
        assert at_risk(models) == []
        for path in models.blobs.glob(f"sha256-{digest}*"):
            age(path, "2h")
        assert [each.severity for each in at_risk(models)] == [Severity.WARNING]
