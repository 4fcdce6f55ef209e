"""Root in somebody else's store: what its owner plants leads root nowhere that they can't go."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Run, environment, needs_root, open_parents
from tests.support.driving import Daemon, HealthyStore, Tree, content, is_right
from tests.support.driving import run as driven
from tests.support.servers import Server, wait_until
from tests.support.transfers import lay_out
from watcher import ModelDownloadManager, StoreFiles
from watcher.demo.registry import Layer, Registry
from watcher.errors import NoPermissionError
from watcher.model import DAY
from watcher.observe import processes
from watcher.service.units import Installation
from watcher.system import privileges

pytestmark = needs_root

OWNER, OTHER = 12345, 54321
SECRET = "sha256:the-secret-of-root"
#: Every command that looks into a store or changes it, but those that need a server.
COMMANDS = (
    ("audit",),
    ("-v", "--json", "audit"),
    ("df",),
    ("status",),
    ("log",),
    ("quarantine", "ls"),
    ("queue", "ls"),
    ("verify",),
    ("repair", "--yes", "--offline"),
    ("repair", "--yes", "--give-back"),
    ("clean", "--yes", "--stale-after", "1s"),
    ("prepare",),
    ("quarantine", "purge", "--yes"),
    ("queue", "add", "m"),
)


VISIBLE = {"OLLAMA_WATCH_WRITERS_VISIBLE": "true"}


def give(path: Path, uid: int) -> None:
    """Everything below a folder, itself included, is a user's."""
    for each in (path, *path.rglob("*")):
        os.chown(each, uid, uid, follow_symlinks=False)


def owners(path: Path) -> set[tuple[int, int]]:
    return {(each.lstat().st_uid, each.lstat().st_gid) for each in (path, *path.rglob("*"))}


@pytest.fixture
def store(tmp_path: Path) -> HealthyStore:
    """A store of an ordinary user's, with something for each command to do."""
    made = HealthyStore(tmp_path / "home" / "models")
    made.download("stale")
    made.text_blob("orphan")
    give(tmp_path / "home", OWNER)
    return made


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A folder of root's, which must stay as it is; and nothing in it may be told."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "passwd").write_text("root")
    (folder / "secret").write_text(json.dumps({"config": {"digest": SECRET}, "layers": []}))
    os.chmod(folder / "secret", 0o600)
    target = HealthyStore(folder / "store")
    target.text_blob("no manifest names it")
    before = content(folder)
    yield folder
    assert content(folder) == before
    assert owners(folder) == {(0, 0)}


def _intent(store: HealthyStore, victim: Path) -> Path:
    shutil.rmtree(store.blobs)
    store.blobs.symlink_to(victim)
    for name in ("new", "out"):
        (store.ours / "intents/1" / name).mkdir(parents=True)
    return store.ours / "intents/1"


def _decided(store: HealthyStore, victim: Path) -> None:
    intent = _intent(store, victim)
    (intent / "new/passwd").write_text("mine")
    (intent / "decided").touch()


def _undecided(store: HealthyStore, victim: Path) -> None:
    (_intent(store, victim) / "out/evil").write_text("mine")


def _blobs(store: HealthyStore, victim: Path) -> None:
    shutil.rmtree(store.blobs)
    store.blobs.symlink_to(victim / "store/blobs")


def _further(store: HealthyStore, victim: Path) -> None:
    shutil.rmtree(store.blobs)
    store.blobs.symlink_to("further")
    (store.path / "further").symlink_to(victim / "store/blobs")


def _manifest(store: HealthyStore, victim: Path) -> None:
    planted = store.path / "manifests/registry.ollama.ai/library/planted"
    planted.mkdir()
    (planted / "latest").symlink_to(victim / "secret")


def _manifests(store: HealthyStore, victim: Path) -> None:
    (store.path / "manifests/registry.ollama.ai/library/planted").symlink_to(victim)


def _ours(store: HealthyStore, victim: Path) -> None:
    store.ours.symlink_to(victim)


def _logs(store: HealthyStore, victim: Path) -> None:
    store.ours.mkdir()
    (store.ours / "logs").symlink_to(victim)


def _files_of_ours(store: HealthyStore, victim: Path) -> None:
    store.ours.mkdir()
    for name in ("state.json", "lock", "queue.json", "models.json", "reserve"):
        (store.ours / name).symlink_to(victim / "passwd")


def _transfers(store: HealthyStore, victim: Path) -> None:
    store.ours.mkdir()
    (store.ours / "transfers").symlink_to(victim)


