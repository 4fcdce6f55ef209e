"""Whatever command an error prints is run as it is printed, by who reads it, and has to help.

Each row makes its situation for real, is run, its command is given to `sh -c` (with sudo: as root),
and the same is run again. Nothing else in the store or beside it may have changed. The stores have
names that a shell would take apart. A place in the package that prints a command and has no line in
`PLACES` fails the test.
"""

from __future__ import annotations

import ast
import os
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

import watcher
from watcher.demo.registry import Layer, Registry

from .conftest import environment, needs_root, open_parents
from .support.notation import MB, Store
from .support.servers import EngineServer, RealServer, wait_until

OWNER, STRANGER = 12345, 23456
NAMES = ('it\'s a "st$ore" `x` !', "-store", "new\nline %s")
HOUSE = Path(watcher.__file__).parent
Done = subprocess.CompletedProcess[str]
Tree = dict[str, tuple[int, int, int, bytes]]


class Scene:
    """A store, beside it another one, and users who run commands."""

    def __init__(self, folder: Path, name: str, as_user: Callable[..., list[str]]) -> None:
        self.folder, self.as_user = folder, as_user
        self.around = folder / "around"
        self.store = Store(self.around / name)
        self.store.model("m/latest")
        Store(self.around / "other").model("other/latest")
        self.inside: list[str] = []
        open_parents(self.store.path)

    def owned(self, uid: int = OWNER) -> None:
        for each in (self.store.path, *self.store.path.rglob("*")):
            os.chown(each, uid, uid, follow_symlinks=False)

    def run(self, words: Sequence[str], uid: int, *, named: bool = True) -> Done:
        at = ("--store", str(self.store.path)) if named else ()
        return self._started(["-m", "watcher", *at, *words], uid)

    def paste(self, command: str, uid: int) -> Done:
        """What `sh` makes of a command; that of `sudo` is run by root."""
        by = 0 if command.startswith("sudo ") else uid
        asks = re.search(r" (clean|repair)( |$)", command)
        answered = f"{command.removeprefix('sudo ')}{' --yes' if asks else ''}"
        return self._started(["-c", answered], by, "sh")

    def _started(self, words: Sequence[str], uid: int, program: str = "") -> Done:
        *command, python = self.as_user((), uid=uid, gid=uid)
        command += [program or python, *words]
        if self.inside:
            command = [*self.inside, *command[command.index("setpriv") :]]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, cwd="/", check=False
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def tree(self) -> Tree:
        """All that is around the store, and what is not ours."""
        found = {}
        for each in (self.around, *self.around.rglob("*")):
            if ".ollama-watch" not in each.parts or each.name == ".ollama-watch":
                status = each.lstat()
                content = each.read_bytes() if each.is_file() else b""
                found[str(each)] = (status.st_mode, status.st_uid, status.st_gid, content)
        return found


class Row(NamedTuple):
    """A situation, what is run in it by whom, and what is to come of its command."""

    make: Callable[[Scene], object]
    words: tuple[str, ...]
    user: int
    #: The exit code before, and those that are right afterwards.
    code: int
    #: What its command has in it.
    has: str
    after: tuple[int, ...] = (0,)
    #: What the command may change besides: a name below the store, or "." or "..".
    changes: tuple[str, ...] = ()
    #: The store is named on the command line.
    named: bool = True


def printed(done: Done) -> str:
    """The one command that stands on a line of its own."""
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines()]
    (command,) = {line.removeprefix("-> ") for line in lines if line.startswith("-> ")}
    return command


def shut(scene: Scene) -> None:
    scene.owned()
    scene.store.path.chmod(0o700)


def shut_above(scene: Scene) -> None:
    scene.owned()
    scene.around.chmod(0o700)


def foreign_state(scene: Scene) -> None:
    scene.owned()
    folder = scene.store.path / ".ollama-watch"
    folder.mkdir()
    os.chown(folder, STRANGER, STRANGER)


def state_of_root(scene: Scene) -> None:
    scene.store.broken("0:40 0:60", total=200)
    scene.owned()
    (scene.store.path / ".ollama-watch").mkdir(mode=0o755)


