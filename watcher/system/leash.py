"""Processes that a daemon starts, each on a leash: it ends with its stdin, which the daemon holds.

The daemon's user may be unable to start this Python again: root may run us from an installation
that only root can read, and continues as the owner of a store. A fork has what is loaded by then.
But a process with threads can't be forked safely. So one child is forked before the first thread
starts, and forks again at each request.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

from watcher.system import privileges

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LONGEST_MESSAGE = 64


def starter(run: Sequence[str] | Starter) -> Callable[[], Started | subprocess.Popen[bytes]]:
    """What starts a process: by its command line, or in another way. It raises OSError."""
    return run if isinstance(run, Starter) else partial(_started, run)


def _started(words: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        words,
        # The folder that a daemon was started in holds none of its modules.
        env={**privileges.handed_on(), "PYTHONSAFEPATH": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # Ctrl-C is for the daemon alone: a second signal would end it in the middle.
        start_new_session=True,
    )


class Started:
    def __init__(self, pid: int, stdin: int, stdout: int, requests: socket.socket) -> None:
        self.pid = pid
        self.stdin = open(stdin, "wb", buffering=0)  # noqa: SIM115
        self.stdout = open(stdout, "rb")  # noqa: SIM115
        self._requests = requests
        self._code: int | None = None

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        self.stdin.close()
        self.stdout.close()

    def wait(self) -> int:
        """The exit code, negative for a signal, once it has ended."""
        if self._code is None:
            answer = self._requests.recv(_LONGEST_MESSAGE)
            self._code = int(answer) if answer else -signal.SIGKILL
        return self._code

    def kill(self) -> None:
        if self._code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class Starter:
    """Starts one process at a time; each runs a function of ours and ends."""

    def __init__(self, run: Callable[[], int]) -> None:
        """Before the first thread. `run` gives the exit code; stdin and stdout are pipes then."""
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._child = os.fork()
        if self._child == 0:
            self._requests.close()
            _serve(theirs, run)
        theirs.close()

    def __call__(self) -> Started:
        """Start a process. Raises OSError."""
        with contextlib.ExitStack() as opened:
            (their_stdin, stdin), (stdout, their_stdout) = os.pipe(), os.pipe()
            for fd in (their_stdin, their_stdout):
                opened.callback(os.close, fd)
            with contextlib.ExitStack() as kept:
                kept.callback(os.close, stdin)
                kept.callback(os.close, stdout)
                socket.send_fds(self._requests, [b"start"], [their_stdin, their_stdout])
                answer = self._requests.recv(_LONGEST_MESSAGE)
                if not answer:
                    raise OSError(errno.ECHILD, "the process that starts it ended")
                kept.pop_all()
            return Started(int(answer), stdin, stdout, self._requests)

    def close(self) -> None:
        self._requests.close()
        os.waitpid(self._child, 0)


def _serve(requests: socket.socket, run: Callable[[], int]) -> NoReturn:
    """The life of the child that forks, until its parent is gone."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        while fds := socket.recv_fds(requests, _LONGEST_MESSAGE, 2)[1]:
            child = os.fork()
            if child == 0:
                requests.close()
                _live(fds, run)
            for fd in fds:
                os.close(fd)
            requests.send(b"%d" % child)
            _, status = os.waitpid(child, 0)
            requests.send(b"%d" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _live(fds: list[int], run: Callable[[], int]) -> NoReturn:
    """The life of a process that was requested. It has no capabilities, as after an exec."""
    code = 1
    try:
        privileges.give_up()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.setsid()
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
            os.close(fd)
        code = run()
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
