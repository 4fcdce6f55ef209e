"""Runs our command line: each time as a process of its own, without starting Python anew.

A Python that has everything imported waits, and forks for each command (see
`warm/sitecustomize.py`): what a command does, holds and leaves is that of a process, at a tenth of
the time. Where a test wants more than words, an environment and a folder, Python is started.
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

import watcher

ROOT = Path(watcher.__file__).parents[1]
_WARM = Path(__file__).with_name("warm")
#: Nothing else of Python's or of the language's may be in an order's environment.
_USUAL = {"PYTHONPATH": None, "PYTHONWARNINGS": "error", "LC_ALL": "C.UTF-8"}
_TIMEOUT = 60.0

Done = subprocess.CompletedProcess[bytes]


def run(
    words: Sequence[str | bytes],
    env: Mapping[str, str],
    cwd: str | Path | None = None,
    timeout: float = _TIMEOUT,
) -> Done:
    """Run ``ollama-watch WORDS`` to its end. Raises subprocess.TimeoutExpired."""
    given = list(map(os.fsdecode, words))
    if _may_fork(env):
        return _Forking.of_this_process().run(given, env, os.fspath(cwd or os.getcwd()), timeout)
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "watcher", *given],
        env=env,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=timeout,
        check=False,
    )


def _may_fork(env: Mapping[str, str]) -> bool:
    special = {name for name in env if name.startswith(("PYTHON", "LC_", "LANG", "MALLOC"))}
    usual = {name for name in special if name in _USUAL and _USUAL[name] in (None, env[name])}
    return special == usual and os.geteuid() == os.getuid()


class _Forking:
    """A Python that waits for orders, and ends with this process."""

    _made: _Forking | None = None

    @classmethod
    def of_this_process(cls) -> _Forking:
        if cls._made is None or cls._made.pid != os.getpid():
            cls._made = cls()
        return cls._made

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environ = {
            "PATH": os.environ.get("PATH", ""),
            "PYTHONPATH": f"{_WARM}{os.pathsep}{ROOT}",
            "LC_ALL": "C.UTF-8",
            "TESTS_COMMANDS": str(theirs.fileno()),
        }
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "error", "-m", "watcher"],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def run(self, words: list[str], env: Mapping[str, str], cwd: str, timeout: float) -> Done:
        mask = os.umask(0o022)
        os.umask(mask)
        order = {"words": words, "environ": dict(env), "cwd": cwd, "umask": mask}
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(os.memfd_create(name), "w+b")) for name in ("1", "2")]
            stdin = stack.enter_context(open(os.devnull, "rb"))
            told, tells = os.pipe()
            answers = stack.enter_context(open(told, "rb", buffering=0))
            streams = [stdin.fileno(), *(file.fileno() for file in files)]
            try:
                socket.send_fds(self._orders, [json.dumps(order).encode()], [*streams, tells])
            finally:
                os.close(tells)
            code = _code(answers.fileno(), words, timeout)
            for file in files:
                file.seek(0)
            return Done(words, code, files[0].read(), files[1].read())


def _code(answers: int, words: list[str], timeout: float) -> int:
    """The exit code, which comes on a line after the one with the process id."""
    until, told = time.monotonic() + timeout, b""
    while told.count(b"\n") < 2:
        ready = select.select([answers], [], [], max(0.0, until - time.monotonic()))[0]
        if not ready:
            os.kill(int(told.split(b"\n")[0]), signal.SIGKILL)
            raise subprocess.TimeoutExpired(words, timeout)
        more = os.read(answers, 100)
        assert more, "the Python that runs commands has died"
        told += more
    return int(told.split()[1])
