"""Runs programs of this project: each as a process of its own, without starting Python anew.

A Python that has everything imported waits, and forks for each process (see
`warm/sitecustomize.py`): what a program does, holds and leaves is that of a process, at a tenth of
the time. Where a test wants more than words, an environment, a folder and files to write to, start
Python.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar, Protocol

import watcher

ROOT = Path(watcher.__file__).parents[1]
_WARM = Path(__file__).with_name("warm")
#: Nothing else of Python's or of the language's may be in an order's environment.
_SPECIAL = ("PYTHON", "LC_", "LANG", "MALLOC")
_USUAL = {"PYTHONPATH", "PYTHONWARNINGS", "LC_ALL"}
_TIMEOUT = 120.0
#: For what the system shows of a process: its words, and as much for its environment.
_ROOM = " " * 4000
#: That of the tests, also where one of them names another Python.
_PYTHON = sys.executable

Done = subprocess.CompletedProcess[bytes]


class Process(Protocol):
    """What tests use of a `subprocess.Popen`."""

    @property
    def pid(self) -> int:
        """The process id."""

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; the exit code. Raises subprocess.TimeoutExpired."""

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""

    def kill(self) -> None:
        """End it at once."""


def run(
    words: Sequence[str | bytes],
    env: Mapping[str, str],
    cwd: str | Path | None = None,
    timeout: float = _TIMEOUT,
    **program: str,
) -> Done:
    """Run ``python -m watcher WORDS``, which is ``ollama-watch WORDS``, to its end.

    `program`: another module or a script, as for `start`. Raises subprocess.TimeoutExpired.
    """
    with contextlib.ExitStack() as stack:
        out, err = (stack.enter_context(open(os.memfd_create(name), "w+b")) for name in "12")
        process = start(words, env, cwd=cwd, stdout=out, stderr=err, **program)
        try:
            code = process.wait(timeout)
        except BaseException:
            process.kill()
            process.wait()
            raise
        for file in (out, err):
            file.seek(0)
        return Done(list(words), code, out.read(), err.read())


def start(
    words: Sequence[str | bytes],
    env: Mapping[str, str],
    *,
    cwd: str | Path | None = None,
    stdout: IO[bytes] | None = None,
    stderr: IO[bytes] | None = None,
    module: str = "watcher",
    script: str = "",
) -> Process:
    """Start ``python -m MODULE WORDS``, or ``python SCRIPT WORDS``, in a session of its own.

    What it writes goes to files.
    """
    given = [os.fsdecode(word) for word in words]
    with open(os.devnull, "r+b") as nowhere:
        streams = [nowhere, stdout or nowhere, stderr or nowhere]
        if _may_fork(env):
            order = {"words": given, "environ": dict(env), "script": script}
            order["cwd"] = os.fspath(cwd or os.getcwd())
            return _Forking.of(module).start(order, streams)
        return subprocess.Popen(
            [
                *(sys.executable, "-W", env.get("PYTHONWARNINGS", "error")),
                *((script,) if script else ("-m", module)),
                *given,
            ],
            env=env,
            cwd=cwd,
            stdin=streams[0],
            stdout=streams[1],
            stderr=streams[2],
            start_new_session=True,
        )


def _may_fork(env: Mapping[str, str]) -> bool:
    special = {name for name in env if name.startswith(_SPECIAL)}
    first = env.get("PYTHONPATH", "").partition(os.pathsep)[0]
    ours = first == str(ROOT) and env.get("LC_ALL", "C.UTF-8") == "C.UTF-8"
    return special <= _USUAL and ours and os.geteuid() == os.getuid()


class _Forking:
    """A Python that waits for orders to run a module, and ends with this process."""

    _made: ClassVar[dict[tuple[int, str], _Forking]] = {}

    @classmethod
    def of(cls, module: str) -> _Forking:
        """That of this process."""
        key = os.getpid(), module
        if key not in cls._made:
            cls._made[key] = cls(module)
        return cls._made[key]

    def __init__(self, module: str) -> None:
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environ = {
            "PATH": os.environ.get("PATH", ""),
            "PYTHONPATH": f"{_WARM}{os.pathsep}{ROOT}",
            "LC_ALL": "C.UTF-8",
            "TESTS_COMMANDS": f"{theirs.fileno()} {module}{_ROOM}",
        }
        with theirs:
            self._process = subprocess.Popen(
                [_PYTHON, "-W", "error", "-m", module, _ROOM],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def start(self, order: dict[str, Any], streams: list[IO[bytes]]) -> _Forked:
        mask = os.umask(0o022)
        os.umask(mask)
        order["umask"] = mask
        answers, theirs = os.pipe()
        numbers = [*(stream.fileno() for stream in streams), theirs]
        try:
            socket.send_fds(self._orders, [json.dumps(order).encode()], numbers)
        finally:
            os.close(theirs)
        return _Forked(answers, order["words"])


class _Forked:
    """A child of such a Python: see `Process`.

    Its answers are two lines, the process id and, at the end, the exit code.
    """

    def __init__(self, answers: int, words: list[str]) -> None:
        self._answers, self._words, self._text = answers, words, b""
        self._code: int | None = None
        self._ready = select.poll()
        self._ready.register(answers, select.POLLIN)
        while b"\n" not in self._text:
            self._read()
        self.pid = int(self._text.split(b"\n")[0])

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        until = None if timeout is None else time.monotonic() + timeout
        while self._code is None:
            # Both lines may have come at once.
            if self._text.count(b"\n") == 2:
                self._code = int(self._text.split()[1])
                os.close(self._answers)
                break
            left = None if until is None else max(0.0, until - time.monotonic()) * 1000
            if not self._ready.poll(left):
                raise subprocess.TimeoutExpired(self._words, timeout or 0.0)
            self._read()
        return self._code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _read(self) -> None:
        more = os.read(self._answers, 100)
        assert more, "the Python that runs commands has died"
        self._text += more
