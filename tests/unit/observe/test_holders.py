"""Who has what open: real children, on the real ``/proc``."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import IS_ROOT, needs_root
from tests.support.driving import once
from tests.support.notation import Store, quiet_machine
from tests.support.servers import wait_until
from watcher.model import Entry, Holder, ServerState, Visibility
from watcher.observe import processes, scan

HOLD = """
import sys
held = open(sys.argv[1], sys.argv[2])
print("ready", flush=True)
sys.stdin.read()
"""

#: Python's own mmap keeps a descriptor; PROT_READ and MAP_SHARED are 1.
MAP = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
for path in sys.argv[1:]:
    fd = os.open(path, os.O_RDONLY)
    libc.mmap(None, 4096, 1, 1, fd, 0)
    os.close(fd)
print("ready", flush=True)
sys.stdin.read()
"""


class Children:
    """Processes that end with the test."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def start(self, *command: str, **more: object) -> subprocess.Popen[bytes]:
        """Start it and wait until it has said that it is ready."""
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **more  # type: ignore[call-overload]
        )  # fmt: skip
        self._stack.enter_context(child)
        self._stack.callback(child.kill)
        assert child.stdout is not None
        assert child.stdout.readline().strip() == b"ready"
        return child  # type: ignore[no-any-return]

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def children() -> Iterator[Children]:
    made = Children()
    yield made
    made.close()


@pytest.fixture
def data(models: Store) -> Path:
    # A name that no other test has open at the same time.
    return models.blobs / f"sha256-{models.broken('0:1', name=str(models.path))}-partial"


def entry_of(path: Path) -> Entry:
    return scan.entry(path.name, path.lstat())


def held(models: Store, *entries: Entry) -> tuple[Holder, ...]:
    return processes.holders_of(models.host(proc="/proc"), entries)


@pytest.mark.parametrize(("mode", "writes"), [("rb", False), ("r+b", True), ("ab", True)])
def test_readers_and_writers(
    models: Store, data: Path, children: Children, mode: str, writes: bool
) -> None:
    entry = entry_of(data)
    child = children.start(sys.executable, "-c", HOLD, str(data), mode)
    (found,) = held(models, entry)
    assert (found.pid, found.entry, found.writes) == (child.pid, data.name, writes)


def test_a_process_that_reads_and_writes_is_one_holder_that_writes(
    models: Store, data: Path, children: Children
) -> None:
    twice = "import sys; r = open(sys.argv[1], 'rb'); w = open(sys.argv[1], 'r+b');"
    twice += "r2 = open(sys.argv[1], 'rb'); print('ready', flush=True); sys.stdin.read()"
    children.start(sys.executable, "-c", twice, str(data))
    assert [each.writes for each in held(models, entry_of(data))] == [True]


def test_a_holder_is_found_by_inode_after_a_rename_and_after_an_unlink(
    models: Store, data: Path, children: Children
) -> None:
    entry = entry_of(data)
    children.start(sys.executable, "-c", HOLD, str(data), "r+b")
    data.rename(data.with_name("renamed"))
    assert len(held(models, entry)) == 1
    data.with_name("renamed").unlink()
    assert len(held(models, entry)) == 1


def test_another_file_of_the_same_name_is_not_held(
    models: Store, data: Path, children: Children, tmp_path: Path
) -> None:
    """The same layer in another store, on this disk and on one more."""
    others = [tmp_path / "other", Path("/dev/shm") / f"ollama-watch-{os.getpid()}"]
    for folder in others:
        folder.mkdir()
        try:
            (folder / data.name).write_bytes(b"")
            children.start(sys.executable, "-c", HOLD, str(folder / data.name), "r+b")
            assert held(models, entry_of(data)) == ()
        finally:
            shutil.rmtree(folder)


@needs_root
@pytest.mark.parametrize("layer", ["lower", "upper"])
def test_the_same_file_name_counts_where_an_overlay_shows_it(
    models: Store, data: Path, children: Children, layer: str
) -> None:
    """A container's files have devices of their own, and ours lie in a layer below them."""
    for name in ("lower", "upper", "work", "merged"):
        (models.path.parent / name).mkdir()
    models.path.rename(models.path.parent / layer / "models")
    store = Store.at(models.path.parent / layer / "models")
    overlay = "lowerdir=lower,upperdir=upper,workdir=work"
    mount = f'mount -t overlay none -o {overlay} merged || exit 9; exec "$@"'
    opened = f"merged/models/blobs/{data.name}"
    command = ("unshare", "-m", "sh", "-c", mount, "sh", sys.executable, "-c", HOLD, opened, "rb")
    try:
        child = children.start(*command, cwd=models.path.parent)
    except AssertionError:
        pytest.skip("no overlay can be mounted here")
    (found,) = held(store, entry_of(store.blobs / data.name))
    assert (found.pid, found.by_name) == (child.pid, True)
    assert "by the name alone" in found.doubt


