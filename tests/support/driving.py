"""Stores to break, commands and daemons to run, and processes that are in the way.

Everything lies in folders that the caller gives; every wait is for a condition and bounded; leaving
a context ends what it has started.

    store = HealthyStore(tmp_path / "models")
    stale = store.download("a", aged=8 * DAY)
    with Daemon(store.path) as daemon:
        daemon.wait_event("partial_stale")
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self

from tests.support import commands
from tests.support.notation import Store, age
from tests.support.runs import rules
from tests.support.servers import ROOT, TIMEOUT, Line, blob, sidecar, wait_until
from watcher.demo.registry import Content, Registry
from watcher.model import DAY
from watcher.observe.host import Host

#: What `clean` does; nothing may hang on who else runs on the machine of the tests.
POLICY = rules(clean=True, repair=False, writers_visible=True)
PART = 16 * 1024
OLD = 8 * DAY
KEYS = ["timestamp", "model_name", "event_type", "message", "details"]

Tree = dict[str, tuple[object, ...]]


# ---------------------------------------------------------------- stores


class HealthyStore(Store):
    """A models folder with one healthy model in it, and what tests add."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        #: Digests of the healthy model.
        self.digests = (self.text_blob("healthy weights"), self.text_blob("healthy config"))
        self.manifest_of("healthy", *self.digests)

    @property
    def ours(self) -> Path:
        """The folder ``.ollama-watch``."""
        return self.path / ".ollama-watch"

    def digest(self, text: str) -> str:
        """64 digits that stand for `text` beside this store.

        Elsewhere they are others: who has a file of that name open counts as its holder, wherever
        it lies, and other tests may run at the same time.
        """
        return hashlib.sha256(f"{self.path.parent} {text}".encode()).hexdigest()

    def text_blob(self, text: str, aged: float = OLD) -> str:
        """A finished blob of a text, named after it (see `digest`); its 64 digits."""
        digest = self.digest(text)
        path = self.blobs / f"sha256-{digest}"
        path.write_text(text)
        age(path, aged)
        return digest

    def manifest_of(self, model: str, *digests: str) -> Path:
        """A manifest of just now that names blobs: the last one as its config."""
        *layers, config = [
            {
                "mediaType": "application/octet-stream",
                "digest": f"sha256:{digest}",
                "size": (self.blobs / f"sha256-{digest}").stat().st_size,
            }
            for digest in digests
        ]
        document = {"schemaVersion": 2, "config": config, "layers": layers}
        return self.manifest(f"{model}/latest", json.dumps(document).encode(), aged="0s")

    def download(self, text: str, *, parts: int = 3, aged: float = OLD) -> str:
        """A download of `parts` parts, half of each completed, and its data; its digits."""
        digest = self.digest(text)
        for number in range(parts):
            with self._appearing(f"sha256-{digest}-partial-{number}", aged) as file:
                file.write(sidecar(number, number * PART, PART, PART // 2).encode())
        with self._appearing(f"sha256-{digest}-partial", aged) as file:
            file.truncate(max(parts, 1) * PART)
            for number in range(max(parts, 1)):
                file.seek(number * PART)
                file.write(text.encode()[:1] * (PART // 2))
        return digest

    @contextlib.contextmanager
    def _appearing(self, name: str, aged: float) -> Iterator[BinaryIO]:
        """A file under ``blobs`` that nobody sees before it is written and so old."""
        made = self.path / f"made-{name}"
        with made.open("wb") as file:
            yield file
        age(made, aged)
        made.rename(self.blobs / name)

    def file(self, name: str, text: str = "a file", aged: float = OLD) -> Path:
        """Any file under ``blobs``."""
        path = self.blobs / name
        path.write_text(text)
        age(path, aged)
        return path

    def partial(self, digest: str, number: int | None = None) -> Path:
        """The path of a download's data, or of one of its sidecars."""
        name = f"sha256-{digest}-partial"
        return self.blobs / (name if number is None else f"{name}-{number}")

    def partials(self, digest: str) -> list[str]:
        """The names that a download has, in order."""
        return sorted(path.name for path in self.blobs.glob(f"sha256-{digest}-partial*"))

    def tree(self) -> Tree:
        """All that is in ``blobs`` and ``manifests``: by path what each file is, to the letter."""
        return content(self.blobs) | content(self.path / "manifests")

    def leftovers(self) -> list[str]:
        """What a finished act must not leave in our folder: something of an intent, quarantine."""
        wanted = {"lock", "daemon.lock", "state.json", "logs", "intents", "quarantine", "reserve"}
        wanted |= {
            "driven",
            "logs.lock",
            "models.json",
            "models.json.lock",
            "registry-cache.json",
            "transfers",
        }
        found = [path for path in self.ours.rglob("*") if not path.match("seen-*.json")]
        return sorted(
            str(path.relative_to(self.ours))
            for path in found
            if (path.parent == self.ours and path.name not in wanted)
            or (path.parent.name in ("intents", "quarantine"))
        )

    def events(self, log: str = "events") -> list[Line]:
        """All lines of a log; each must have the five keys."""
        path = self.ours / "logs" / f"{log}.jsonl"
        return whole_lines(path, growing=True) if path.exists() else []

    def event_types(self) -> list[str]:
        """What the log tells, in order."""
        return [event["event_type"] for event in self.events()]


def content(folder: Path) -> Tree:
    """By path below the folder's parent: inode, modification time, and content of each file."""
    found: Tree = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        name = str(path.relative_to(folder.parent))
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        elif path.is_dir():
            found[name] = ("folder",)
        else:
            text = hashlib.sha256(path.read_bytes()).hexdigest()
            found[name] = ("file", info.st_ino, info.st_mtime_ns, info.st_size, text)
    return found


def whole_lines(path: Path, *, growing: bool = False) -> list[Line]:
    """The JSON lines of a file. Fails where one is cut short or has other keys than the five.

    `growing`: somebody may be writing, and a reader sees a write in the middle.
    """
    raw = path.read_bytes()
    if growing:
        raw = raw[: raw.rfind(b"\n") + 1]
    assert not raw or raw.endswith(b"\n"), f"half a line at the end of {path.name}: {raw[-80:]!r}"
    events = [json.loads(line) for line in raw.splitlines()]
    for event in events:
        assert list(event) == KEYS
    return events


def lay_out(registry: Registry, store: Path, digest: str, *, aged: float = OLD) -> Content:
    """A download of a registry's layer (`sha256:…`): two parts, half of each there and claimed."""
    whole = registry.content(digest)
    half = whole.size // 2
    data = blob(store, digest, "-partial")
    data.parent.mkdir(parents=True, exist_ok=True)
    with data.open("wb") as file:
        file.truncate(whole.size)
        for number, (start, end) in enumerate(((0, half), (half, whole.size))):
            done = (end - start) // 2
            file.seek(start)
            file.writelines(whole.slices(start, start + done))
            text = sidecar(number, start, end - start, done)
            blob(store, digest, f"-partial-{number}").write_text(text)
    for path in data.parent.glob(f"{data.name}*"):
        age(path, aged)
    return whole


def is_right(store: Path, digest: str) -> bool:
    """Whether the finished blob of `sha256:…` is there and has that digest."""
    path = blob(store, digest)
    return path.exists() and _sha256(path) == digest[7:]


def _sha256(path: Path) -> str:
    """Of a file that may be large: piece by piece, which takes less than to make room for it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- commands


def environment(store: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """What our commands are given: a home beside the store, no settings of this machine."""
    home = store.with_name(f"{store.name}.home")
    home.mkdir(exist_ok=True)
    return {
        "HOME": str(home),
        "PATH": os.environ.get("PATH", ""),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "PYTHONWARNINGS": "error",
        "OLLAMA_WATCH_WRITERS_VISIBLE": "true",
        "OLLAMA_WATCH_REPAIR": "false",
        **(extra or {}),
    }


def command(store: Path, *words: str) -> list[str]:
    """The command line of ``ollama-watch --store STORE WORDS``."""
    return [sys.executable, "-m", "watcher", "--store", str(store), *words]


def run(
    store: Path, *words: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    given = ["--store", str(store), *words]
    done = commands.run(given, environment(store, env), store.parent)
    out, errors = done.stdout.decode(), done.stderr.decode()
    return subprocess.CompletedProcess(given, done.returncode, out, errors)


def audit(store: Path) -> dict[str, Any]:
    """The document of ``audit --json``."""
    done = run(store, "--json", "audit")
    assert done.returncode in (0, 1), done.stderr
    return dict(json.loads(done.stdout))


class Daemon:
    """``ollama-watch --json daemon`` as a process; `events` is what it has told on stdout."""

    def __init__(
        self,
        store: Path,
        env: Mapping[str, str] | None = None,
        *,
        beside: Path | None = None,
        settings: Path | None = None,
    ) -> None:
        """`beside`: what it writes lies beside this path instead of the store."""
        self._words = [*(["--config", str(settings)] if settings else []), "--json", "daemon"]
        self.store = store
        beside = beside or store
        self.told = beside.with_name(f"{beside.name}.daemon.jsonl")
        self._errors = beside.with_name(f"{beside.name}.daemon.err")
        # A warning of a library must be seen, and not end the thread that it comes up in.
        self._environment = environment(beside, env) | {"PYTHONWARNINGS": "default"}
        self._process: commands.Process | None = None

    def start(self) -> Self:
        """Start the process and return at once."""
        with self.told.open("wb") as out, self._errors.open("wb") as errors:
            self._process = commands.start(
                ["--store", str(self.store), *self._words],
                self._environment,
                cwd=self.told.parent,
                stdout=out,
                stderr=errors,
            )
        return self

    def __enter__(self) -> Self:
        """Start it, and wait until it has had its first look."""
        try:
            return self.start().wait_idle()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        assert kind is not None or "Traceback" not in self.errors, self.errors

    def close(self) -> None:
        """Make sure that no process is left."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(120)

    @property
    def errors(self) -> str:
        """What it has written to stderr."""
        return self._errors.read_text()

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def events(self) -> list[Line]:
        """What it has told so far, each line whole and with its five keys."""
        return whole_lines(self.told, growing=self.alive)

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def of(self, event_type: str) -> list[Line]:
        """The events of one type so far."""
        return [event for event in self.events if event["event_type"] == event_type]

    def wait_event(self, event_type: str, count: int = 1, timeout: float = TIMEOUT) -> Line:
        """Wait for the `count`-th event of a type."""
        with contextlib.suppress(TimeoutError):
            wait_until(
                lambda: not self.alive or len(self.of(event_type)) >= count,
                event_type,
                timeout,
            )
        found = self.of(event_type)
        types = [event["event_type"] for event in self.events]
        assert len(found) >= count, f"no {event_type} among {types}; {self.errors}"
        return found[count - 1]

    def wait_idle(self) -> Self:
        """Wait until it sleeps after its first look: it has then nothing left to do."""
        self.wait_event("service_started")
        wait_until(self._asleep, "the daemon to sleep")
        return self

    def _asleep(self) -> bool:
        """All threads wait, and did nothing between two looks at them a moment apart.

        One that has to wait for a processor has done nothing, either; its state tells. Those that
        hash, at a low priority, may be at work.
        """
        before = self.work()
        time.sleep(0.15)
        threads = dict(self._threads())
        state, nice = 0, 16
        usual = threads[self.pid][nice]
        states = {each[state] for each in threads.values() if each[nice] == usual}
        return self.work() == before and states == {"S"}

    def _threads(self) -> Iterator[tuple[int, list[str]]]:
        """By id, the fields of each thread's `stat` from its state on; one may end meanwhile."""
        for path in Path(f"/proc/{self.pid}/task").glob("*/stat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                yield int(path.parent.name), path.read_text().rpartition(")")[2].split()

    def work(self) -> int:
        """How often the threads of the daemon have gone to sleep by themselves so far."""
        total = 0
        for status in Path(f"/proc/{self.pid}/task").glob("*/status"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                for line in status.read_text().splitlines():
                    if line.startswith("voluntary_ctxt_switches"):
                        total += int(line.split()[1])
        return total

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Send a signal and wait for the end; the exit code, negative for a signal."""
        assert self._process is not None
        self._process.send_signal(number)
        return self.wait_exit()

    def wait_exit(self, timeout: float = TIMEOUT) -> int:
        """Wait for its end; the exit code."""
        assert self._process is not None
        return self._process.wait(timeout)


# ---------------------------------------------------------------- a world for cycles in-process


def private_proc(folder: Path, *pids: int) -> str:
    """A ``/proc`` that shows only us and some others: who else runs here plays no part."""
    folder.mkdir(exist_ok=True)
    for name in ("self", "stat", "net", "mounts", "filesystems", *map(str, (os.getpid(), *pids))):
        with contextlib.suppress(FileExistsError):
            (folder / name).symlink_to(f"/proc/{name}")
    return str(folder)


def host(store: HealthyStore, proc: str = "/proc", **more: Any) -> Host:
    """A world over a store."""
    return Host(str(store.path), proc=proc, **more)


# ---------------------------------------------------------------- processes in the way


@contextlib.contextmanager
def holding(path: Path, mode: Literal["rb", "r+b"] = "rb") -> Iterator[int]:
    """A process of its own that has a file open; its pid."""
    with path.open(mode) as file:
        process = subprocess.Popen(["sleep", "600"], stdin=file, start_new_session=True)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def ollama_process(folder: Path, word: str = "run") -> Iterator[int]:
    """A process whose name is ``ollama``, as a server's, client's or runner's is; its pid."""
    program = folder / "ollama"
    if not program.exists():
        found = shutil.which("tail")
        assert found is not None
        shutil.copy(found, program)
        (folder / word).touch()
    process = subprocess.Popen([program, "-f", word], cwd=folder, start_new_session=True)
    try:
        wait_until(lambda: _comm(process.pid) == "ollama", "its name")
        yield process.pid
    finally:
        process.kill()
        process.wait()


def _comm(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def once(action: Callable[[], object]) -> Callable[..., None]:
    """A hook that does something when it is called first, whatever it is called with."""
    left = [action]

    def hook(*_: object, **__: object) -> None:
        if left:
            left.pop()()

    return hook