def _one_transfer(store: HealthyStore, victim: Path) -> None:
    (store.ours / "transfers").mkdir(parents=True)
    (store.ours / "transfers" / store.digest("ours")).symlink_to(victim)


def _files_of_a_transfer(store: HealthyStore, victim: Path) -> None:
    here = lay_out(store.path, store.digest("ours"), b"layer", ((0, 5),), aged=8 * DAY)
    for name in ("data", "ledger", "arrived", "lock"):
        (here / name).unlink()
        (here / name).symlink_to(victim / "passwd")


def _locks_of_a_transfer(store: HealthyStore, victim: Path) -> None:
    """All of it is as ours, but for what is opened to be written."""
    here = lay_out(store.path, store.digest("ours"), b"layer", ((0, 5),), aged=8 * DAY)
    (here / "lock").unlink()
    (here / "lock").symlink_to(victim / "passwd")


def _files(store: HealthyStore, victim: Path) -> None:
    for path in list(store.blobs.iterdir()):
        path.unlink()
        path.symlink_to(victim / "passwd")


#: What the owner of a store may think of.
PLANTED: dict[str, Callable[[HealthyStore, Path], None]] = {
    "an intent that is decided": _decided,
    "an intent that is not": _undecided,
    "a link to another store's blobs": _blobs,
    "the same over another link": _further,
    "a link to a file that only root reads": _manifest,
    "a link to a folder with such files": _manifests,
    "our folder": _ours,
    "our logs": _logs,
    "our files": _files_of_ours,
    "our transfers": _transfers,
    "one of our transfers": _one_transfer,
    "files of a transfer": _files_of_a_transfer,
    "the lock of a transfer": _locks_of_a_transfer,
    "links in place of blobs and partials": _files,
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_file_leads_nowhere(
    store: HealthyStore, victim: Path, run: Run, what: str, slow: bool
) -> None:
    """By any command; in the usual run each thing meets every second one, in turns."""
    PLANTED[what](store, victim)
    give(store.path, OWNER)
    said = b""
    for words in COMMANDS if slow else COMMANDS[list(PLANTED).index(what) % 2 :: 2]:
        done = run("--store", store.path, *words, env=VISIBLE)
        assert b"Traceback" not in done.stderr
        said += done.stdout + done.stderr
    assert SECRET.encode() not in said


#: Runs command lines, each in a process of its own where nothing can be loaded any more once it has
#: become another user. What is loaded for that takes longest: the first process has it already.
NOTHING_MORE = """
import ast, json, os, sys
from pathlib import Path
import watcher
from watcher import cli
from watcher.system import privileges

class Gone:
    def find_spec(self, name, path=None, target=None):
        raise RuntimeError(f"{name} is loaded too late")

def become(owner, what, as_it_is=privileges.become):
    as_it_is(owner, what)
    sys.meta_path.insert(0, Gone())

privileges._can_load = lambda owner: False
privileges.become = become
privileges._load_all(privileges.Owner(0, 0))
privileges._loaded.clear()
for path in Path(watcher.__file__).parent.rglob("*.py"):
    if "demo" not in path.parts:
        for made in ast.walk(ast.parse(path.read_bytes())):
            for each in ast.walk(made) if isinstance(made, ast.FunctionDef) else ():
                names = [name.name for name in each.names] if isinstance(each, ast.Import) else []
                names += [each.module] if isinstance(each, ast.ImportFrom) else []
                for name in {*names} - {*sys.modules} - {"tomllib"}:  # read before
                    sys.exit(f"{name} is loaded too late by {path}")
for words in json.load(sys.stdin):
    print("#", *words, file=sys.stderr, flush=True)
    pid = os.fork()
    if pid == 0:
        sys.argv[1:] = words
        sys.exit(cli.main())
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) not in (0, 1, 3):
        sys.exit("has failed")
"""


def test_what_root_can_load_alone_is_loaded_before(tmp_path: Path) -> None:
    stores = []
    for number, _ in enumerate(COMMANDS):
        stores.append(HealthyStore(tmp_path / f"home{number}" / "models"))
        stores[-1].download("stale")
        stores[-1].text_blob("orphan")
        give(stores[-1].path.parent, OWNER)
    lines = [["--store", str(s.path), *words] for s, words in zip(stores, COMMANDS, strict=True)]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", NOTHING_MORE],
        input=json.dumps(lines).encode(),
        env=environment(tmp_path),
        capture_output=True,
        timeout=120,
    )
    assert b"too late" not in done.stdout + done.stderr, done.stderr
    assert done.returncode == 0, done.stderr
    assert b"unknown encoding" not in done.stderr


