"""Whatever command a finding or a refusal prints is run as it is printed, and has to help.

In a store whose path a shell would take apart; a fresh audit says whether it helped, and a picture
of the store whether anything else has changed. A kind without a row here fails the test.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from watcher.decide import finding_kinds
from watcher.demo.registry import Layer, Registry
from watcher.model import RefusalKind

from .conftest import environment, needs_root, open_parents
from .support import commands
from .support.notation import LIBRARY, MB, Store, age

HERE = Path(__file__).parent.parent


class Case(NamedTuple):
    """What is wrong with a store, what its finding prints, and what is to come of it."""

    make: Callable[[Store], object]
    #: The words that its command has in it.
    words: str
    #: The kind of what is told of it afterwards; "" where nothing is.
    then: str = ""


def paused(store: Store) -> None:
    digest = store.broken("40:40 60:60", total=200)
    store.manifest("llama3/latest", {digest: 200 * MB})


def bad_name(store: Store) -> None:
    store.model("m/latest")
    (store.manifests / LIBRARY / "m" / "latest copy").write_bytes(b"{}")


def dangling(store: Store) -> None:
    store.model("m/latest")
    (store.manifests / LIBRARY / "m" / "gone").symlink_to("nowhere")


def misplaced(store: Store) -> None:
    store.model()
    (store.manifests / "here").write_bytes(b"{}")


def broken_manifest(store: Store) -> None:
    store.model("m/latest")
    store.manifest("bad/latest", b"{")


def redundant(store: Store) -> None:
    content = b"a finished blob"
    digest = store.blob(content)
    store.manifest("llama3/latest", {digest: len(content)})
    sidecar = store.blobs / f"sha256-{digest}-partial-0"
    sidecar.write_bytes(b'{"N":0,"Offset":0,"Size":15,"Completed":0}')
    age(sidecar, "2h")


def foreign_owner(store: Store) -> None:
    digest = store.broken("40:40 60:60", total=200)
    store.manifest("llama3/latest", {digest: 200 * MB})
    for path in (store.path, store.blobs, store.manifests):
        os.chown(path, 12345, 12345)
    for path in store.blobs.iterdir():
        os.chown(path, 12345 if path.name.endswith("-0") else 54321, 12345)


def no_room(store: Store) -> None:
    digest = store.broken("0:-", total=100)
    sidecar = store.blobs / f"sha256-{digest}-partial-0"
    sidecar.write_text(f'{{"N":0,"Offset":0,"Size":{900 * 10**9},"Completed":0}}')
    age(sidecar, "2h")
    store.model()
    store.orphan("a useless orphan")


def forgotten(store: Store) -> None:
    store.model()
    ours = store.path / ".ollama-watch"
    ours.mkdir()
    (ours / "state.json").write_text("{")


CASES: dict[str, Case] = {
    "download_paused": Case(paused, "ollama pull llama3:latest", "download_paused"),
    "download_behind": Case(lambda s: s.broken("0:40 0:60"), "repair", "download_paused"),
    "download_hollow": Case(lambda s: s.broken("60:40 0:60"), "repair", "download_paused"),
    "download_blocked": Case(
        lambda s: s.manifest("l/latest", {s.broken("-:40 0:60", total=200): 200 * MB}),
        "repair", "download_paused",
    ),
    "download_unclaimed": Case(
        lambda s: s.manifest("l/latest", {s.broken("-:40 -:60", total=200): 200 * MB}),
        "repair", "download_paused",
    ),
    "download_redundant": Case(redundant, "repair"),
    "download_stale": Case(lambda s: s.broken("40:40 60:60", total=200, aged="8d"), "clean"),
    "blob_orphan": Case(lambda s: (s.model(), s.orphan()), "clean"),
    "manifest_corrupt": Case(broken_manifest, "ollama pull bad:latest", "manifest_corrupt"),
    "manifest_bad_name": Case(bad_name, "rm"),
    "manifest_dangling": Case(dangling, "rm"),
    "file_temporary": Case(lambda s: (s.model(), s.temporary()), "clean"),
    "file_owner": Case(foreign_owner, "chown"),
    "state_forgotten": Case(forgotten, "verify"),
    "store_no_room": Case(no_room, "clean", "store_no_room"),
}  # fmt: skip

#: What has no command, or is tried elsewhere, and why.
ELSEWHERE = {
    "download_at_risk": "tests/repair/test_at_risk.py",
    "blob_at_risk": "tests/repair/test_at_risk.py",
    "blob_astray": "tests/fidelity/test_astray.py",
    "manifest_case": "tests/fidelity/test_astray.py",
    "blob_unreadable": "tests/fidelity/test_access.py",
    "manifest_unwritable": "tests/fidelity/test_access.py",
    "store_unreadable": "tests/fidelity/test_access.py",
    "store_unwritable": "tests/fidelity/test_access.py",
    "download_transfer": "tests/test_transfers_shown.py: it takes a registry",
    "download_discarded": "tests/test_second_names.py: it takes a registry",
    "download_live": "nothing has to be done",
    "download_whole": "tests/repair: its data is hashed first",
    "download_unknown": "no command is known to help",
    "download_no_holes": "nothing has to be done",
    "blob_corrupt": "below: it takes a registry",
    "blob_missing": "below: it takes a registry",
    "blob_short": "tests/unit/observe: as a corrupt one",
    "blob_long": "tests/unit/observe: as a corrupt one",
    "blob_symlink": "nothing has to be done",
    "blob_dangling": "as a corrupt one",
    "blob_no_file": "as a corrupt one",
    "blob_unproven": "tests/repair: it is hashed",
    "blob_old_name": "the next server start renames it",
    "manifest_unreadable": "the server's permissions",
    "manifest_misplaced": "no command is known to help",
    "manifest_bad_digest": "as a corrupt manifest",
    "manifest_empty": "as a corrupt manifest",
    "manifest_wrong_size": "as a corrupt manifest",
    "file_foreign": "whose it is nobody knows",
    "state_forgotten": "tests/test_verify.py: all is hashed again",
    "state_owner": "tests of our own folder: it takes another user's",
    "store_foreign_intent": "tests/race: it takes somebody who plants it",
    "store_foreign": "tests of symlinks: it takes another user's",
    "store_globbed": "the store has to move",
    "store_network": "nothing has to be done",
    "store_no_manifests": "no command has them",
    "store_read_only": "the file system has to be mounted otherwise",
    "store_shared": "tests of shared blobs",
    "store_start_fails": "its cause has a finding of its own",
    "store_two_servers": "one of them has to be ended",
    "store_unlisted": "the server's permissions",
    "store_unseen": "tests of permissions",
}


def kinds() -> set[str]:
    """Every kind of finding there can be."""
    return {row.kind for row in finding_kinds.TABLE}


def test_each_kind_of_finding_has_a_row() -> None:
    known = CASES.keys() | ELSEWHERE.keys()
    missing = kinds() - known
    assert not missing, f"give {missing} a row in CASES: what its command is, and what comes of it"


# ---------------------------------------------------------------- running them


class Machine(NamedTuple):
    """A store with a name that a shell would take apart, and a path with what commands need."""

    store: Store
    environment: dict[str, str]
    asked_of_ollama: Path

    def call(self, *words: str) -> subprocess.CompletedProcess[bytes]:
        done = commands.run(["--store", str(self.store.path), *words], self.environment)
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        return done

    def audit(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.call("--json", "audit").stdout)
        return document

    def paste(self, command: str) -> subprocess.CompletedProcess[bytes]:
        """Run a command as a shell takes it, from another folder; who is asked says yes."""
        yes = (
            " --yes" if re.search(r" (clean|repair|quarantine (restore|purge)) ?", command) else ""
        )
        return subprocess.run(
            ["bash", "-c", command + yes],
            capture_output=True, env=self.environment, timeout=120, cwd="/", check=False,
        )  # fmt: skip


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    store = Store(tmp_path / 'it\'s a "st$ore" `x` \\ !' / "m m")
    tools = tmp_path / "bin"
    tools.mkdir()
    asked = tmp_path / "asked"
    for name, script in (
        ("ollama", f'printf "%s\\n" "ollama $*" >> "{asked}"'),
        ("sudo", 'exec "$@"'),
    ):
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    given = environment(tmp_path)
    path = f"{tools}:{os.environ['PATH']}"
    return Machine(store, {**given, "PATH": path, "OLLAMA_WATCH_WRITERS_VISIBLE": "true"}, asked)


def about(document: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [each for each in document["findings"] if each["kind"] == kind]


@pytest.mark.parametrize("kind", CASES)
def test_what_a_finding_prints_helps(machine: Machine, kind: str) -> None:
    case = CASES[kind]
    if kind == "file_owner" and os.geteuid():
        pytest.skip("only root gives files away")
    case.make(machine.store)
    untouched = bystanders(machine.store)
    (finding,) = about(machine.audit(), kind)
    command = finding["command"]
    assert case.words in command
    done = machine.paste(command)
    assert done.returncode == 0, (command, done.stdout + done.stderr)
    for path, content in untouched.items():
        assert path.read_bytes() == content, f"{command} has changed {path}"
    if command.startswith("ollama "):
        assert machine.asked_of_ollama.read_text() == f"{command}\n"
    after = machine.audit()
    assert case.then == kind or not about(after, kind)
    assert not case.then or about(after, case.then)


def bystanders(store: Store) -> dict[Path, bytes]:
    """A healthy model beside, which no command has to do with."""
    digest = store.model("a bystander/latest".replace(" ", "-"))
    paths = (
        store.blobs / f"sha256-{digest}",
        store.manifests / LIBRARY / "a-bystander" / "latest",
    )
    good = store.manifests / LIBRARY / "m" / "latest"
    return {path: path.read_bytes() for path in (*paths, *([good] if good.exists() else []))}


def test_a_corrupt_blob_comes_again_by_the_commands_alone(
    machine: Machine, registry: Registry
) -> None:
    content = b"the right bytes"
    model = registry.add_model("demo", "1b", [Layer(data=content)], extras=False)
    digests = [each.removeprefix("sha256:") for each in (*model.digests, model.config)]
    shown = model.name.removeprefix("http://")
    host, library, rest = shown.split("/")
    folder = machine.store.manifests / host / library / rest.split(":")[0]
    folder.mkdir(parents=True)
    (folder / "1b").write_bytes(model.manifest)
    for digest in digests:
        raw = registry.content(f"sha256:{digest}").read(0, 1 << 20)
        (machine.store.blobs / f"sha256-{digest}").write_bytes(raw)
    wrong = machine.store.blobs / f"sha256-{digests[0]}"
    wrong.write_bytes(b"X" * len(content))
    age(wrong, "2h")
    assert machine.call("verify").returncode == 1
    (finding,) = about(machine.audit(), "blob_corrupt")
    told = machine.call("repair", "-n").stdout.decode()
    assert "did not answer" not in told
    assert machine.paste(finding["command"]).returncode == 1, "its model has no such layer now"
    (missing,) = about(machine.audit(), "blob_missing")
    assert machine.paste(missing["command"]).returncode == 0
    assert wrong.read_bytes() == content


def as_root(command: str, machine: Machine) -> subprocess.CompletedProcess[bytes]:
    """What `sudo` would run: the interpreter is another user's here, the words behind it count."""
    words = shlex.split(command)
    assert words[0] == "sudo"
    return machine.call(*words[words.index("--store") + 2 :], "--yes")