def test_a_process_with_a_mapping_alone_is_a_holder(
    models: Store, data: Path, children: Children
) -> None:
    """The descriptor is closed, and the pages are there."""
    child = children.start(sys.executable, "-c", MAP, str(data))
    open_files = Path(f"/proc/{child.pid}/fd").iterdir()
    assert str(data) not in [os.readlink(each) for each in open_files]
    (found,) = held(models, entry_of(data))
    assert (found.pid, found.entry, found.writes) == (child.pid, data.name, False)


def test_a_process_holds_every_file_that_it_has_mapped(
    models: Store, data: Path, children: Children
) -> None:
    other = data.with_name(f"{data.name}-0")
    other.write_bytes(bytes(4096))
    children.start(sys.executable, "-c", MAP, str(data), str(other))
    found = held(models, entry_of(data), entry_of(other))
    assert {each.entry for each in found} == {data.name, other.name}


def test_other_files_and_our_own_process_are_no_holders(
    models: Store, data: Path, children: Children
) -> None:
    children.start(sys.executable, "-c", HOLD, str(models.blobs / f"{data.name}-0"), "rb")
    with data.open("rb"):
        assert held(models, entry_of(data)) == ()


def test_a_killed_process_holds_nothing_and_neither_does_a_zombie(
    models: Store, data: Path, children: Children
) -> None:
    child = children.start(sys.executable, "-c", HOLD, str(data), "r+b")
    child.send_signal(signal.SIGKILL)
    state = Path(f"/proc/{child.pid}/stat")
    wait_until(lambda: state.read_text().rpartition(")")[2].split()[0] == "Z", "its end")
    assert held(models, entry_of(data)) == ()  # it is not waited for yet: a zombie


def program(folder: Path, name: str) -> str:
    """A program of that name which waits."""
    path = folder / name
    path.write_text("#!/bin/sh\necho ready\nread x\n")
    path.chmod(0o755)
    return str(path)


def test_servers_clients_and_others_are_distinguished(
    models: Store, tmp_path: Path, children: Children
) -> None:
    ollama, other = program(tmp_path, "ollama"), program(tmp_path, "llama")
    env = {"PATH": os.environ["PATH"], "OLLAMA_MODELS": str(models.path), "OLLAMA_NOPRUNE": "1"}
    server = children.start(ollama, "serve", env=env)
    client = children.start(ollama, "pull", "serveless", env=env)
    children.start(other, "serve", env=env)
    seen = processes.see(models.host(proc="/proc"), [])
    (found,) = [each for each in seen.servers if each.pid == server.pid]
    assert (found.store, found.ours, found.no_prune) == (str(models.path), True, True)
    assert found.state is ServerState.STARTING
    assert any(f"({client.pid})" in each for each in seen.others)
    assert not any("llama (" in each and "ollama" not in each for each in seen.others)