def test_a_store_behind_somebodys_link_is_reported_and_not_changed(
    tmp_path: Path, victim: Path, run: Run
) -> None:
    link = tmp_path / "link"
    link.symlink_to(victim / "store")
    os.chown(link, OWNER, OWNER, follow_symlinks=False)
    told = run("--store", link, "--json", "audit")
    assert told.returncode == 1
    assert "store_foreign" in {each["kind"] for each in json.loads(told.stdout)["findings"]}
    for words in (("clean", "--yes"), ("repair", "--yes"), ("queue", "add", "m"), ("verify",)):
        refused = run("--store", link, *words)
        assert refused.returncode == 3, refused
        assert b"user id 12345" in refused.stderr
    # Once root owns the link, it leads there.
    os.chown(link, 0, 0, follow_symlinks=False)
    assert b"would" not in run("--store", link, "-q", "audit").stderr


IN_OPEN = 0x20


@pytest.mark.parametrize("kind", ["a device", "a FIFO"])
def test_what_is_no_file_is_not_opened(
    store: HealthyStore, tmp_path: Path, run: Run, kind: str
) -> None:
    special = tmp_path / "special"
    os.mknod(
        special, (stat.S_IFCHR if kind == "a device" else stat.S_IFIFO) | 0o666, os.makedev(1, 3)
    )
    open_parents(tmp_path)
    planted = store.path / "manifests/registry.ollama.ai/library/m/dev"
    planted.parent.mkdir()
    planted.symlink_to(special)
    give(store.path, OWNER)
    libc = ctypes.CDLL(None)
    watch = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        assert libc.inotify_add_watch(watch, os.fsencode(special), IN_OPEN) > 0
        for words in COMMANDS:
            run("--store", store.path, *words)
        with pytest.raises(BlockingIOError):
            os.read(watch, 1 << 12)
    finally:
        os.close(watch)


def test_a_whole_run_leaves_only_the_owners_files(store: HealthyStore, run: Run) -> None:
    for words in COMMANDS:
        done = run("--store", store.path, *words, env=VISIBLE)
        assert done.returncode in (0, 1, 3), (words, done)
    with Daemon(store.path) as daemon:
        daemon.wait_event("check_started")
    assert not store.partials(store.digest("stale"))
    assert owners(store.path) == {(OWNER, OWNER)}


def status_of(pid: int | str) -> dict[str, list[str]]:
    """What `/proc` tells of a process or of a thread: nothing once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {key: value.split() for key, _, value in (line.partition(":") for line in lines)}


@pytest.mark.parametrize("uid", [OWNER, 0])
def test_the_daemon_has_its_owners_rights_in_every_thread(store: HealthyStore, uid: int) -> None:
    give(store.path, uid)
    with Daemon(store.path) as daemon:
        daemon.wait_event("check_started")
        threads = [status_of(f"{daemon.pid}/task/{each.name}") for each in tasks(daemon.pid)]
        assert any(threads)
        for found in filter(None, threads):  # one may have ended
            assert found["Uid"] == [str(uid)] * 4
            assert found["Gid"] == [str(uid)] * 4
            assert int(found["CapPrm"][0], 16) == privileges.VISIBILITY
            assert not any(int(found[key][0], 16) for key in ("CapInh", "CapAmb"))
            assert int(found["CapBnd"][0], 16) == (0 if uid else privileges.VISIBILITY)


CAPABILITIES = ("CapInh", "CapAmb", "CapPrm", "CapEff", "CapBnd")
BECOME = """
import os, subprocess, sys
from watcher.system import privileges
uid = int(sys.argv[1])
privileges.become(privileges.Owner(uid, uid), "it")
with privileges.visibility():
    subprocess.run(["cat", "/proc/self/status"], check=True)