@needs_root
def test_who_may_not_change_the_store_is_given_sudo_where_it_helps(
    machine: Machine, as_nobody: Callable[[Sequence[str]], list[str]]
) -> None:
    machine.store.model()
    machine.store.broken("0:40 0:60")
    machine.store.orphan()
    open_parents(machine.store.path)
    looks = as_nobody(["-m", "watcher", "--store", str(machine.store.path), "--json", "audit"])
    seen = subprocess.run(looks, capture_output=True, timeout=120)
    findings = json.loads(seen.stdout)["findings"]
    commands = [each["command"] for each in findings if each["command"]]
    assert len(commands) >= 2
    for command in commands:
        assert as_root(command, machine).returncode == 0
    after = machine.audit()
    assert not about(after, "blob_orphan")
    assert not about(after, "download_behind")


# ---------------------------------------------------------------- refusals


def test_a_reader_keeps_no_sidecar_from_being_written(machine: Machine) -> None:
    digest = machine.store.broken("0:40 0:60", total=200)
    with (machine.store.blobs / f"sha256-{digest}-partial").open("rb"):
        (finding,) = about(machine.audit(), "download_behind")
        assert machine.paste(finding["command"]).returncode == 0
    assert about(machine.audit(), "download_paused")


def test_a_reader_keeps_names_from_going_and_is_not_to_be_killed(machine: Machine) -> None:
    digest = machine.store.broken("40:40 60:60", total=200, aged="8d")
    with (machine.store.blobs / f"sha256-{digest}-partial").open("rb"):
        done = machine.call("--json", "clean", "--yes")
    (refused,) = json.loads(done.stdout)["plan"]["refusals"]
    assert refused["kind"] == "held"
    assert "kill" not in refused["remedy"] + refused["command"]
    assert "end that process" not in refused["remedy"]
    assert done.returncode == 3


