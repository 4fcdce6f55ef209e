"""When to look and at what, on real folders: what is lost, gone, replaced or limited is noticed."""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest
from watchdog.observers.api import BaseObserver
from watchdog.utils import BaseThread

from tests.conftest import IS_ROOT, environment
from tests.support.driving import Daemon, HealthyStore
from tests.support.servers import least, wait_until
from watcher.model import DAY, Due
from watcher.service import triggers as module
from watcher.service.triggers import MOST_DIGESTS, Digests, Triggers

PATIENCE = 120.0


class Watching:
    """Wakes that somebody waits for in a thread of their own; what they named is read in turn."""

    def __init__(self, store: Path, proc: str = "/proc") -> None:
        self.triggers = Triggers(str(store), proc)
        self._scopes: queue.SimpleQueue[Digests] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run)
        #: How many scans of everything there were so far.
        self.full_scans = 0

    def _run(self) -> None:
        for scope in self.triggers:
            self.full_scans += scope is None
            self._scopes.put(scope)

    def __enter__(self) -> Self:
        self.triggers.__enter__()
        self._thread.start()
        assert self.next() is None
        return self

    def __exit__(self, *_: object) -> None:
        self.triggers.stop()
        self._thread.join(PATIENCE)
        self.triggers.__exit__(None, None, None)
        assert not self._thread.is_alive()

    def next(self) -> Digests:
        """The next scope."""
        return self._scopes.get(timeout=PATIENCE)

    def full(self) -> None:
        """Wait for a look at everything."""
        while self.next() is not None:
            pass

    def hears(self, path: Path) -> None:
        """A new download in a folder is named.

        It is not where all is watched anew just then; a look at everything follows that.
        """
        scope: Digests = None
        while scope is None:
            digest = os.urandom(32).hex()
            (path / f"sha256-{digest}-partial").touch()
            while (scope := self.next()) is not None and digest not in scope:
                pass


@pytest.fixture
def watching(store: HealthyStore) -> Iterator[Watching]:
    with Watching(store.path) as watching:
        yield watching


# ---------------------------------------------------------------- told by others


def test_another_thread_can_wake_it_for_some_digests_and_for_everything(watching: Watching) -> None:
    watching.triggers.wake(frozenset({"a" * 64}))
    assert watching.next() == frozenset({"a" * 64})
    watching.triggers.wake(None)
    assert watching.next() is None


def test_a_signal_handler_can_end_and_wake_it(store: HealthyStore) -> None:
    """The thread that waits is the one that handles the signal, wherever it is just then."""
    seen: list[Digests] = []
    with Triggers(str(store.path)) as triggers:
        before = signal.signal(signal.SIGUSR1, lambda *_: triggers.wake(None))
        ends = signal.signal(signal.SIGUSR2, lambda *_: triggers.stop())
        try:
            for scope in triggers:
                seen.append(scope)
                number = signal.SIGUSR1 if len(seen) < 50 else signal.SIGUSR2
                threading.Thread(target=os.kill, args=(os.getpid(), number)).start()
        finally:
            signal.signal(signal.SIGUSR1, before)
            signal.signal(signal.SIGUSR2, ends)
    assert seen == [None] * 50


def test_a_closed_file_is_reported_again_where_the_scan_failed(
    store: HealthyStore, watching: Watching
) -> None:
    def ended() -> frozenset[str]:
        """What was closed; it may be named before, since it was opened."""
        watching.hears(store.blobs)
        found = frozenset[str]()

        def has_ended() -> bool:
            nonlocal found
            found = watching.triggers.ended()
            return bool(found)

        wait_until(has_ended, "the end", PATIENCE)
        return found

    closed = ended()
    assert len(closed) == 1
    assert watching.triggers.ended() == set()
    again = ended()
    watching.triggers.again(None)
    assert watching.triggers.ended() == again != closed
    watching.triggers.deadlines(None, [])
    watching.triggers.again(None)
    assert watching.triggers.ended() == set()


