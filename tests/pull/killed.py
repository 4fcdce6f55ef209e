"""Pulls that end by SIGKILL at a chosen changing call: an order a line of stdin, an answer each.

As `tests/crash/driver.py`: for each order the process forks, and the child breaks.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

from tests.crash.driver import break_files
from watcher.model import Policy
from watcher.pull.driver import Options, Pull, Site
from watcher.world import World


def _child(order: dict[str, Any], told: int) -> int:
    break_files(order, told)
    where = Site(order["url"], Policy(writers_visible=True), World(order["store"]))
    pull = Pull(where, order["model"], Options(insecure=True))
    for _ in pull.updates():
        pass
    return 0 if pull.end.cause is None else 1


def _run(order: dict[str, Any]) -> dict[str, Any]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        code = 70
        try:
            code = _child(order, writer)
        except Exception:  # told by the exit code and on stderr
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as calls:
        made = calls.read().splitlines()
    _, status = os.waitpid(pid, 0)
    return {"exit": os.waitstatus_to_exitcode(status), "calls": made}


if __name__ == "__main__":
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_run(json.loads(line))) + "\n")
        sys.stdout.flush()