assert privileges.capabilities() == (0, privileges.VISIBILITY, 0)
"""


@pytest.mark.parametrize("uid", [OWNER, 0])
def test_what_is_started_has_no_capability_but_roots_has_those_that_show_roots_server(
    uid: int, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BECOME, str(uid)],
        capture_output=True,
        text=True,
        check=True,
        env=environment(tmp_path),
    )
    found = {
        key: value.split()
        for key, _, value in (line.partition(":") for line in done.stdout.splitlines())
    }
    assert found["Uid"] == [str(uid)] * 4
    assert not any(int(found[key][0], 16) for key in CAPABILITIES[:2])
    for key in CAPABILITIES[2:]:
        assert int(found[key][0], 16) == (0 if uid else privileges.VISIBILITY), key


#: A sync that takes its time looks at itself first: the child's life is over right after it.
SYNC = """
import os, sys, time
from watcher.state import fs
from watcher.system import privileges
uid = int(sys.argv[1])
privileges.become(privileges.Owner(uid, uid), "it")
told = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND)
fs._fdatasync = lambda fd: os.write(fd, open("/proc/self/status", "rb").read())
ended = fs.data_synced([told])
while ended() is None:
    time.sleep(0.01)
assert privileges.capabilities().permitted == privileges.VISIBILITY
"""


@pytest.mark.parametrize("uid", [OWNER, 0])
def test_a_process_that_waits_for_the_disk_has_no_capability(uid: int, tmp_path: Path) -> None:
    told = tmp_path / "status"
    told.touch()
    open_parents(tmp_path)
    os.chmod(told, 0o666)
    words = [sys.executable, "-c", SYNC, str(uid), str(told)]
    subprocess.run(words, check=True, env=environment(tmp_path))
    found = re.findall(r"Cap(?:Inh|Prm|Eff|Amb):\s*([0-9a-f]+)", told.read_text())
    assert [int(each, 16) for each in found] == [0] * 4


def test_what_root_starts_for_a_store_shows_its_owner_nothing_of_roots(tmp_path: Path) -> None:
    """Its user can read the environment of a process."""
    script = (
        "import os, sys; from watcher.system import privileges as p\n"
        "p.become(p.Owner(int(sys.argv[1]), 12345), 'it'); print(*sorted(p.handed_on()))\n"
    )
    given = {
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "OLLAMA_API_KEY": SECRET,
        "https_proxy": "http://root:secret@proxy",
        "no_proxy": "proxy",
        "OLLAMA_HOST": "127.0.0.1:1",
        "OLLAMA_WATCH_QUEUE": "true",
    }

    def handed_on(uid: int) -> set[str]:
        words = [sys.executable, "-c", script, str(uid)]
        env = environment(tmp_path) | given
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=env)
        return given.keys() & set(done.stdout.split())

    assert handed_on(OWNER) == {"no_proxy", "OLLAMA_HOST", "OLLAMA_WATCH_QUEUE"}
    assert handed_on(0) == given.keys()


def test_what_runs_roots_queue_raises_its_capabilities_only_to_look(store: HealthyStore) -> None:
    give(store.path, 0)
    # Nobody listens there, and the pull waits for somebody who does.
    assert driven(store.path, "queue", "add", "localhost:1/library/m:1b").returncode == 0
    settings = {"OLLAMA_WATCH_QUEUE": "true", "OLLAMA_HOST": "127.0.0.1:1"}
    with Daemon(store.path, settings) as daemon:

        def rights() -> list[list[int]]:
            """Of each thread of what the daemon has started."""
            threads = [each for pid in below(daemon.pid) for each in tasks(pid)]
            told = [status_of(f"{each.parts[2]}/task/{each.name}") for each in threads]
            return [[int(each[key][0], 16) for key in CAPABILITIES] for each in told if each]

        looking = [0, 0, privileges.VISIBILITY, 0, privileges.VISIBILITY]

        def all_look() -> bool:
            found = rights()
            return len(found) > 1 and all(each == looking for each in found)

        wait_until(all_look, "threads, all with the rights that are kept")


def test_visibility_is_raised_in_the_thread_that_looks_and_for_no_longer(tmp_path: Path) -> None:
    script = (
        "import threading; from watcher.system import privileges as p\n"
        "p.become(p.Owner(12345, 12345), 'it')\n"
        "seen = []\n"
        "with p.visibility():\n"
        "    assert p.capabilities().effective == p.VISIBILITY\n"
        "    with p.visibility():\n"
        "        pass\n"
        "    assert p.capabilities().effective == p.VISIBILITY\n"
        "assert p.capabilities().effective == 0\n"
        "one = threading.Thread(target=lambda: seen.append(p.capabilities()))\n"
        "one.start(); one.join()\n"
        "assert seen == [(0, p.VISIBILITY, 0)]\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=environment(tmp_path))


def test_a_users_service_gives_its_capabilities_up(
    store: HealthyStore, tmp_path: Path, as_user: Callable[..., list[str]]
) -> None:
    """As a unit starts it: as the owner, with the two in its ambient set."""
    open_parents(tmp_path)
    planted = store.path / "manifests/registry.ollama.ai/library/planted/latest"
    planted.parent.mkdir()
    secret = tmp_path / "secret"
    secret.write_text(json.dumps({"config": {"digest": SECRET}, "layers": []}))
    secret.chmod(0o600)
    planted.symlink_to(secret)
    give(store.path, OWNER)
    both = "+sys_ptrace,+dac_read_search"
    powers = (f"--inh-caps={both}", f"--ambient-caps={both}")
    words = ("-m", "watcher", "--store", str(store.path), "-v", "--json", "audit")
    done = subprocess.run(as_user(words, OWNER, OWNER, powers=powers), capture_output=True)
    document = json.loads(done.stdout)
    assert SECRET.encode() not in done.stdout
    assert "manifest_unreadable" in {each["kind"] for each in document["findings"]}


def test_a_volume_of_roots_in_a_users_folder_goes_on_working(tmp_path: Path, run: Run) -> None:
    """As a container's bind mount is: a user's folder, and in it ``models`` of root's."""
    made = HealthyStore(tmp_path / "home/ollama/models")
    gone = made.download("stale")
    os.chown(tmp_path / "home/ollama", OWNER, OWNER)
    os.chown(tmp_path / "home", OWNER, OWNER)
    done = run("--store", made.path, "clean", "--yes", env=VISIBLE)
    assert done.returncode == 0, done
    assert not made.partials(gone)
    assert owners(made.path) == {(0, 0)}


