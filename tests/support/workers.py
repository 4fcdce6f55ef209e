"""Tests side by side: how many workers, and that each sees the processes of its own tests alone.

Tests wait more than they compute, so there are more workers than cores. Each runs in a PID
namespace with a `/proc` of its own: what the tests beside it start can't be seen, found or
signalled from there. An ordinary user gets that by a user namespace, in which they stay who
they are. Where neither is allowed, one worker does everything, one test after the other.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import execnet

PER_CORE, AT_LEAST, AT_MOST = 3, 4, 12
_NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
#: Process 1 of a namespace waits for what others leave behind; a test process does not.
_INIT = ("sh", "-c", '"$@"; exit $?', "init")


def _alone() -> tuple[str, ...]:
    """Before a command: it sees its own children alone. Nothing where that can't be had."""
    if shutil.which("unshare") is None:
        return ()
    own = () if os.geteuid() == 0 else ("--user", "--map-current-user")
    words = (*_NAMESPACE[:1], *own, *_NAMESPACE[1:])
    return words if subprocess.run([*words, "true"], capture_output=True).returncode == 0 else ()


ALONE = _alone()


# Hooks of pytest and of xdist, for the conftest.


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite and folders of it take workers, unless somebody says how many."""
    given = getattr(config.option, "numprocesses", 0) is not None
    # A worker takes none itself.
    if not given and not hasattr(config, "workerinput") and ALONE and _everything(config):
        workers = PER_CORE * len(os.sched_getaffinity(0))
        config.option.numprocesses = max(AT_LEAST, min(workers, AT_MOST))
        config.option.dist = "worksteal"


def _everything(config: pytest.Config) -> bool:
    return not any(os.path.isfile(each.partition("::")[0]) for each in config.args)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs: list[execnet.XSpec]) -> None:
    """Start each worker in namespaces of its own."""
    python = shlex.join([*ALONE, *_INIT, sys.executable])
    specs[:] = [type(spec)(f"{spec}//id={spec.id}//python={python}") for spec in specs]


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Import the modules of tests, in each worker from another one on.

    Their assertions are rewritten once: what one worker has written the others read. Where Python
    is told to write none, it writes those.
    """
    gc.disable()  # nothing of what is made now goes before the end
    given = getattr(session.config, "workerinput", None)
    if given is None:
        return
    sys.dont_write_bytecode = False
    root = session.config.rootpath
    paths = sorted(
        path for each in session.config.args for path in Path(root, each).rglob("test_*.py")
    )
    first = len(paths) * int(given["workerid"].removeprefix("gw")) // int(given["workercount"])
    for path in paths[first:] + paths[:first]:
        # What can't be imported is reported when it is collected.
        with contextlib.suppress(Exception, pytest.skip.Exception):
            importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))


def pytest_collection_finish() -> None:
    """Look no more for garbage among the tests, neither here nor in what is forked from here."""
    gc.freeze()
    gc.enable()