@pytest.mark.parametrize("kin", [True, False])
def test_of_a_parent_only_the_children_count(
    models: Store, data: Path, tmp_path: Path, children: Children, kin: bool
) -> None:
    """Nobody else's server, whose store may be unknown, nor what it has open."""
    entry = entry_of(data)
    script = 'exec 3<"$1"; exec "$0" serve'
    words = ("sh", "-c", script, program(tmp_path, "ollama"), str(data))
    server = children.start(*words, env={"PATH": os.environ["PATH"]})
    host = models.host(proc="/proc", parent=os.getpid() if kin else server.pid)
    expected = [server.pid] if kin else []
    seen = processes.see(host, [entry])
    assert [each.pid for each in seen.servers] == expected
    assert [each.pid for each in seen.holders.get(data.name, ())] == expected
    assert [each.pid for each in processes.holders_of(host, [entry])] == expected


def ours(models: Store, pid: int) -> bool | None:
    """Whether a server's store is this one."""
    seen = processes.see(models.host(proc="/proc"), [])
    (found,) = [each.ours for each in seen.servers if each.pid == pid]
    return found


@pytest.mark.parametrize("name", ["ollama-linux-amd64", "ollama.real"])
def test_a_server_may_have_a_longer_name(
    models: Store, tmp_path: Path, children: Children, name: str
) -> None:
    env = {"PATH": os.environ["PATH"], "OLLAMA_MODELS": str(models.path)}
    server = children.start(program(tmp_path, name), "serve", env=env)
    assert ours(models, server.pid) is True


@pytest.mark.parametrize(
    ("folder", "expected"), [(".", True), ("elsewhere", False), ("nowhere", False)]
)
def test_a_relative_folder_is_that_of_the_servers_working_directory(
    models: Store, tmp_path: Path, children: Children, folder: str, expected: bool | None
) -> None:
    (tmp_path / "elsewhere" / "models").mkdir(parents=True)
    (tmp_path / "nowhere").mkdir()
    env = {"PATH": os.environ["PATH"], "OLLAMA_MODELS": "models"}
    server = children.start(program(tmp_path, "ollama"), "serve", env=env, cwd=tmp_path / folder)
    assert ours(models, server.pid) is expected


@needs_root
@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("true", True),
        ('mount -t tmpfs none "$1" && mkdir "$1/blobs"', False),
        ('mount -t tmpfs none "$1" && mkdir "$1/blobs" && touch -d "@$2" "$1/blobs"', None),
        ('mount -t tmpfs none "$1"', None),
    ],
    ids=["the same", "another", "of the same time", "empty"],
)
def test_a_server_in_a_container_is_looked_at_with_its_own_eyes(
    models: Store, tmp_path: Path, children: Children, script: str, expected: bool | None
) -> None:
    at_ns = models.blobs.stat().st_mtime_ns
    at = f"{at_ns // 10**9}.{at_ns % 10**9:09}"
    words = ["sh", "-c", f'{script} && exec "$0" serve', program(tmp_path, "ollama")]
    env = {"PATH": os.environ["PATH"], "OLLAMA_MODELS": str(models.path)}
    server = children.start("unshare", "--mount", *words, str(models.path), at, env=env)
    assert ours(models, server.pid) is expected


def test_a_server_that_answers_has_started(
    models: Store, tmp_path: Path, children: Children
) -> None:
    environment = {"OLLAMA_MODELS": str(models.path)}
    server = children.start(program(tmp_path, "ollama"), "serve", env=environment)
    host = models.host(proc="/proc", version=lambda _: "0.33.0")
    seen = processes.see(host, [])
    (found,) = [each for each in seen.servers if each.pid == server.pid]
    assert (found.state, found.version, found.ours) == (ServerState.ANSWERING, "0.33.0", True)


