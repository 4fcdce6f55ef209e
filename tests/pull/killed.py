"""Pulls that end by SIGKILL at a chosen changing call: an order a line of stdin, an answer each.

As `tests/support/breaking.py`: for each order the process forks, and the child breaks.
"""

from __future__ import annotations

from typing import Any

from tests.support.breaking import break_files, main
from tests.support.runs import rules
from watcher.observe.host import Host
from watcher.pull.account import Options
from watcher.pull.driver import Pull
from watcher.pull.target import Target


def _child(order: dict[str, Any], told: int) -> int:
    break_files(order, told)
    where = Target(order["url"], rules(writers_visible=True).settings, Host(order["store"]))
    pull = Pull(where, order["model"], Options(insecure=True))
    for _ in pull.updates():
        pass
    return 0 if pull.end.cause is None else 1


if __name__ == "__main__":
    main(_child)