def test_a_writer_keeps_sidecars_from_being_written(machine: Machine) -> None:
    digest = machine.store.broken("0:40 0:60", total=200)
    with (machine.store.blobs / f"sha256-{digest}-partial").open("r+b"):
        before = sidecars(machine.store)
        machine.call("repair", "--yes")
        assert sidecars(machine.store) == before


def sidecars(store: Store) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.blobs.glob("*-partial-*")}


def test_the_manifest_in_the_way_of_orphans_is_named_with_its_cure(machine: Machine) -> None:
    bad_name(machine.store)
    dangling(machine.store)
    machine.store.orphan()
    for _ in range(4):
        document = json.loads(machine.call("--json", "clean", "--yes").stdout)
        refusals = document["plan"]["refusals"]
        if not refusals:
            break
        assert machine.paste(refusals[0]["command"]).returncode == 0
    assert not about(machine.audit(), "blob_orphan")
    assert not about(machine.audit(), "manifest_dangling")


def test_a_label_that_is_none_is_looked_up(machine: Machine) -> None:
    machine.store.model()
    done = machine.call("--json", "quarantine", "purge", "7-x", "--yes")
    assert done.returncode == 2
    command = done.stderr.decode().rpartition("-> ")[2].strip()
    assert machine.paste(command).returncode == 0


