"""Makes `python -m MODULE` wait, with everything imported, and go on in a child for each order.

Python runs this before the module that it was called for. A child goes on here as if its Python had
just been called so: as a process of its own, with the streams, the environment, the folder, the
mask and the words of its order. Used by `tests.support.commands`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import warnings
from typing import NoReturn


def _become(order: dict[str, object], streams: list[int]) -> None:
    """In the child: be what was ordered."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(3, 1024)
    os.setsid()
    environ = order["environ"]
    assert isinstance(environ, dict)
    os.environ.clear()
    os.environ.update(environ)
    warnings.simplefilter(environ.get("PYTHONWARNINGS", "error"))
    os.umask(int(str(order["umask"])))
    os.chdir(str(order["cwd"]))
    words = order["words"]
    assert isinstance(words, list)
    sys.argv[1:] = words
    _show(words, environ)
    sys.path[:] = [each for each in sys.path if each != os.path.dirname(__file__)]


def _show(words: list[str], environ: dict[str, str]) -> None:
    """Let the system show these words, in place of the long blank one, and this environment."""
    with open("/proc/self/stat", "rb") as file:
        at = list(map(int, file.read().rpartition(b")")[2].split()[45:49]))
    words_at = at[0] + ctypes.string_at(at[0], at[1] - at[0]).index(b" " * 100)
    _put(words, words_at, at[1])
    _put([f"{name}={value}" for name, value in environ.items()], at[2], at[3])


def _put(texts: list[str], start: int, end: int) -> None:
    shown = b"".join(os.fsencode(text) + b"\0" for text in texts)[: end - start - 1]
    ctypes.memmove(start, shown.ljust(end - start, b"\0"), end - start)


def _serve(orders: socket.socket) -> str:
    """Take orders until nobody is left to give any; comes back in the children alone.

    What comes back is the script that an order names in place of the module, or "".
    """
    children: dict[int, tuple[int, int]] = {}
    poll = select.poll()
    poll.register(orders, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready in children:
                pid, told = children.pop(ready)
                poll.unregister(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(BrokenPipeError):
                    os.write(told, b"%d\n" % code)
                os.close(told)
                os.close(ready)
                continue
            raw, descriptors, _, _ = socket.recv_fds(orders, 1 << 20, 4)
            if not raw:
                os._exit(0)
            *streams, told = descriptors
            pid = os.fork()
            if pid == 0:
                orders.detach()
                order = json.loads(raw)
                _become(order, streams)
                return str(order["script"])
            os.write(told, b"%d\n" % pid)
            for stream in streams:
                os.close(stream)
            # The end of a child is seen like an order.
            process = os.pidfd_open(pid)
            children[process] = pid, told
            poll.register(process, select.POLLIN)


def _load(module: str) -> None:
    """Load what a module loads, but not the module: it is yet to be run."""
    if not module.startswith("watcher.demo."):
        from tests.support.loaded import load_all, load_packages

        load_all()
        load_packages()
    runpy.run_module(module, run_name="loaded")


def _run(module: str, script: str) -> NoReturn:
    """Run a module or a script as Python does, but take nothing apart at the end."""
    code: object = 0
    if not sys.flags.safe_path:
        sys.path.insert(0, os.path.dirname(script) if script else os.getcwd())
    try:
        if script:
            runpy.run_path(script, run_name="__main__")
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
    except BaseException as error:
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
        sys.excepthook(type(error), error, error.__traceback__)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if not isinstance(code, int):
        sys.stderr.write(f"{code}\n")
        code = 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = 120
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


_order = os.environ.pop("TESTS_COMMANDS", "").split()
if _order:
    _load(_order[1])
    # What is here lives as long as the children do: their end needn't look through it.
    gc.freeze()
    _run(_order[1], _serve(socket.socket(fileno=int(_order[0]))))
