"""Nobody stops us who may only read a store, or leads us who owns neither it nor root's rights."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import needs_root, open_parents
from tests.support.driving import Daemon, HealthyStore, command, environment, run
from tests.support.runs import rules
from tests.support.servers import wait_until
from watcher import cli
from watcher.observe.host import Host
from watcher.pull import queue, target
from watcher.state import fs, state_folder

OWNER, STRANGER, GROUP, MEMBER = 12345, 54321, 5000, 12346
#: Acting commands, and those that only read.
ACTING = (["clean", "--yes"], ["repair", "--offline", "--yes"], ["verify"], ["queue", "add", "a"])
READING = (["audit"], ["status"], ["log"], ["queue", "ls"], ["df"])
LOCKS = ("lock", "logs.lock", "queue/queue.json.lock", "daemon.lock")
HOLD = 'flock --exclusive --nonblock "$1" sh -c "echo held; exec sleep 600"'


@pytest.fixture
def store(tmp_path: Path) -> HealthyStore:
    """With each file of ours, of a user, who lets others read it."""
    made = HealthyStore(tmp_path / "models")
    made.download("stale")
    made.download("broken", aged=3600)
    made.partial(made.digest("broken"), 1).unlink()
    if os.geteuid() == 0:
        give(made.path, OWNER, GROUP)
    for words in (["queue", "add", "first"], ["verify"], ["clean", "-n"]):
        run(made.path, *words)
    with Daemon(made.path) as daemon:
        daemon.kill(signal.SIGTERM)
    open_parents(tmp_path)
    return made


def give(path: Path, uid: int, gid: int) -> None:
    for each in (path, *path.rglob("*")):
        os.chown(each, uid, gid, follow_symlinks=False)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@contextlib.contextmanager
def held_by(uid: int, path: Path) -> Iterator[bool]:
    """Somebody holds a lock on a file, if they can."""
    become = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    with subprocess.Popen(
        [*(become if uid != os.geteuid() else ()), "sh", "-c", HOLD, "sh", str(path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline() == "held\n"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def of_ours(store: HealthyStore) -> list[Path]:
    return [path for path in store.ours.rglob("*") if path.is_file()]


# ---------------------------------------------------------------- a server of a stranger's

SERVES = 'exec -a ollama sh -c "echo serves; sleep 600; :" serve'


@contextlib.contextmanager
def served_by(uid: int, store: HealthyStore) -> Iterator[None]:
    """Somebody's process that says it is a server of this store, and answers nobody."""
    words = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "bash", "-c", SERVES]
    with subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
        env={**os.environ, "OLLAMA_MODELS": str(store.path), "OLLAMA_HOST": "127.0.0.1:1"},
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "serves\n"
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)


@needs_root
@pytest.mark.parametrize(("uid", "stops"), [(STRANGER, False), (OWNER, True)])
def test_only_who_may_change_the_store_keeps_others_from_it_by_a_server(
    store: HealthyStore, uid: int, stops: bool
) -> None:
    with served_by(uid, store):
        for words in ACTING[:2]:
            done = run(store.path, *words)
            assert ("a server is starting" in done.stdout + done.stderr) == stops, words
        told = run(store.path, "audit").stdout
        assert ("ollama serve, pid" in told) == stops
        assert str(STRANGER) not in told
    assert bool(store.partials(store.digest("stale"))) == stops


@needs_root
def test_a_server_that_can_change_nothing_in_a_store_of_roots_is_reported(
    store: HealthyStore,
) -> None:
    """Everything may have become root's by mistake."""
    give(store.path, 0, 0)
    with served_by(STRANGER, store):
        told = run(store.path, "audit").stdout
    assert "the running server" in told


# ---------------------------------------------------------------- who may only read


@needs_root
def test_a_stranger_who_holds_all_that_can_be_opened_stops_nobody(store: HealthyStore) -> None:
    with contextlib.ExitStack() as held:
        found = {path.name: held.enter_context(held_by(STRANGER, path)) for path in of_ours(store)}
        assert found["events.jsonl"]  # what may be read can be locked
        assert not any(holds for name, holds in found.items() if name.endswith("lock"))
        for words in (*READING, *ACTING):
            done = run(store.path, *words)
            assert done.returncode in (0, 1, 3), (words, done.stderr)
            assert "held" not in done.stderr
        with Daemon(store.path) as daemon:
            assert daemon.kill(signal.SIGTERM) == 0
            assert daemon.of("error") == []
    assert not store.partials(store.digest("stale"))


