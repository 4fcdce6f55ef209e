"""Servers as processes, and what can be seen of them and of their store.

`EngineServer` (the demo engine) and `RealServer` (the binary that OLLAMA_BIN names) have the same
interface. Every wait is for a condition and bounded; everything lies in folders that the caller
gives; leaving a server's context kills it.

    with Registry() as registry, EngineServer(store) as server:
        model = registry.add_model("demo", "1b", [Layer(262_144_000)])
        server.start().wait_ready()
        lines = server.pull(model.name)
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

import watcher.demo

from . import commands

TIMEOUT = 120.0
ROOT = Path(watcher.demo.__path__[0]).parents[1]
Line = dict[str, Any]


class ServerDiedError(AssertionError):
    """The server ended where it should have answered; the text is its log."""


def wait_until(condition: Callable[[], object], what: str, timeout: float = TIMEOUT) -> None:
    """Wait until `condition()` is true. Raises TimeoutError naming `what`."""
    began = time.monotonic()
    while not condition():
        waited = time.monotonic() - began
        if waited > timeout:
            raise TimeoutError(f"waited {timeout} s for {what}")
        # To look is work, too, and what takes long is not missed by some milliseconds.
        time.sleep(0.005 if waited < 0.1 else 0.02)


def least(takes: Callable[[], float], limit: float) -> float:
    """The least that something takes in some tries; the first one below the limit is enough.

    A busy machine makes it much now and then; what waits, or keeps what it should not, takes it in
    each try.
    """
    taken = [takes()]
    while taken[-1] >= limit and len(taken) < 20:
        taken.append(takes())
    return min(taken)


class Pull:
    """One `POST /api/pull` under way, read by a thread of its own.

    `lines` grows while it runs: one dict a line of the stream. `status` is the HTTP status, None
    while there is no answer yet.
    """

    def __init__(
        self, server: Server, model: str, on_status: Callable[[Line], None] | None = None
    ) -> None:
        self.lines: list[Line] = []
        self.status: int | None = None
        self._on_status = on_status
        self._ended = threading.Event()
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port)
        self._connection.connect()
        self._socket = self._connection.sock
        body = json.dumps({"model": model, "insecure": True})
        self._connection.request("POST", "/api/pull", body, {"Content-Type": "application/json"})
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def ended(self) -> bool:
        """Whether the stream is at its end (well or not)."""
        return self._ended.is_set()

    @property
    def completed(self) -> int:
        """The last `completed` that was told, 0 before."""
        return next((x["completed"] for x in reversed(self.lines) if "completed" in x), 0)

    def result(self, timeout: float = TIMEOUT) -> list[Line]:
        """Wait for the end; all lines. Raises TimeoutError."""
        if not self._ended.wait(timeout):
            raise TimeoutError(f"the pull goes on after {timeout} s: {self.lines[-1:]}")
        self._connection.close()
        return self.lines

    def close(self) -> None:
        """Close the request as a client does that was stopped."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(2)
        self._ended.wait(TIMEOUT)
        self._connection.close()

    def _read(self) -> None:
        try:
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                response = self._connection.getresponse()
                self.status = response.status
                for text in response:
                    line = json.loads(text)
                    self.lines.append(line)
                    if self._on_status:
                        self._on_status(line)
        finally:
            self._ended.set()