@pytest.mark.parametrize("reaped", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_one_that_ends_while_it_is_looked_at_is_none(
    models: Store, tmp_path: Path, children: Children, reaped: bool, known: bool
) -> None:
    """Not one that starts: on a machine where other servers come and go all acts were refused."""
    environment = {"OLLAMA_MODELS": str(models.path)} if known else {}
    server = children.start(program(tmp_path, "ollama"), "serve", env=environment)

    def end() -> None:
        server.kill()
        if reaped:
            server.wait()
        else:
            os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)

    host = models.host(proc="/proc", version=once(end))
    seen = processes.see(host, ())
    assert server.pid not in {each.pid for each in seen.servers}


def test_one_that_is_ending_is_no_ollama_at_work(models: Store, tmp_path: Path) -> None:
    """Its memory has gone, and it is no zombie yet."""
    proc = tmp_path / "ending"
    (proc / "77" / "fd").mkdir(parents=True)
    (proc / "77" / "stat").write_text("77 (ollama) R 1 77 77 0 -1 4228100 0 0 0 0 0 0 0 0 20 0 1 0")
    for cmdline, others in ((b"", ()), (b"ollama\0run\0", ("ollama (77)",))):
        (proc / "77" / "cmdline").write_bytes(cmdline)
        seen = processes.see(models.host(proc=str(proc)), ())
        assert seen.others == others


def test_one_that_can_not_be_reached_for_long_counts_as_started(
    models: Store, tmp_path: Path, children: Children
) -> None:
    server = children.start(program(tmp_path, "ollama"), "serve")
    host = models.host(proc="/proc", clock=lambda: time.time() + 301)
    seen = processes.see(host, [])
    (found,) = [each for each in seen.servers if each.pid == server.pid]
    assert found.state is ServerState.UNREACHABLE


# ---------------------------------------------------------------- sight


def visibility(
    models: Store, *, network: bool = False, visible: bool = False, proc: str = ""
) -> Visibility:
    host = models.host(proc=proc) if proc else models.host()
    unread = processes.see(host, []).unread
    return processes.view(host, unread, network=network, writers_visible=visible).visibility


def test_sight_is_full_where_all_can_be_read(models: Store) -> None:
    assert visibility(models) is Visibility.FULL


def test_a_network_hides_writers_and_the_settings_can_say_otherwise(models: Store) -> None:
    assert visibility(models, network=True) is Visibility.PARTIAL
    assert visibility(models, network=True, visible=True) is Visibility.FULL


def test_a_container_hides_writers(models: Store, tmp_path: Path) -> None:
    host = models.host()
    pid = Path(host.proc) / "self" / "ns" / "pid"
    pid.unlink()
    pid.symlink_to("pid:[4026532999]")
    assert visibility(models, proc=host.proc) is Visibility.PARTIAL


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("rw", Visibility.FULL),
        ("rw,hidepid=0", Visibility.FULL),
        ("rw,hidepid=invisible", Visibility.FULL if IS_ROOT else Visibility.PARTIAL),
        ("rw,subset=pid", Visibility.PARTIAL),
    ],
)
def test_a_proc_that_hides(models: Store, options: str, expected: Visibility) -> None:
    host = models.host()
    mounts = Path(host.proc) / "self" / "mounts"
    mounts.write_text(f"none / ext4 rw 0 0\nproc {host.proc} proc {options} 0 0\n")
    assert visibility(models, proc=host.proc) is expected


def test_a_proc_without_information(models: Store, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "stat").write_text("cpu 0 0 0 0\nbtime 1\n")
    assert visibility(models, proc=str(tmp_path / "empty")) is Visibility.PARTIAL


LOOK = """
import json, sys
from watcher.observe import processes
from watcher.observe.host import Host
host = Host(sys.argv[1], proc=(sys.argv[2:] or ["/proc"])[0], version=lambda _: None)
unread = processes.see(host, []).unread
seen = processes.view(host, unread, network=False, writers_visible=False)
print(json.dumps([seen.visibility.value, seen.why, list(seen.unseen)]))
"""