@needs_root
@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_that_others_could_open_is_theirs_no_more_once_it_is_taken(
    store: HealthyStore, name: str
) -> None:
    """As after a ``chmod -R a+r``."""
    path = store.ours / name
    path.chmod(0o644)
    for words in ACTING:
        done = run(store.path, *words)
        assert done.returncode in (0, 1, 3), (words, done.stderr)
    with Daemon(store.path) as daemon:
        assert daemon.kill(signal.SIGTERM) == 0
    assert mode(path) == 0o600
    with held_by(STRANGER, path) as held:
        assert not held


@needs_root
def test_a_user_who_may_read_the_store_reads_state_and_logs(
    store: HealthyStore, as_user: Callable[..., list[str]]
) -> None:
    with Daemon(store.path) as daemon:
        for words in (["--json", "status"], ["log"], ["--json", "queue", "ls"]):
            line = as_user(
                ["-m", "watcher", "--store", str(store.path), *words], STRANGER, STRANGER
            )
            done = subprocess.run(line, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, (words, done.stderr)
            if "status" in words:
                assert json.loads(done.stdout)["daemon"]["pid"] == daemon.pid
            elif "log" in words:
                assert "watches" in done.stdout
            else:
                assert [each["model"] for each in json.loads(done.stdout)["items"]] == [
                    "first:latest",
                    *(["a:latest"] if "a:latest" in done.stdout else []),
                ]


# ---------------------------------------------------------------- no file, and no end of a wait


NAMES = (
    "lock",
    "logs.lock",
    "queue/queue.json.lock",
    "logs/events.jsonl",
    "state.json",
    "queue.json",
)


def put(path: Path, kind: str, outside: Path) -> None:
    """Put something in a file's place."""
    path.unlink(missing_ok=True)
    match kind:
        case "fifo":
            os.mkfifo(path)
            fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(fd, b"x" * 4096)
        case "link":
            path.symlink_to(outside)
        case "folder":
            path.mkdir()
            (path / "something").touch()
        case _:
            words = [sys.executable, "-c", BIND, path.name]
            subprocess.run(words, cwd=path.parent, check=True, timeout=120)


@pytest.mark.parametrize("kind", ["fifo", "link", "folder", "socket"])
def test_a_special_file_in_our_folder_ends_or_blocks_nothing(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    outside = tmp_path / "outside"
    outside.write_text("precious")
    for number, name in enumerate(NAMES):
        store = HealthyStore(tmp_path / f"models{number}")
        store.download("stale")
        assert cli.main(["--store", str(store.path), "queue", "add", "first"]) == 0
        assert cli.main(["--store", str(store.path), "verify"]) in (0, 1)
        put(store.ours / name, kind, outside)
        for words in (*READING, *ACTING):
            signal.alarm(120)  # whatever blocks is ended
            code = cli.main(["--store", str(store.path), *words])
            signal.alarm(0)
            told = capsys.readouterr().err
            assert code in (0, 1, 3, 4), (name, words, told)
            assert "Traceback" not in told
            assert "fault" not in told
    assert outside.read_text() == "precious"


BIND = "import socket, sys; socket.socket(socket.AF_UNIX).bind(sys.argv[1])"


@pytest.mark.parametrize("name", LOCKS[:2])
def test_sigterm_ends_a_daemon_that_waits_for_a_lock(store: HealthyStore, name: str) -> None:
    """Somebody of ours holds it, and was stopped, say."""
    with Daemon(store.path) as daemon, held_by(os.geteuid(), store.ours / name) as held:
        assert held
        store.download("new", aged=10.0)
        (store.path / "manifests/x").touch()
        wait_until(lambda: waits(daemon.pid), "the daemon to wait for the lock")
        began = time.monotonic()
        assert daemon.kill(signal.SIGTERM) == 0
        assert time.monotonic() - began < 10


def waits(pid: int) -> bool:
    """Whether a process tries a lock again and again: it has it open, and does not hold it."""
    with contextlib.suppress(OSError):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                name = os.readlink(fd)
                info = Path(f"/proc/{pid}/fdinfo/{fd.name}").read_text()
                if name.endswith("lock") and "lock:" not in info:
                    return True
    return False


@pytest.mark.parametrize("name", LOCKS[:2])
def test_sigterm_ends_a_command_that_waits_for_a_lock(store: HealthyStore, name: str) -> None:
    with held_by(os.geteuid(), store.ours / name) as held:
        assert held
        process = subprocess.Popen(
            command(store.path, "clean", "--yes"),
            env=environment(store.path),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(lambda: waits(process.pid), "the command to wait for the lock")
        process.terminate()
        process.wait(timeout=120)


# ---------------------------------------------------------------- whose it is


@needs_root
def test_a_folder_of_a_stranger_is_not_believed_and_nothing_is_done(
    store: HealthyStore,
) -> None:
    give(store.ours, STRANGER, STRANGER)
    before = store.tree(), sorted((p, p.lstat().st_mtime_ns) for p in store.ours.rglob("*"))
    done = run(store.path, "--json", "audit")
    (finding,) = [
        each for each in json.loads(done.stdout)["findings"] if each["kind"] == "state_owner"
    ]
    assert finding["severity"] == "error"
    assert str(STRANGER) in finding["message"]
    for words in (*ACTING, ["clean", "-n"], ["log"], ["quarantine", "purge", "--yes"]):
        done = run(store.path, *words)
        assert done.returncode == 3, (words, done.stderr)
        assert finding["command"].removeprefix("sudo ") in done.stderr
    assert run(store.path, "prepare").returncode == 0
    assert run(store.path, "status").returncode == 4
    daemon = Daemon(store.path).start()
    try:
        assert daemon.wait_exit() == 3
    finally:
        daemon.close()
    assert finding["command"].removeprefix("sudo ") in daemon.errors
    after = store.tree(), sorted((p, p.lstat().st_mtime_ns) for p in store.ours.rglob("*"))
    assert after == before
    subprocess.run(shlex.split(finding["command"]), check=True)
    done = run(store.path, "--json", "audit")
    kinds = {each["kind"] for each in json.loads(done.stdout)["findings"]}
    assert "state_owner" not in kinds
    assert run(store.path, "clean", "--yes").returncode == 0


@needs_root
def test_an_intent_in_somebody_elses_folder_is_not_carried_out(store: HealthyStore) -> None:
    """Planted by who owns the store's folder, and not its blobs."""
    intent = store.ours / "intents/1"
    for name in ("new", "out"):
        (intent / name).mkdir(parents=True)
    (intent / "new/evil").write_text("evil")
    (intent / "decided").touch()
    give(store.path, STRANGER, STRANGER)
    give(store.blobs, OWNER, GROUP)
    for words in (*ACTING, ["prepare"]):
        run(store.path, *words)
        assert not (store.blobs / "evil").exists()


@needs_root
def test_roots_own_folder_in_a_users_store_is_believed_and_its_remedy_is_reported(
    store: HealthyStore,
) -> None:
    """As an earlier version, run as root on a store that was root's then, has left it."""
    give(store.ours, 0, 0)
    done = run(store.path, "--json", "audit")
    (finding,) = [
        each for each in json.loads(done.stdout)["findings"] if each["kind"] == "state_owner"
    ]
    done = run(store.path, "clean", "--yes")
    assert done.returncode == 4
    assert finding["command"].removeprefix("sudo ") in done.stderr
    subprocess.run(shlex.split(finding["command"]), check=True)
    assert run(store.path, "clean", "--yes").returncode == 0


@needs_root
def test_a_user_who_owns_no_blobs_leaves_no_folder_behind(
    store: HealthyStore, as_user: Callable[..., list[str]]
) -> None:
    """They may write to the store's folder alone."""
    subprocess.run(["rm", "-r", str(store.ours)], check=True)
    os.chown(store.path, STRANGER, STRANGER)
    line = as_user(["-m", "watcher", "--store", str(store.path), "verify"], STRANGER, STRANGER)
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 4, done.stderr
    assert not store.ours.exists()


@needs_root
def test_a_pull_explains_why_it_repairs_nothing_in_such_a_store(tmp_path: Path) -> None:
    store = HealthyStore(tmp_path / "models")
    run(store.path, "verify")
    give(store.ours, STRANGER, STRANGER)
    found = target.find("http://127.0.0.1:1", Host(str(store.path)), rules().settings)
    assert found.host is None
    assert f"user id {STRANGER}" in found.why


# ---------------------------------------------------------------- a group's store


@pytest.fixture
def shared(store: HealthyStore) -> HealthyStore:
    """A group may write it; its owner is no member, since root has set it up."""
    for path in store.blobs.glob("*-partial*"):
        path.unlink()
    subprocess.run(["rm", "-r", str(store.ours)], check=True)
    for path in (store.path, *(p for p in store.path.rglob("*") if p.is_dir())):
        path.chmod(0o2775)
    return store


#: Runs commands, each in a process of its own, of one Python that is started.
EACH = """
import json, os, sys
import watcher.reconcile, watcher.show.tables
from watcher import cli

for words in json.loads(sys.argv[1]):
    pid = os.fork()
    if pid == 0:
        sys.argv[1:] = words
        sys.exit(cli.main())
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) not in (0, 1, 3):
        sys.exit(f"it was {words}")
"""


@needs_root
@pytest.mark.parametrize(
    "umask",
    [
        pytest.param("000", marks=pytest.mark.slow("the same with a mask that takes more away")),
        pytest.param("022", marks=pytest.mark.slow("the same with a mask that takes more away")),
        "077",
    ],
)
@pytest.mark.parametrize(
    ("first", "owner"),
    [("owner", (OWNER, OWNER)), ("owner", (OWNER, GROUP)), ("member", (OWNER, GROUP))],
    ids=["owner, not in the group", "owner", "member"],
)
def test_neither_the_owner_nor_a_member_locks_the_other_out(
    shared: HealthyStore,
    as_user: Callable[..., list[str]],
    umask: str,
    first: str,
    owner: tuple[int, int],
) -> None:
    users = {"owner": owner, "member": (MEMBER, MEMBER, (GROUP,))}
    order = [first, *(users.keys() - {first}), first]
    for user in order:
        each = (["verify"], ["clean", "--yes"], ["queue", "add", user], ["log"])
        given = json.dumps([["--store", str(shared.path), *words] for words in each])
        line = as_user(["-c", EACH, given], *users[user])
        done = subprocess.run(
            ["sh", "-c", f'umask {umask}; exec "$@"', "sh", *line],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, (user, done.stderr)
        assert "denied" not in done.stderr
        assert "permitted" not in done.stderr
    for path in (shared.ours, *shared.ours.rglob("*")):
        assert path.stat().st_gid == GROUP, path
        if path.is_dir():
            assert mode(path) == 0o2775, path
        elif path.name.endswith("lock"):
            assert mode(path) == 0o660, path
        else:
            assert mode(path) == 0o664, path
    with held_by(STRANGER, shared.ours / "lock") as held:
        assert not held


@needs_root
def test_what_a_member_has_kept_for_himself_is_put_right_by_the_member_or_reported(
    shared: HealthyStore, as_user: Callable[..., list[str]]
) -> None:
    def verify(uid: int, gid: int, *groups: int) -> subprocess.CompletedProcess[str]:
        line = as_user(["-m", "watcher", "--store", str(shared.path), "verify"], uid, gid, groups)
        return subprocess.run(line, capture_output=True, text=True, timeout=120)

    logs = shared.ours / "logs"
    logs.mkdir(parents=True)
    for path in (shared.ours / "lock", logs / "events.jsonl", shared.ours / "state.json"):
        path.touch()
        path.chmod(0o644)
    give(shared.ours, MEMBER, GROUP)
    for path in (logs, shared.ours):
        path.chmod(0o755)
    done = verify(OWNER, GROUP)
    assert done.returncode == 4, done.stdout
    assert "audit reports the command" in " ".join(done.stdout.split())
    document = json.loads(run(shared.path, "--json", "audit").stdout)
    assert "state_owner" in {each["kind"] for each in document["findings"]}
    verify(MEMBER, MEMBER, GROUP)
    assert (mode(shared.ours), mode(logs)) == (0o2775, 0o2775)
    before = which(shared.ours / "state.json")
    assert verify(OWNER, GROUP).returncode in (0, 1)
    assert which(shared.ours / "state.json") != before
    assert mode(shared.ours / "lock") == 0o660


@needs_root
def test_a_member_makes_no_folder_that_the_owner_of_the_blobs_could_not_write_to(
    shared: HealthyStore, as_user: Callable[..., list[str]]
) -> None:
    """The system says that the owner is not in the store's group."""
    daemon = pwd.getpwnam("daemon").pw_uid
    give(shared.path, daemon, GROUP)
    line = as_user(
        ["-m", "watcher", "--store", str(shared.path), "verify"], MEMBER, MEMBER, (GROUP,)
    )
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert "not in the store's group" in " ".join(done.stdout.split())
    assert not shared.ours.exists()


# ---------------------------------------------------------------- a root that is none there


@needs_root
def test_a_root_that_may_not_give_files_away_leaves_nothing(tmp_path: Path) -> None:
    """As over NFS with root squash: what is made belongs to somebody else, and stays so."""
    folder = tmp_path / "folder"
    folder.mkdir()
    os.chown(folder, OWNER, OWNER)
    folder.chmod(0o777)
    open_parents(tmp_path)
    script = (
        "import os, sys\n"
        "from watcher.state import fs as files\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "for make in (lambda: files.ensure_folder('sub', fd), lambda: files.save('a', fd, b'x'),\n"
        "             lambda: files.append('log', fd, b'x\\n'),\n"
        "             lambda: files.locked('lock', fd).__enter__()):\n"
        "    try:\n"
        "        make()\n"
        "    except OSError:\n"
        "        continue\n"
        "    sys.exit('made')\n"
    )
    words = ["unshare", "--user", "--map-root-user", sys.executable, "-c", script, str(folder)]
    done = subprocess.run(words, env=environment(folder), capture_output=True, text=True)
    if "unshare failed" in done.stderr:
        pytest.skip("no user namespaces here")
    assert (done.returncode, done.stderr) == (0, "")
    assert list(folder.iterdir()) == []


# ---------------------------------------------------------------- our folder goes


def test_where_our_folder_is_removed_the_daemons_lock_is_taken_anew(store: HealthyStore) -> None:
    with Daemon(store.path) as daemon:
        subprocess.run(["rm", "-r", str(store.ours)], check=True)
        wait_until((store.ours / "daemon.lock").exists, "the daemon to take its lock anew")
        done = run(store.path, "--json", "status")
        assert json.loads(done.stdout)["daemon"]["pid"] == daemon.pid
        second = Daemon(store.path, beside=store.path.with_name("second")).start()
        try:
            assert second.wait_exit() == 11
        finally:
            second.close()
        assert daemon.alive


def test_a_lock_is_the_file_that_has_its_name(folder: int) -> None:
    lock = state_folder.LongLock("daemon.lock")
    assert lock.hold(folder)
    assert not lock.hold(folder)
    with state_folder.opened(folder) as our_folder:
        fs.remove("daemon.lock", our_folder)
        with fs.locked("daemon.lock", our_folder), pytest.raises(fs.BusyError):
            lock.hold(folder)
        assert lock.hold(folder)
        with pytest.raises(fs.BusyError), fs.locked("daemon.lock", our_folder):
            pass
    lock.release()


# ---------------------------------------------------------------- another PID namespace

DRIVE = """
import os, sys
from watcher.pull import queue, running
folder = os.open(sys.argv[1], os.O_RDONLY)
def drive(model, why):
    print(model, os.getpid(), flush=True)
    sys.stdin.read()
    return queue.Driven(queue.Result.DONE)
if running.run_next(folder, drive) is None:
    print("nothing", flush=True)
"""


@needs_root
def test_an_item_is_driven_once_whatever_the_pid_namespace(folder: int, tmp_path: Path) -> None:
    path = os.readlink(f"/proc/self/fd/{folder}")
    queue.FILE.change(folder, lambda line: queue.add(line, "a", 0, 0.0, 1.0))

    def driver(*alone: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*alone, sys.executable, "-c", DRIVE, path],
            env=environment(tmp_path / "x"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    alone = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    with driver(*alone) as first:
        assert first.stdout is not None
        assert first.stdout.readline().startswith("a:latest")
        for words in ((), alone):
            with driver(*words) as second:
                assert second.communicate(timeout=120)[0] == "nothing\n"
        (item,) = queue.FILE.read(folder).line
        assert item.state is queue.ItemState.RUNNING
        first.kill()
        first.wait()
    with driver() as third:
        assert third.stdout is not None
        assert third.stdout.readline().startswith("a:latest")
        third.communicate(timeout=120)
    assert queue.FILE.read(folder).line == ()


def which(path: Path) -> tuple[int, int]:
    """Which file it is: the inode of one that is gone may be given again."""
    status = path.stat()
    return status.st_ino, status.st_ctime_ns