# ---------------------------------------------------------------- clocks


@pytest.mark.parametrize("jump", [-DAY, DAY], ids=["back", "ahead"])
def test_a_clock_that_jumps_puts_no_deadline_off(
    watching: Watching, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    watching.triggers.deadlines(None, [Due(time.time() + 0.2, "a" * 64)])
    watching.triggers.wake(frozenset({"b" * 64}))  # so that it reckons with it
    assert watching.next() == frozenset({"b" * 64})
    clocks = SimpleNamespace(time=lambda: time.time() + jump, monotonic=time.monotonic)
    monkeypatch.setattr(module, "time", clocks)
    watching.triggers.wake(frozenset({"c" * 64}))
    named = watching.next() or frozenset()
    assert "c" * 64 in named
    # On a busy machine it is due by then.
    assert "a" * 64 in named or watching.next() == frozenset({"a" * 64})


# ---------------------------------------------------------------- what is lost


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("InotifyFD", "handle_event"),
        ("InotifyObserver", "dispatch_events"),
        ("InotifyEmitter", "queue_events"),
    ],
)
def test_a_thread_of_watchdogs_that_dies_is_noticed_at_once(
    store: HealthyStore, watching: Watching, monkeypatch: pytest.MonkeyPatch, kind: str, step: str
) -> None:
    def die(*_: object, **__: object) -> None:
        raise KeyError("its books are in disorder")

    threads = [thread for thread in threading.enumerate() if type(thread).__name__ == kind]
    assert threads
    for thread in threads:
        monkeypatch.setattr(thread, step, die)
    # The first one may still be dealt with as before.
    store.file("a")
    store.file("another")
    wait_until(lambda: not all(thread.is_alive() for thread in threads), "a thread to die")
    watching.full()
    watching.hears(store.blobs)


def test_a_thread_that_has_ended_quietly_is_noticed_by_the_next_look(store: HealthyStore) -> None:
    with Triggers(str(store.path)) as watching:
        events = watching.events
        events.watch()
        assert events.sound()
        thread = events._threads[-1]
        assert isinstance(thread, BaseThread)
        thread.stop()
        thread.join(PATIENCE)
        assert not events.sound()
        events.watch()
        assert events.sound()