class Server:
    """A server process of a store; see `EngineServer` and `RealServer`."""

    def __init__(self, store: Path, env: Mapping[str, str] | None = None) -> None:
        """`store` is OLLAMA_MODELS and need not exist; logs and the home lie beside it."""
        self.store = store
        self.port = 0
        self._extra = dict(env or {})
        self._process: commands.Process | None = None
        self._log = store.with_name(store.name + ".log")

    def command(self) -> list[str]:
        """The command line."""
        raise NotImplementedError

    def _begin(self, env: dict[str, str], folder: Path, log: IO[bytes]) -> commands.Process:
        """Start the process."""
        return subprocess.Popen(
            self.command(),
            env=env,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> Self:
        """Start the process; returns at once. `wait_ready` says when its start is over."""
        home = self.store.with_name(self.store.name + ".home")
        home.mkdir(parents=True, exist_ok=True)
        common = {
            "OLLAMA_MODELS": str(self.store),
            "OLLAMA_HOST": "127.0.0.1:0",
            "OLLAMA_NO_CLOUD": "1",
            "HOME": str(home),
            "PATH": os.environ.get("PATH", ""),
        }
        self.port = 0
        with self._log.open("wb") as log:
            self._process = self._begin(common | self._extra, home, log)
        return self

    def wait_ready(self, timeout: float = TIMEOUT) -> Self:
        """Wait for the first HTTP answer: only then the start is over. Raises ServerDiedError."""
        wait_until(self._ready, "an answer of the server", timeout)
        return self

    def _ready(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise ServerDiedError(self.log)
        match = re.search(r"Listening on \S+:(\d+)", self.log)
        if not match:
            return False
        self.port = int(match[1])
        try:
            return self.request("GET", "/")[0] == 200
        except OSError:
            return False

    @property
    def url(self) -> str:
        """The base URL; valid once ready."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The process id. Raises AssertionError before `start`."""
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        """What it has written to stderr since its last start."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def request(
        self, method: str, path: str, body: object = None, timeout: float = TIMEOUT
    ) -> tuple[int, bytes]:
        """One request: (status, body). `body` is sent as it is if bytes, else as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def start_pull(self, model: str, on_status: Callable[[Line], None] | None = None) -> Pull:
        """Begin a pull and return at once."""
        return Pull(self, model, on_status)

    def pull(
        self,
        model: str,
        on_status: Callable[[Line], None] | None = None,
        timeout: float = TIMEOUT,
    ) -> list[Line]:
        """Pull to the end; the lines of the stream, errors included."""
        return self.start_pull(model, on_status).result(timeout)

    def kill(self, number: int = signal.SIGKILL, timeout: float = TIMEOUT) -> int:
        """Send a signal and wait for the end; the return code (-9 after SIGKILL)."""
        assert self._process is not None
        self._process.send_signal(number)
        return self.wait_exit(timeout)

    def wait_exit(self, timeout: float = TIMEOUT) -> int:
        """Wait until the process ends by itself; the return code."""
        assert self._process is not None
        return self._process.wait(timeout)

    def restart(self) -> Self:
        """Kill it, start it anew, wait until it is ready."""
        self.stop()
        return self.start().wait_ready()

    def stop(self) -> None:
        """Make sure that no process is left."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(TIMEOUT)

    def open_files(self) -> dict[str, str]:
        """Files of the store that the process has open: `{relative path: "r" | "w"}`."""
        found = {}
        folder = Path("/proc", str(self.pid), "fd")
        for entry in folder.iterdir():
            with contextlib.suppress(OSError):
                path = Path(os.readlink(entry))
                if path.is_relative_to(self.store) and path.is_file():
                    info = (folder.parent / "fdinfo" / entry.name).read_text()
                    flags = int(re.search(r"flags:\s*(\d+)", info)[1], 8)  # type: ignore[index]
                    mode = "w" if flags & os.O_ACCMODE else "r"
                    found[str(path.relative_to(self.store))] = mode
        return found


class EngineServer(Server):
    """The demo engine. `env` may hold its DEMO_ settings."""

    def _begin(self, env: dict[str, str], folder: Path, log: IO[bytes]) -> commands.Process:
        env |= {"PYTHONPATH": str(ROOT)}
        return commands.start(["serve"], env, cwd=folder, stderr=log, module="watcher.demo.engine")


class RealServer(Server):
    """The real server: the binary that the environment's OLLAMA_BIN names."""

    def command(self) -> list[str]:
        return [os.environ["OLLAMA_BIN"], "serve"]


# Looking at a store


@dataclass(frozen=True)
class Entry:
    """A file or an empty folder of a store: `kind` is "file", "folder" or "link"."""

    kind: str
    size: int = 0
    text: str | None = None
    segments: tuple[tuple[int, int], ...] = ()
    age_seconds: float = field(default=0.0, compare=False)


def tree(store: Path) -> dict[str, Entry]:
    """All files and empty folders below a store, by relative path.

    `text` is the content of files of at most 1 KiB outside of data, `segments` the ranges of a
    download's data that are no holes.
    """
    return dict(sorted(_entries(store, store)))


def _entries(store: Path, folder: Path) -> Iterator[tuple[str, Entry]]:
    for path in sorted(folder.iterdir()):
        name = str(path.relative_to(store))
        info = path.lstat()
        age = time.time() - info.st_mtime
        if path.is_symlink():
            yield name, Entry("link", text=os.readlink(path), age_seconds=age)
        elif path.is_dir():
            inside = list(_entries(store, path))
            yield from inside or [(name, Entry("folder", age_seconds=age))]
        else:
            segments = tuple(data_segments(path)) if name.endswith("-partial") else ()
            small = info.st_size <= 1024 and not segments
            text = path.read_bytes().decode("utf-8", "backslashreplace") if small else None
            yield name, Entry("file", info.st_size, text, segments, age)


def data_segments(path: Path) -> Iterator[tuple[int, int]]:
    """The ranges `(start, end)` of a file that are no holes."""
    with path.open("rb") as file:
        size, end = os.fstat(file.fileno()).st_size, 0
        while end < size:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:
                return
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            yield start, end


def wait_written(path: Path, offsets: Iterable[int], timeout: float = TIMEOUT) -> None:
    """Wait until the byte before each offset has arrived in a download's data.

    Made-up layers hold no zero bytes, so a zero has not been written yet.
    """

    wanted = list(offsets)

    def arrived() -> bool:
        with contextlib.suppress(OSError), path.open("rb") as file:
            last = [os.pread(file.fileno(), 1, offset - 1) for offset in wanted]
            return not {b"", b"\0"} & set(last)
        return False

    wait_until(arrived, f"bytes {wanted} of {path.name}", timeout)


def blob(store: Path, digest: str, suffix: str = "") -> Path:
    """The path of a blob (`sha256:<hex>`), or with a suffix like `-partial-0` beside it."""
    return store / "blobs" / (digest.replace(":", "-") + suffix)


def sidecar(number: int, offset: int, size: int, completed: int) -> str:
    """A sidecar's text as the server writes it."""
    return f'{{"N":{number},"Offset":{offset},"Size":{size},"Completed":{completed}}}\n'


def collapsed(lines: Iterable[Line]) -> list[str]:
    """The statuses of a stream, repetitions left out; an error is `error: …`."""
    told: list[str] = []
    for line in lines:
        text = line["status"] if "status" in line else f"error: {line['error']}"
        if told[-1:] != [text]:
            told.append(text)
    return told