def test_a_store_that_its_owner_can_not_reach_alone(tmp_path: Path, run: Run) -> None:
    """As below a folder of Docker's: root goes on from where the owner can."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    made = HealthyStore(closed / "volume/models")
    gone = made.download("stale")
    give(made.path.parent, OWNER)
    done = run("--store", made.path, "clean", "--yes", env=VISIBLE)
    assert done.returncode == 0, done
    assert not made.partials(gone)
    assert owners(made.path) == {(OWNER, OWNER)}


def test_what_the_owner_can_not_change_is_reported_with_what_helps(
    store: HealthyStore, run: Run
) -> None:
    behind = store.download("broken", aged=2 * DAY)
    store.partial(behind, 2).write_text("")
    for path in store.blobs.glob(f"*{behind}*"):
        os.chown(path, 0, 0)
        path.chmod(0o644)
    told = json.loads(run("--store", store.path, "--json", "audit").stdout)
    (found,) = [each for each in told["findings"] if each["kind"] == "file_owner"]
    assert f"chown -h {OWNER}" in found["command"]
    refused = run("--store", store.path, "repair", "--yes", "--offline", env=VISIBLE)
    assert {path.stat().st_uid for path in store.blobs.glob(f"*{behind}*")} == {0}
    assert b"belong to user id 0" in refused.stdout + refused.stderr
    subprocess.run(found["command"].removeprefix("sudo "), shell=True, check=True)
    again = json.loads(run("--store", store.path, "--json", "audit").stdout)
    assert "file_owner" not in {each["kind"] for each in again["findings"]}


# ---------------------------------------------------------------- where it can't be


@pytest.mark.parametrize(
    ("before", "why"),
    [
        (["unshare", "--user", "--map-root-user"], b"no mapping, shown as user id 65534"),
        (["setpriv", "--bounding-set", "-setuid"], b"CAP_SETUID"),
    ],
    ids=["no mapping", "no CAP_SETUID"],
)
@pytest.mark.parametrize(
    "words", [("audit",), ("clean", "--yes"), ("daemon",), ("queue", "add", "m")]
)
def test_root_that_can_not_become_the_owner_is_refused(
    store: HealthyStore, tmp_path: Path, before: list[str], why: bytes, words: tuple[str, ...]
) -> None:
    if subprocess.run([*before, "true"], capture_output=True).returncode:
        pytest.skip(f"{before[0]} can't be used here")
    there = content(store.path)
    done = subprocess.run(
        [*before, sys.executable, "-m", "watcher", "--store", store.path, *words],
        capture_output=True,
        env=environment(tmp_path),
    )
    assert (done.returncode, why in done.stderr) == (4, True), done
    assert content(store.path) == there


def test_a_program_of_roots_is_refused_and_stays_roots(store: HealthyStore) -> None:
    with pytest.raises(NoPermissionError, match="user id 12345"):
        ModelDownloadManager(StoreFiles(str(store.path)))
    assert os.geteuid() == 0


# ---------------------------------------------------------------- several stores


def several(tmp_path: Path) -> tuple[HealthyStore, HealthyStore, list[str]]:
    mine, others = HealthyStore(tmp_path / "a/models"), HealthyStore(tmp_path / "b/models")
    others.manifest_of("only-there", *others.digests)
    give(mine.path, OWNER)
    give(others.path, OTHER)
    return mine, others, ["--store", str(mine.path), "--store", str(others.path)]


def test_several_stores_of_several_owners(tmp_path: Path, run: Run) -> None:
    mine, others, both = several(tmp_path)
    for words in COMMANDS[:-1]:
        done = run(*both, *words, env=VISIBLE)
        assert done.returncode in (0, 1, 3), (words, done)
    told = run(*both, "--json", "audit").stdout.splitlines()
    assert [json.loads(each)["store"]["path"] for each in told] == [
        str(mine.path),
        str(others.path),
    ]
    assert owners(mine.path) == {(OWNER, OWNER)}
    assert owners(others.path) == {(OTHER, OTHER)}
    assert run(*both, "queue", "add", "m").returncode == 2
    assert run(*both, "daemon").returncode == 2


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_status_watches_the_stores_of_several_owners(tmp_path: Path, end: signal.Signals) -> None:
    mine, others, both = several(tmp_path)
    command = [sys.executable, "-m", "watcher", *both, "--json", "status", "--watch"]
    with subprocess.Popen(
        command, env=environment(tmp_path), stdout=subprocess.PIPE, start_new_session=True
    ) as watches:
        try:
            assert watches.stdout is not None
            told = [json.loads(watches.stdout.readline())["store"] for _ in range(5)]
            # As a terminal does it, and a service manager.
            os.killpg(watches.pid, end)
            code = watches.wait(120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(watches.pid, signal.SIGKILL)
    assert told == [*[str(mine.path), str(others.path)] * 2, str(mine.path)]
    assert code in (130, -end)


def test_a_model_that_one_of_them_has_is_known_to_all(tmp_path: Path, run: Run) -> None:
    _, others, both = several(tmp_path)
    assert run(*both, "repair", "-n", "healthy", "only-there").returncode == 0
    assert run(*both, "repair", "-n", "nowhere", "--offline").returncode == 2
    (others.blobs / f"sha256-{others.digests[0]}").write_text("other bytes!")
    assert run(*both, "verify", "only-there").returncode == 1


def test_a_signal_to_root_ends_the_child_too(tmp_path: Path) -> None:
    _, others, both = several(tmp_path)
    command = [sys.executable, "-m", "watcher", *both, "clean", "--yes"]
    with held_lock(others, OTHER):
        waits = subprocess.Popen(command, env=environment(tmp_path), stderr=subprocess.PIPE)
        wait_until(lambda: below(waits.pid) or waits.poll() is not None, "its child")
        assert waits.poll() is None
        waits.send_signal(signal.SIGTERM)
        waits.communicate(timeout=120)
        assert waits.returncode != 0


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_an_owner_who_stops_the_run_on_their_store_stops_no_other(
    tmp_path: Path, number: int
) -> None:
    first, others, both = several(tmp_path)
    others.download("stale", aged=DAY)
    give(others.path, OTHER)
    assert list(others.blobs.glob("*-partial*"))
    command = [sys.executable, "-m", "watcher", *both, "clean", "--yes", "--stale-after", "1s"]
    env = environment(tmp_path) | VISIBLE
    with (
        held_lock(first, OWNER),
        subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as runs,
    ):

        def of_owner() -> list[int]:
            return [pid for pid in below(runs.pid) if OWNED in status_of(pid).items()]

        wait_until(of_owner, "the child of the first store")
        (child,) = of_owner()
        while runs.poll() is None and child in of_owner():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
            time.sleep(0.1)
        assert runs.wait(120) == 4
    assert not list(others.blobs.glob("*-partial*"))


#: In the status of a process of the owner's.
OWNED = ("Uid", [str(OWNER)] * 4)


@contextlib.contextmanager
def held_lock(store: HealthyStore, owner: int) -> Iterator[None]:
    """Somebody holds the lock of a store, in which nothing was kept before."""
    store.ours.mkdir()
    with (store.ours / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        give(store.ours, owner)
        yield


# ---------------------------------------------------------------- shared blobs


def shared(tmp_path: Path) -> tuple[HealthyStore, HealthyStore]:
    """Two stores whose blobs lie in the folder of the second one."""
    linked, real = HealthyStore(tmp_path / "a/models"), HealthyStore(tmp_path / "b/models")
    for blob in linked.blobs.iterdir():
        shutil.copy2(blob, real.blobs)
    shutil.rmtree(linked.blobs)
    linked.blobs.symlink_to(real.blobs)
    return linked, real


def clean(run: Run, store: HealthyStore) -> subprocess.CompletedProcess[bytes]:
    return run("--store", store.path, "clean", "--yes", env=VISIBLE)


def test_blobs_that_the_store_beside_them_names_are_no_orphans(tmp_path: Path, run: Run) -> None:
    linked, real = shared(tmp_path)
    orphan = real.text_blob("nobody names it")
    before = content(real.blobs)
    told = json.loads(run("--store", linked.path, "--json", "audit").stdout)
    (found,) = [each for each in told["findings"] if each["kind"] == "store_shared"]
    assert str(real.path) in found["evidence"]
    done = clean(run, linked)
    after: Tree = {path: each for path, each in before.items() if orphan not in path}
    assert content(real.blobs) == after, done


def test_what_of_that_store_can_not_be_read_may_name_everything(tmp_path: Path, run: Run) -> None:
    linked, real = shared(tmp_path)
    real.text_blob("nobody names it")
    (real.path / "manifests/registry.ollama.ai/library/healthy/latest").write_text("{")
    before = content(real.blobs)
    assert clean(run, linked).returncode == 3
    assert content(real.blobs) == before


# ---------------------------------------------------------------- what is loaded


@pytest.fixture
def closed_package(nobodys_package: Path, tmp_path: Path) -> Path:
    """The package where only root can read it."""
    closed = tmp_path / "roots-alone"
    closed.mkdir(mode=0o700)
    skipped = shutil.ignore_patterns("python")
    shutil.copytree(nobodys_package, closed / "package", ignore=skipped)
    return closed / "package"


def test_an_installation_that_only_root_can_read(
    closed_package: Path, store: HealthyStore, tmp_path: Path, slow: bool
) -> None:
    """What each command loads has a test above: one of each kind here, with `--slow` all."""
    python = getattr(sys, "_base_executable", sys.executable)
    given = {**environment(tmp_path), "PYTHONPATH": str(closed_package)}
    some = [
        ("-v", "--json", "audit"),
        ("clean", "--yes", "--stale-after", "1s"),
        ("queue", "add", "m"),
    ]
    rest = [("queue", "rm", "m"), ("reset", "-y", "healthy"), ("-v", "audit")]
    for words in (*(COMMANDS if slow else some), *rest):
        done = subprocess.run(
            [python, "-W", "error", "-m", "watcher", "--store", store.path, *words],
            capture_output=True,
            env=given,
            cwd="/",
        )
        assert b"ModuleNotFoundError" not in done.stderr, (words, done.stderr)
        assert done.returncode in (0, 1, 3), (words, done)


class OwnersServer(Server):
    """The same server, run by the store's owner."""

    as_user: Callable[..., list[str]]

    def command(self) -> list[str]:
        words = self.as_user(["-m", "watcher.demo.engine", "serve"], OWNER, OWNER)
        at = words.index("-i") + 1
        given = [f"OLLAMA_MODELS={self.store}", "OLLAMA_HOST=127.0.0.1:0"]
        return [*words[:at], *given, *words[at:]]