def only_looked_at(scene: Scene) -> None:
    scene.owned()


def paused(scene: Scene) -> None:
    assert scene.run(("queue", "pause"), 0).returncode == 0


def broken(scene: Scene) -> None:
    scene.store.broken("0:40 0:60", total=200)
    scene.owned()


def in_namespace(scene: Scene, script: str) -> None:
    """What is run from now on sees its own mounts, made by a script."""
    made = scene.as_user([])  # which mounts the interpreter where every user can reach it
    keeper = subprocess.Popen(
        [*made[: made.index("setpriv")], "sh", "-ec", f"{script}\necho; read _"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert keeper.stdout is not None
    assert keeper.stdout.readline() == "\n", "the mounts can't be made"
    KEEPERS.append(keeper)
    scene.inside = ["nsenter", f"--mount=/proc/{keeper.pid}/ns/mnt"]


KEEPERS: list[subprocess.Popen[str]] = []


def own_etc(scene: Scene, script: str = "") -> None:
    etc = scene.folder / "etc"
    in_namespace(scene, f"cp -a /etc {etc}; mount --bind {etc} /etc\n{script}")


def shut_settings(scene: Scene) -> None:
    scene.owned(STRANGER)
    own_etc(
        scene, "echo 'repair = true' > /etc/ollama-watch.toml; chmod 600 /etc/ollama-watch.toml"
    )


def shut_unit(scene: Scene) -> None:
    unit = scene.folder / "ollama.service"
    unit.write_text("[Service]\nEnvironmentFile=/etc/ollama.env\n")
    (scene.folder / "env").write_text(f"OLLAMA_MODELS={scene.around}/other\n")
    own_etc(
        scene,
        f"cp {unit} /etc/systemd/system/; cp {scene.folder}/env /etc/ollama.env\n"
        "chmod 600 /etc/ollama.env",
    )


def not_mounted(scene: Scene) -> None:
    point = scene.folder / "mnt point"
    point.mkdir()
    (scene.folder / "ollama.service").write_text(
        f'[Service]\nEnvironment="OLLAMA_MODELS={point}/other"\n'
    )
    spelled = str(point).replace(" ", "\\040")
    (scene.folder / "fstab").write_text(f"{scene.around} {spelled} none bind 0 0\n")
    folder = shlex.quote(str(scene.folder))
    own_etc(scene, f"cp {folder}/ollama.service /etc/systemd/system/; cp {folder}/fstab /etc/fstab")


def without_proc(scene: Scene) -> None:
    in_namespace(scene, "while umount -l /proc 2>/dev/null; do :; done")


def full(scene: Scene) -> None:
    """A file system of its own, with no room left."""
    path = shlex.quote(str(scene.store.path))
    in_namespace(
        scene,
        f"mount -t tmpfs -o size=64k,mode=755 none {path}; mkdir {path}/blobs {path}/manifests\n"
        f"dd if=/dev/zero of={path}/blobs/x bs=4k count=100 2>/dev/null || true",
    )


REPAIR = ("repair", "--yes", "--offline")
OURS = (".ollama-watch",)
ROWS = {
    "shut": Row(shut, ("audit",), STRANGER, 4, "sudo ", (4,)),
    "shut, to root": Row(shut_above, ("audit",), 0, 1, "chmod o+x", changes=("..",)),
    "foreign state": Row(
        foreign_state, REPAIR, 0, 3, "chown -hR", changes=OURS
    ),
    "foreign state, queue": Row(
        foreign_state, ("queue", "add", "x"), OWNER, 3, "sudo chown -hR", changes=OURS
    ),
    "state of root's": Row(
        state_of_root, REPAIR, 0, 4, "chown -hR", changes=OURS
    ),
    "queue of others": Row(
        only_looked_at, ("queue", "add", "x"), STRANGER, 4, "sudo ", (4,), (".ollama-watch",)
    ),
    "repair of others": Row(
        broken, REPAIR, STRANGER, 3, "sudo ", (0, 4),
        (".ollama-watch", "blobs"),
    ),
    "paused queue": Row(paused, ("queue", "run"), 0, 0, "queue resume"),
    "too little time": Row(
        lambda scene: None, ("verify", "--max-duration", "0s"), 0, 1, "verify", (0, 1)
    ),
    "shut settings": Row(shut_settings, ("audit",), STRANGER, 2, "sudo chmod a+r"),
    "shut unit": Row(shut_unit, ("audit",), STRANGER, 4, "sudo ", (4,), named=False),
    "not mounted": Row(not_mounted, ("audit",), 0, 10, "mount ", named=False),
    "without /proc": Row(without_proc, ("audit",), 0, 4, "mount -t proc"),
    "full": Row(full, ("queue", "add", "x"), 0, 4, "df", (4,)),
}  # fmt: skip


EACH_NAME = pytest.mark.slow("each name with each row; one by the test's name is always run")


@pytest.fixture(params=["", *(pytest.param(name, marks=EACH_NAME) for name in NAMES)], ids=ascii)
def scene(
    request: pytest.FixtureRequest, tmp_path: Path, as_user: Callable[..., list[str]]
) -> Iterator[Scene]:
    """The store's name is one of `NAMES`, by the test's; slow: each of them."""
    name = request.param or NAMES[sum(map(ord, request.node.name)) % len(NAMES)]
    try:
        yield Scene(tmp_path, name, as_user)
    finally:
        while KEEPERS:
            keeper = KEEPERS.pop()
            keeper.communicate()


@needs_root
@pytest.mark.parametrize("name", ROWS)
def test_what_an_error_prints_helps(scene: Scene, name: str) -> None:
    row = ROWS[name]
    row.make(scene)
    before = scene.tree()
    first = scene.run(row.words, row.user, named=row.named)
    assert first.returncode == row.code, first.stdout + first.stderr
    command = printed(first)
    assert row.has in command
    assert row.user or "sudo" not in first.stdout + first.stderr
    pasted = scene.paste(command, row.user)
    assert pasted.returncode in (0, 1), (command, pasted.stdout + pasted.stderr)
    after = scene.tree()
    again = scene.run(row.words, row.user, named=row.named)
    assert again.returncode in row.after, again.stdout + again.stderr
    if 4 not in row.after:
        assert command not in again.stdout + again.stderr
    may = {str(Path(os.path.normpath(scene.store.path / each))) for each in row.changes}
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert {path for path in changed if not any(path.startswith(each) for each in may)} <= {
        str(scene.store.path / ".ollama-watch")
    }


# ---------------------------------------------------------------- told in a sentence, or in a shell


@needs_root
def test_the_hint_of_a_wrong_option_is_a_command(scene: Scene) -> None:
    for words in (("clean", "--nothing"), ("--nothing",), ("queue", "nothing")):
        done = scene.run(words, OWNER)
        assert done.returncode == 2
        hint = re.search(r"Try '(.*)' for help", done.stderr)
        assert hint, done.stderr
        helped = scene.paste(hint[1], OWNER)
        assert helped.returncode == 0, helped.stderr
        assert "Options:" in helped.stdout


@needs_root
def test_the_limit_of_open_files_is_raised_by_the_command(scene: Scene) -> None:
    words = [sys.executable, "-m", "watcher", "--store", str(scene.store.path), "audit"]
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    done = subprocess.run(
        words, capture_output=True, text=True, env=environment(scene.folder), timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (8, most)),
    )  # fmt: skip
    assert done.returncode == 4
    script = f"ulimit -Sn 8; {printed(done)}; exec {shlex.join(words)}"
    again = subprocess.run(
        ["sh", "-c", script],
        capture_output=True, text=True, env=environment(scene.folder), timeout=120,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr


@needs_root
def test_what_was_never_hashed_is_by_the_command(scene: Scene) -> None:
    for _ in range(2):
        done = scene.run(("audit",), 0)
        assert done.returncode == 0
        command = re.search(r"not yet verified\.\s+Run: (.*)", done.stdout)
        if command is not None:
            assert scene.paste(command[1], 0).returncode == 0
    assert command is None


@needs_root
def test_a_unit_that_was_edited_goes_by_the_command(scene: Scene) -> None:
    """In an image, whose name is as odd as the store's."""
    image = scene.folder / f"{scene.store.path.name} image"
    unit = image / "etc" / "systemd" / "system" / "ollama-watch.service"
    unit.parent.mkdir(parents=True)
    unit.write_text("[Unit]\n")
    words = ("service", "uninstall", "--root", str(image), "--yes")
    unit.write_text("# ollama-watch service install: sha256=0123456789abcdef folders=0\n[Unit]\n")
    done = scene.run(words, 0, named=False)
    assert done.returncode == 3, done.stdout + done.stderr
    assert scene.paste(printed(done), 0).returncode == 0
    assert scene.run(words, 0, named=False).returncode == 0
    assert list(unit.parent.iterdir()) == []


def settings(scene: Scene, text: str) -> tuple[str, str]:
    """The words that name a settings file, whose path is as odd as the store's."""
    path = scene.folder / f"{scene.store.path.name}.toml"
    path.write_text(text)
    return "--config", str(path)


@needs_root
def test_who_has_the_port_is_shown_by_the_command(scene: Scene) -> None:
    pytest.importorskip("prometheus_client")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        named = settings(scene, f'metrics_listen = "127.0.0.1:{port}"')
        words = ["--store", str(scene.store.path), *named, "daemon"]
        done = subprocess.run(
            [sys.executable, "-m", "watcher", *words],
            capture_output=True, text=True, env=environment(scene.folder), timeout=120,
        )  # fmt: skip
        assert done.returncode == 4
        shown = scene.paste(printed(done), 0)
    assert f"127.0.0.1:{port}" in shown.stdout, shown.stderr
    assert f"pid={os.getpid()}" in shown.stdout


@needs_root
def test_the_server_that_is_in_the_way_is_stopped_by_the_command(scene: Scene) -> None:
    words = (*settings(scene, "writers_visible = true"), "clean", "--yes")
    with EngineServer(scene.store.path) as server:
        server.start().wait_ready()
        orphan = scene.store.orphan()
        done = scene.run(words, 0)
        assert done.returncode == 3
        assert scene.paste(printed(done), 0).returncode == 0
        wait_until(lambda: scene.run(words, 0).returncode == 0, "the end of the server")
    assert not (scene.store.blobs / f"sha256-{orphan}").exists()


@needs_root
@pytest.mark.skipif("OLLAMA_BIN" not in os.environ, reason="OLLAMA_BIN is not set")
def test_a_pull_over_http_that_was_not_allowed_is_by_its_command(
    scene: Scene, registry: Registry
) -> None:
    model = registry.add_model("demo", "1b", [Layer(4 * MB)]).name.removeprefix("http://")
    with RealServer(scene.store.path) as server:
        server.start().wait_ready()
        done = scene.run(("pull", "--host", server.url, model), 0)
        assert done.returncode == 4
        assert "--insecure" in printed(done)
        pasted = scene.paste(printed(done), 0)
        assert pasted.returncode == 0, pasted.stdout + pasted.stderr


@needs_root
def test_an_interrupted_pull_goes_on_by_its_command(scene: Scene, registry: Registry) -> None:
    """On the same store, at the same server, with the same options."""
    model = registry.add_model("demo", "1b", [Layer(8 * MB)]).name
    registry.throttle(2 * MB)
    with EngineServer(scene.store.path) as server:
        server.start().wait_ready()
        words = ("pull", "--verify", "--insecure", "--host", server.url, model)
        done = interrupted(scene, words, " % of")
        assert done.returncode == 130, done.stdout + done.stderr
        command = printed(done)
        assert "--verify" in command
        assert "sudo" not in command
        registry.throttle(None)
        pasted = scene.paste(command, 0)
        assert pasted.returncode == 0, pasted.stdout + pasted.stderr


def interrupted(scene: Scene, words: Sequence[str], when: str) -> Done:
    """What is run until it prints some words, for a minute at most, and then interrupted."""
    call = scene.as_user(["-m", "watcher", "--store", str(scene.store.path), *words], uid=0, gid=0)
    if scene.inside:
        call = [*scene.inside, *call[call.index("setpriv") :]]
    told = ""
    with subprocess.Popen(
        call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        limit = threading.Timer(60, process.kill)
        limit.start()
        while when not in told:
            line = process.stdout.readline()
            assert line, told
            told += line
        process.send_signal(signal.SIGINT)
        told += process.communicate(timeout=120)[0]
        limit.cancel()
    return Done(call, process.returncode, told, "")


SYSTEMD = """
mkdir -p /run/systemd/system
mount --bind {tool} /usr/bin/systemctl
cp {unit} /etc/systemd/system/
"""


@needs_root
@pytest.mark.parametrize("port", [7, 8])
def test_the_unit_of_a_server_that_is_gone_is_started_by_the_command(
    scene: Scene, port: int
) -> None:
    """And no unit that has its server at another address."""
    tool, unit, asked = (scene.folder / name for name in ("tool", "ollama.service", "asked"))
    tool.write_text(f'#!/bin/sh\ntest "$1" = show && exit 1\necho "$@" >> {asked}\n')
    tool.chmod(0o755)
    unit.write_text("[Service]\nEnvironment=OLLAMA_HOST=127.0.0.1:7\n")
    run = "mount -t tmpfs none /run" if not os.path.isdir("/run/systemd/system") else ""
    own_etc(scene, run + SYSTEMD.format(tool=tool, unit=unit))
    at = f"http://127.0.0.1:{port}"
    told = interrupted(scene, ("pull", "--host", at, "m:cloud"), "when it answers").stdout
    command = re.search(r"at most: (.*)", told)
    assert command
    if port != 7:
        assert command[1] == "start the server"
        return
    assert scene.paste(command[1], 0).returncode == 0
    assert asked.read_text() == "start ollama\n"


# ---------------------------------------------------------------- none is forgotten

MAKES = frozenset(
    {"watch", "on", "again", "ours", "shell", "as_root", "ollama", "line", "stop"}
    | {"new_spellings", "brought_up", "cant_write"}
)
SPELLED = re.compile(
    r"(?<![\w./'`-])(?:sudo|chown|chmod|systemctl|kill|mount|umount|dmesg|journalctl|ulimit|sysctl"
    r"|lsattr|chattr|curl|docker|mkdir|rm|mv|ss|setpriv|ollama-watch)"
    r" (?:-|[a-z]+ollama|audit|df|clean|repair|verify|queue|pull|reset|prepare|proc)"
)
HERE = "tests/test_printed_commands.py"
FINDINGS = "tests/test_commands_work.py"
ACCESS = "tests/fidelity/test_access.py"
ASTRAY = "tests/fidelity/test_astray.py"
CAUSES = "tests/unit/pull/test_causes.py"
#: Each place that makes or spells a command: the file that runs it, or why none can.
PLACES: dict[str, str] = {
    place: told
    for told, found in {
        HERE: (
            "cli.py:_run", "commands/queueing.py:run",
            "commands/installing.py:_why_kept",
            "config.py:_read", "reconcile.py:_Run._powerless", "decide/plan.py:_with_command",
            "decide/safety.py:idle_forbids", "errors.py:refused", "errors.py:named",
            "state/json_file.py:File._failed", "service/listener.py:bound",
            "observe/place.py:_candidates", "show/queue.py:restart",
            "observe/place.py:_mount_command", "observe/place.py:no_permission",
            "state/state_folder.py:_give_back",
            "pull/failures.py:Asked.pull_again", "show/tables.py:healthy",
            "show/tables.py:verified", "show/usage.py:_verdict", "show/tables.py:quarantine",
        ),
        FINDINGS: (
            "decide/cleaning.py:surplus", "decide/blob_findings.py:_odd_blob",
            "decide/findings.py:_no_room",
            "decide/findings.py:given_to",
            "decide/findings.py:helps", "decide/findings.py:protects",
            "decide/findings.py:made_listable",
            "decide/blob_findings.py:odd_manifest", "decide/blob_findings.py:of_blobs",
            "decide/blob_findings.py:_fixed", "decide/blob_findings.py:of_leftovers",
            "decide/quarantine.py:_unconfirmed", "decide/quarantine.py:damaged_blobs",
            "decide/quarantine.py:steps", "decide/blob_findings.py:_completed",
        ),
        ACCESS: ("decide/server_view.py:_cure",),
        ASTRAY: (
            "decide/blob_findings.py:_case", "decide/blob_findings.py:_astray",
            "decide/blob_findings.py:_old",
            "decide/safety.py:_why_not",
        ),
        "tests/repair/test_at_risk.py": ("decide/at_risk.py:finding",),
        "tests/test_root.py": ("decide/findings.py:_state", "commands/daemon.py:_read_again"),
        "tests/race/test_planted_intents.py": ("decide/findings.py:_foreign_intents",),
        "tests/crash/test_power_cut.py": ("commands/prepare.py:_name_doubted",),
        "tests/test_command_line.py": (
            "commands/declare.py:Group._hint", "commands/quarantine.py:_act",
        ),
        "tests/test_unseen.py": ("observe/place.py:_named_store",),
        "tests/transfer/test_push.py": ("commands/mirror.py:push",),
        "tests/transfer/test_mending.py": ("reconcile.py:_Run._fetched",),
        "tests/transfer/test_pulls.py": ("pull/by_transfer.py:_refused",),
        "`df` of a store whose disk is full, which HERE runs": ("decide/quarantine.py:fetched",),
        "tests/race/test_full_disk.py": ("act/apply.py:by_hand",),
        "tests/test_lookup.py": ("decide/repairing.py:_no_length",),
        "which of two files counts, or may go, a user decides": (
            "decide/quarantine.py:_no_room", "decide/quarantine.py:_restore",
        ),
        "tests/test_service.py": (
            "commands/installing.py:_Systemd._line", "commands/installing.py:_check_permission",
        ),
        CAUSES: (
            "pull/failures.py:Asked.by_root", "pull/failures.py:Asked.install",
            "pull/failures.py:Asked.on_store",
        ),
        "as idle_forbids, whose command it is": (
            "decide/safety.py:_links_forbid", "decide/safety.py:store_forbids",
        ),
        "no input is known that brings up a fault of ours": ("cli.py:_failed",),
        "a disk that fails is not at hand": ("errors.py:refused",),
        "its limit counts for the whole machine": ("service/triggers.py:FileEvents._why",),
        "only a unit's filter of system calls brings it up": ("system/privileges.py:lower",),
        "what runs or what is drawn, and no advice": (
            "decide/forecast.py:forecast", "show/queue.py:runs",
        ),
    }.items()
    for place in found
}  # fmt: skip


def places() -> Iterator[str]:
    """Every function of the package that makes a command, or spells one."""
    for path in sorted(HOUSE.rglob("*.py")):
        name = path.relative_to(HOUSE).as_posix()
        if not name.startswith("demo/") and name not in ("system/advice.py", "service/units.py"):
            tree = ast.parse(path.read_text())
            docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            yield from _in(tree, f"{name}:", docs)


def _in(node: ast.AST, where: str, docs: set[int]) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        inner = where
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            inner = f"{where}.{child.name}".replace(":.", ":")
        if _makes(child) or (id(child) not in docs and _spells(child)):
            yield inner
        yield from _in(child, inner, docs)


def _makes(node: ast.AST) -> bool:
    called = node.func if isinstance(node, ast.Call) else None
    if isinstance(called, ast.Name) and called.id == "as_root":
        return True
    if not isinstance(called, ast.Attribute) or not isinstance(called.value, ast.Name):
        return False
    return called.value.id == "advice" and called.attr in MAKES


def _spells(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and SPELLED.search(node.value) is not None
    )


def test_every_place_that_prints_a_command_is_tried() -> None:
    found = set(places())
    assert found - PLACES.keys() == set(), "say in PLACES where what it prints is run"
    assert PLACES.keys() - found == set(), "what is not there any more"
    for told in PLACES.values():
        assert not told.startswith("tests/") or (HOUSE.parent / told).is_file(), told