#: Where each kind of refusal is tried.
REFUSALS = {
    RefusalKind.OLD_NAMES: "tests/fidelity/test_astray.py",
    RefusalKind.HELD: "a reader, above",
    RefusalKind.LIVE: "time",
    RefusalKind.NOT_QUIET: "time; `repair --wait`",
    RefusalKind.SIGHT: "tests/unit/decide: as root, or a setting",
    RefusalKind.SERVER_RUNS: "tests/test_printed_commands.py",
    RefusalKind.SERVER_STARTS: "time",
    RefusalKind.MANIFESTS: "above",
    RefusalKind.UNPROVEN: "as the finding",
    RefusalKind.STOPPED: "it was asked for",
    RefusalKind.CLOCK: "time",
    RefusalKind.LINKED: "the store has to be mounted otherwise",
    RefusalKind.LENGTH: "tests/test_lookup.py",
    RefusalKind.REGISTRY: "above",
    RefusalKind.OWNER: "file_owner, above",
    RefusalKind.CHANGED: "it is planned anew",
    RefusalKind.UNKNOWN: "above",
    RefusalKind.PERMISSION: "the file system has to be mounted otherwise",
    RefusalKind.ROOM: "quarantine purge, as a user decides",
}


def test_each_kind_of_refusal_has_a_row() -> None:
    assert set(REFUSALS) == set(RefusalKind)


def test_a_command_is_never_broken(machine: Machine) -> None:
    machine.store.broken("0:40 0:60", total=200, aged="10m")
    machine.store.model()
    machine.store.orphan()
    commands = {each["command"] for each in machine.audit()["findings"] if each["command"]}
    assert len(commands) >= 2
    for words in (("audit",), ("-v", "audit"), ("--no-color", "audit")):
        lines = machine.call(*words).stdout.decode().splitlines()
        assert {f"-> {each}" for each in commands} <= {line.strip() for line in lines}


def test_root_is_not_advised_to_use_sudo(machine: Machine) -> None:
    if os.geteuid():
        pytest.skip("for root")
    machine.store.broken("0:40 0:60", total=200)
    machine.store.orphan()
    for words in (("audit",), ("clean", "-n"), ("repair", "-n", "--offline"), ("status",)):
        blind = {**machine.environment, "OLLAMA_WATCH_WRITERS_VISIBLE": "false"}
        said = machine._replace(environment=blind).call(*words)
        text = said.stdout + said.stderr
        assert b"as root" not in text
        assert b"sudo" not in text