def machine_of(folder: Path, *pids: int) -> str:
    """A ``/proc`` of a machine that is no container, on which these processes run."""
    proc = quiet_machine(folder)
    for pid in map(str, pids):
        if not (folder / pid).exists():
            (folder / pid).symlink_to(f"/proc/{pid}")
    return proc


@needs_root
def test_an_ordinary_user_sees_others_by_name_only(
    models: Store,
    as_nobody: Callable[[Sequence[str]], list[str]],
    tmp_path: Path,
    children: Children,
) -> None:
    def looked(*pids: int) -> tuple[str, str, list[str]]:
        proc = machine_of(tmp_path / "proc", *pids)
        words = ["-c", LOOK, str(models.path), proc]
        done = subprocess.run(as_nobody(words), capture_output=True, timeout=120, check=True)
        found, why, unseen = json.loads(done.stdout)
        return found, why, unseen

    others = [children.start(program(tmp_path, "other"), "run").pid for _ in range(6)]
    before, why, unseen = looked(*others)
    assert before == "named"
    assert len(unseen) == 5
    assert set(unseen) < {f"other ({pid})" for pid in others}
    child = children.start(program(tmp_path, "ollama"), "run", "x")
    after, why, _ = looked(child.pid)
    assert after == "partial"
    assert f"({child.pid})" in why


@needs_root
@pytest.mark.parametrize(("name", "expected"), [("other", "named"), ("ollama", "partial")])
def test_descriptors_that_can_be_listed_and_not_read_are_unseen(
    models: Store, tmp_path: Path, children: Children, name: str, expected: str
) -> None:
    """Root without CAP_SYS_PTRACE, as in many a container: it sees that there are descriptors."""
    child = children.start(program(tmp_path, name), "run")
    proc = machine_of(tmp_path / "proc", child.pid)
    less = ["setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace"]
    done = subprocess.run(
        [*less, sys.executable, "-c", LOOK, str(models.path), proc],
        capture_output=True,
        timeout=120,
        check=True,
    )
    found, _, unseen = json.loads(done.stdout)
    assert found == expected
    assert any(f"({child.pid})" in each for each in unseen)


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        ("/opt/x/bin/ollama-watch daemon", True),
        ("/usr/bin/python3 /opt/x/bin/ollama-watch daemon", True),
        ("/opt/x/bin/python -I /opt/x/bin/ollama-watch --store /m daemon", True),
        ("/opt/x/bin/python -I -m watcher daemon", True),
        ("python3.11 -Im watcher daemon", True),
        ("python3 -W error -X dev -mwatcher", True),
        ("/opt/x/bin/ollama-linux-amd64 serve", False),
        ("/usr/bin/ollama serve ollama-watch", False),
        ("python3 -m other ollama-watch", False),
        ("python3 -c pass ollama-watch -m watcher", False),
        ("python3 -W ollama-watch other.py", False),
        ("vi ollama-watch", False),
    ],
)
def test_our_own_process_is_known_in_every_form(words: str, ours: bool) -> None:
    assert processes.Process(1, "x", tuple(words.split())).is_ours is ours


@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize("deleted", [False, True])
def test_a_mapped_file_is_held_even_if_the_maps_show_another_device(
    models: Store, data: Path, children: Children, renamed: bool, deleted: bool
) -> None:
    """A subvolume of btrfs has a device of its own, and the maps have that of the whole."""
    mapped = data.with_name("another") if renamed else data
    entry = entry_of(data)._replace(device=os.makedev(0, 12345))
    data.rename(mapped)
    child = children.start(sys.executable, "-c", MAP, str(mapped))
    if deleted:
        mapped.unlink()
    found = [(each.pid, each.entry) for each in held(models, entry)]
    assert found == ([] if renamed else [(child.pid, data.name)])
    other = entry._replace(inode=entry.inode + 1)
    assert held(models, other) == (), "another inode is another file"