@pytest.fixture
def closed_daemon(
    closed_package: Path, store: HealthyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Daemon:
    """Root's daemon with a queue, of an installation and with settings that only root can read."""
    monkeypatch.setattr(sys, "executable", getattr(sys, "_base_executable", sys.executable))
    settings = closed_package / "settings.toml"
    settings.write_text("queue = true")
    given = {"PYTHONPATH": str(closed_package)}
    return Daemon(store.path, given, beside=tmp_path / "daemon", settings=settings)


GENTLE = pytest.mark.slow("SIGKILL is the harder end; a queue's end by SIGTERM is tried elsewhere")


@pytest.mark.parametrize("end", [pytest.param(signal.SIGTERM, marks=GENTLE), signal.SIGKILL])
def test_from_such_an_installation_the_queue_runs_as_well(
    closed_daemon: Daemon,
    closed_package: Path,
    store: HealthyStore,
    registry: Registry,
    as_user: Callable[..., list[str]],
    end: signal.Signals,
) -> None:
    """Its process could not be started anew by the store's owner; and it ends with the daemon."""
    first, second = (registry.add_model(name, "1b", [Layer(8_000_000)]) for name in "ab")
    registry.hold(second.digests[0], after=4_000_000)
    given = {"PYTHONPATH": str(closed_package)}
    with OwnersServer(store.path) as server, closed_daemon as daemon:
        server.as_user = as_user
        server.start().wait_ready()
        for model in (first, second):
            assert driven(store.path, "queue", "add", model.name, env=given).returncode == 0
        daemon.wait_event("pull_completed")
        assert is_right(store.path, first.digests[0])
        registry.wait_held(second.digests[0], 1)
        (driver,) = [each for each in below(daemon.pid) if not below(each)]
        told = Path(f"/proc/{driver}/status").read_text()
        assert re.findall(r"Cap(?:Prm|Eff|Inh|Amb):\s*0*([0-9a-f]+)", told) == ["0"] * 4
        assert {each.split()[3] for each in re.findall(r"[UG]id:.*", told)} == {str(OWNER)}
        processes = below(daemon.pid)
        os.kill(daemon.pid, end)
        # Where servers run that it can't see into, it waits longer before it closes a request.
        assert daemon.wait_exit() == (0 if end is signal.SIGTERM else -end)
        registry.release()
        wait_until(lambda: not any(map(lives, processes)), "their end")
        assert daemon.of("error") == []
    (item,) = json.loads(driven(store.path, "queue", "ls", "--json", env=given).stdout)["items"]
    assert (item["state"], owners(store.path)) == ("waiting", {(OWNER, OWNER)})


def test_settings_that_only_root_can_read_take_a_restart(
    closed_daemon: Daemon, closed_package: Path, store: HealthyStore
) -> None:
    """Not even what the file was at the start is read again: it may be another one now."""
    settings = closed_package / "settings.toml"
    settings.write_text("clean = false")
    stale = store.download("stale", aged=9 * DAY)
    give(store.path, OWNER)
    with closed_daemon as daemon:
        settings.write_text("clean = true")
        os.kill(daemon.pid, signal.SIGHUP)
        told = str(daemon.wait_event("error")["message"])
        assert told.startswith(f"kept the previous settings: {settings} can only be read by root")
        assert f"user id {OWNER}" in told
        assert "restarted as root" in told
        assert store.partials(stale)
        os.chmod(settings.parent.parent, 0o755)
        os.kill(daemon.pid, signal.SIGHUP)
        assert daemon.wait_event("settings_read")["details"]["clean"] is True


@pytest.mark.parametrize("group", ["system.slice", "system.slice/system-watch.slice"])
def test_the_restart_is_that_of_its_unit(tmp_path: Path, group: str) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7/cgroup").write_text(f"0::/{group}/ollama-watch.service\n")
    assert processes.unit_of(str(tmp_path), 7) == "ollama-watch.service"
    (tmp_path / "7/cgroup").write_text("0::/user.slice/user-0.slice/session-1.scope\n")
    assert processes.unit_of(str(tmp_path), 7) == ""
    assert processes.unit_of(str(tmp_path), 8) == ""


def below(pid: int) -> set[int]:
    """The processes that a process has started, and those that these have started."""
    children: set[int] = set()
    for task in tasks(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            children.update(map(int, (task / "children").read_text().split()))
    return children.union(*map(below, children))


def tasks(pid: int) -> list[Path]:
    """The threads of a process: none once it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return list(Path(f"/proc/{pid}/task").iterdir())
    return []


def lives(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("isolated", [True, False])
def test_a_homes_own_code_does_not_run_in_a_service(tmp_path: Path, isolated: bool) -> None:
    home = tmp_path / "home"
    python = getattr(sys, "_base_executable", sys.executable)
    script = tmp_path / "script"
    script.write_text("print('ours')")
    given = {"HOME": str(home), "PATH": os.environ["PATH"]}
    where = subprocess.run(
        [python, "-m", "site", "--user-site"], env=given, capture_output=True, text=True
    )
    if where.returncode:
        pytest.skip("this Python has no user site")
    custom = Path(where.stdout.strip()) / "usercustomize.py"
    custom.parent.mkdir(parents=True)
    custom.write_text("print('planted')")
    installed = Installation(str(script), python=python, personal=not isolated)
    words = installed.command()[: -2 if isolated else None]
    command = words if isolated else [python, *words]
    done = subprocess.run(command, env=given, capture_output=True, text=True, check=True)
    assert done.stdout == ("ours\n" if isolated else "planted\nours\n")