def test_a_watch_that_cannot_be_ended_keeps_nobody_waiting(
    store: HealthyStore, watching: Watching, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CLOSE_SECONDS", 0.1)
    ending = threading.Event()
    real = module._end

    def hang(observer: BaseObserver) -> None:
        ending.wait(PATIENCE)
        real(observer)

    monkeypatch.setattr(module, "_end", hang)
    watching.triggers.on_places()
    watching.full()
    watching.hears(store.blobs)
    ending.set()


def test_events_that_the_kernel_had_no_room_for_bring_a_full_look(store: HealthyStore) -> None:
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if limit > 100_000:
        pytest.skip("the queue of inotify is too long here")
    with Daemon(store.path) as daemon:
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            for number in range(limit // 2 + 100):  # each is created and closed
                (store.blobs / f"foreign-{number}").touch()
            digest = store.download("lost", aged=DAY)
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        assert daemon.wait_event("partial_found")["details"]["digest"] == f"sha256:{digest}"
        daemon.wait_idle()
        assert daemon.errors == ""


def test_a_storm_under_manifests_leaves_it_hearing(store: HealthyStore, watching: Watching) -> None:
    for turn in range(500):
        folder = store.path / "manifests" / "host" / f"{turn % 3}"
        folder.mkdir(parents=True)
        shutil.rmtree(folder.parent)
    model = store.manifest_of("after", *store.digests)
    watching.hears(store.blobs)
    model.unlink()
    watching.full()


def test_a_warning_of_watchdogs_ends_no_thread_and_another_one_is_seen() -> None:
    with module.complaints(lambda: None):
        warnings.warn_explicit("books", RuntimeWarning, "x", 1, module="watchdog.observers.a")
        with pytest.raises(RuntimeWarning):
            warnings.warn_explicit(
                "ours", RuntimeWarning, "x", 1, module="watcher.service.triggers"
            )


# ---------------------------------------------------------------- much at once


def test_a_thousand_pulls_begun_and_cancelled_take_no_more_room_than_some(
    store: HealthyStore,
) -> None:
    with Triggers(str(store.path)) as triggers:
        scopes = iter(triggers)
        assert next(scopes) is None
        for number in range(3 * MOST_DIGESTS):
            for path in (store.partial(f"{number:064x}", 0), store.partial(f"{number:064x}")):
                path.touch()
                path.unlink()
        wait_until(lambda: triggers._all, "the events to be heard")
        kept = (triggers._digests, triggers._sidecars, triggers._ended)
        assert all(len(each) <= MOST_DIGESTS for each in kept)
        assert None in (next(scopes), next(scopes))


def test_the_memory_of_a_service_is_flat_while_pulls_come_and_go(
    store: HealthyStore, slow: bool
) -> None:
    turns, most = itertools.count(), 2048 if slow else 1024
    resident = [0]

    def growth() -> float:
        turn, before = next(turns), resident[0]
        for number in range(1000 if slow else 500):
            digest = store.download(f"{turn} {number}", parts=2, aged=DAY)
            for path in store.blobs.glob(f"sha256-{digest}-*"):
                path.unlink()
        daemon.wait_idle()
        status = Path(f"/proc/{daemon.pid}/status").read_text()
        resident[0] = int(status.split("VmRSS:")[1].split()[0])
        return resident[0] - before

    with Daemon(store.path) as daemon:
        growth()  # from nothing
        assert least(growth, most) < most


# ---------------------------------------------------------------- folders, symlinks and mounts


def test_folders_made_anew_in_one_moment_are_watched_again(
    store: HealthyStore, watching: Watching
) -> None:
    for name in ("manifests", "blobs", "manifests"):
        for _ in range(5):
            shutil.rmtree(store.path / name)
            (store.path / name).mkdir()
        watching.hears(store.blobs)
        store.text_blob("healthy weights")
        store.text_blob("healthy config")
        model = store.manifest_of("new", *store.digests)
        watching.full()
        model.unlink()
        watching.full()


def test_a_folder_made_anew_while_the_watch_begins_is_watched_if_it_looks_the_same(
    store: HealthyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the inode of the old one, and was made within the same tick of the clock."""
    monkeypatch.setattr(module, "_identity", os.path.exists)
    real = module.FileEvents._schedule

    def make_anew(events: module.FileEvents) -> None:
        observer = events._observer
        assert observer is not None
        shutil.rmtree(store.path / "manifests")
        (store.path / "manifests").mkdir()
        wait_until(
            lambda: not all(each.is_alive() for each in observer.emitters), "the watch to end"
        )

    left = [make_anew]

    def schedule(self: module.FileEvents, path: str, *words: Any, **more: Any) -> None:
        if path == os.path.realpath(store.blobs) and left:
            left.pop()(self)
        real(self, path, *words, **more)

    monkeypatch.setattr(module.FileEvents, "_schedule", schedule)
    with Watching(store.path) as watching:
        watching.full()
        watching.hears(store.blobs)
        store.manifest_of("new", *store.digests)
        watching.full()


def _point(link: Path, target: Path) -> None:
    """Point a symlink elsewhere in one step, as `ln -sfn` does."""
    new = link.with_name("new")
    new.symlink_to(target)
    new.rename(link)


def test_a_store_behind_a_symlink_is_noticed_and_so_is_the_link_pointed_elsewhere(
    tmp_path: Path,
) -> None:
    one, two = HealthyStore(tmp_path / "far" / "one"), HealthyStore(tmp_path / "two")
    link = tmp_path / "models"
    link.symlink_to(one.path)
    with Watching(link) as watching:
        watching.hears(one.blobs)
        _point(link, two.path)
        watching.full()
        watching.hears(two.blobs)
        link.unlink()
        watching.full()
        link.symlink_to(one.path)
        watching.full()
        watching.hears(one.blobs)


def test_blobs_behind_a_symlink_are_noticed_wherever_it_points(
    store: HealthyStore, tmp_path: Path
) -> None:
    disks = [tmp_path / "disks" / name / "blobs" for name in ("one", "two")]
    disks[1].mkdir(parents=True)
    disks[0].parent.mkdir()
    store.blobs.rename(disks[0])
    store.blobs.symlink_to(disks[0])
    with Watching(store.path) as watching:
        watching.hears(disks[0])
        _point(store.blobs, disks[1])
        watching.full()
        watching.hears(disks[1])
        shutil.rmtree(disks[1])
        watching.full()
        disks[1].mkdir()
        watching.full()
        watching.hears(disks[1])


@pytest.mark.skipif(not IS_ROOT, reason="only root can mount")
def test_blobs_on_a_mount_that_comes_and_goes(store: HealthyStore, watching: Watching) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(store.blobs)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        watching.full()
        watching.hears(store.blobs)
    finally:
        subprocess.run(["umount", "--lazy", str(store.blobs)], check=True)
    watching.full()
    watching.hears(store.blobs)


def test_a_store_that_is_not_there_yet_is_noticed_when_it_comes(tmp_path: Path) -> None:
    with Watching(tmp_path / "home" / ".ollama" / "models") as watching:
        store = HealthyStore(tmp_path / "home" / ".ollama" / "models")
        watching.full()
        watching.hears(store.blobs)
        store.path.parent.rename(tmp_path / "home" / "away")
        shutil.rmtree(tmp_path / "home" / "away")
        watching.full()


def test_events_beside_the_store_are_ignored(store: HealthyStore, watching: Watching) -> None:
    beside = store.path.with_name("beside")
    beside.mkdir()
    (store.path / "a file").touch()
    beside.rename(store.path.with_name("other"))
    watching.hears(store.blobs)
    assert watching.full_scans == 1


# ---------------------------------------------------------------- where nothing is to be heard


def _limited(
    store: HealthyStore, limit: str, count: int, script: str
) -> subprocess.CompletedProcess[str]:
    """Run Python in a user namespace with an inotify limit of its own."""
    preamble = (
        "import sys, time\n"
        "from watcher.service import triggers\n"
        "def limit(count):\n"
        f"    open('/proc/sys/user/{limit}', 'w').write(str(count))\n"
        f"limit({count})\n"
        "triggers.BLIND_SECONDS = 0.2\n"
    )
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", preamble + script]
    done = subprocess.run(
        [*command, str(store.path)],
        env=environment(store.path.parent),
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode and ("unshare" in done.stderr or "/proc/sys/user" in done.stderr):
        pytest.skip("no user namespaces here")
    return done


TRIES_AGAIN = """
with triggers.Triggers(sys.argv[1]) as woken:
    for number, scope in enumerate(woken):
        assert scope is None, scope
        if number < 3:
            print(woken.events.blind)
        elif woken.events.blind:
            limit(1000)
        else:
            woken.stop()
print("hears again")
"""


@pytest.mark.parametrize(
    ("limit", "count", "named"),
    [
        ("max_inotify_instances", 0, "fs.inotify.max_user_instances"),
        ("max_inotify_watches", 0, "fs.inotify.max_user_watches"),
        # Enough for manifests/ itself, but not for the folders in it.
        ("max_inotify_watches", 2, "fs.inotify.max_user_watches"),
    ],
)
def test_a_limit_of_inotify_is_named_and_tried_again(
    store: HealthyStore, limit: str, count: int, named: str
) -> None:
    done = _limited(store, limit, count, TRIES_AGAIN)
    assert done.stderr == ""
    *told, last = done.stdout.splitlines()
    assert len(told) == 3
    assert len(set(told)) == 1
    assert f"the limit {named} = " in told[0]
    assert f"sysctl -w {named}=" in told[0]
    assert last == "hears again"


LATER = """
import os
with triggers.Triggers(sys.argv[1]) as woken:
    for number, scope in enumerate(woken):
        assert scope is None, scope
        if not number:
            assert not woken.events.blind
            limit(1)
            os.mkdir(sys.argv[1] + "/manifests/new")
        elif woken.events.blind:
            print(woken.events.blind)
            woken.stop()
"""


def test_a_limit_that_is_reached_by_a_new_folder_is_noticed(store: HealthyStore) -> None:
    done = _limited(store, "max_inotify_watches", 1000, LATER)
    assert done.stderr == ""
    assert "fs.inotify.max_user_watches" in done.stdout


def test_the_service_reports_once_that_it_receives_no_file_events_and_looks_all_the_same(
    store: HealthyStore,
) -> None:
    script = (
        "import threading\n"
        "from watcher import reconcile\n"
        "from watcher.service import daemon\n"
        "from watcher.model import Settings\n"
        "from watcher.observe.host import Host\n"
        "looks = []\n"
        "def tell(event):\n"
        "    if event.event_type == 'error': print(event.message, flush=True)\n"
        "real = reconcile.Reconciler.reconcile\n"
        "def cycle(*words, **more):\n"
        "    looks.append(words)\n"
        "    if len(looks) == 4: threading.Thread(target=stop).start()\n"
        "    return real(*words, **more)\n"
        "import os, signal\n"
        "def stop(): os.kill(os.getpid(), signal.SIGTERM)\n"
        "reconcile.Reconciler.reconcile = cycle\n"
        "policy = Settings(repair=False, writers_visible=True)\n"
        "daemon.run(Host(sys.argv[1], report=tell), lambda: policy, daemon.Children([]))\n"
    )
    done = _limited(store, "max_inotify_watches", 0, script)
    assert done.stderr == ""
    (told,) = done.stdout.splitlines()
    assert "; scanning every " in told


@pytest.mark.parametrize("kind", ["nfs4", "fuse.sshfs", "fuse.mergerfs", "virtiofs"])
@pytest.mark.parametrize("where", ["", "blobs"])
def test_where_others_write_unheard_it_looks_at_intervals(
    store: HealthyStore, tmp_path: Path, kind: str, where: str
) -> None:
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "filesystems").write_text("nodev\tproc\n\text4\n")
    point = store.path / where if where else store.path
    (proc / "self/mounts").write_text(f"/dev/a / ext4 rw 0 0\nfar {point} {kind} rw 0 0\n")
    with Watching(store.path, str(proc)) as watching:
        assert watching.triggers.events.blind.startswith(f"{point} is on {kind}, ")
        watching.hears(store.blobs)
        assert watching.triggers._full_at - time.monotonic() <= module.BLIND_SECONDS


def test_a_folder_that_may_not_be_read_is_named(
    store: HealthyStore, tmp_path: Path, as_nobody: Callable[[list[str]], list[str]]
) -> None:
    script = (
        "import sys\n"
        "from watcher.service.triggers import Triggers\n"
        "with Triggers(sys.argv[1]) as wakes:\n"
        "    next(iter(wakes))\n"
        "    print(wakes.events.blind)\n"
    )
    store.blobs.chmod(0o711)
    command = as_nobody(["-c", script, str(store.path)])
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert f"{store.blobs}: Permission denied" in done.stdout


def test_triggers_leave_no_descriptor_and_no_thread_behind(store: HealthyStore) -> None:
    def here() -> tuple[list[str], set[threading.Thread]]:
        opened = []
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                opened.append(os.readlink(f"/proc/self/fd/{fd}").split(":")[0])
        return sorted(opened), set(threading.enumerate())

    before = here()
    for _ in range(3):
        with Triggers(str(store.path)) as triggers:
            for _ in triggers:
                triggers.events.watch()
                triggers.stop()
    assert here() == before
