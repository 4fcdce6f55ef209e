"""Runs of the program in a test's own process: rules by flat names, one call for one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from watcher.config import Settings
from watcher.decide import modes
from watcher.model import Approve, Mode, Rules, Scope, Space
from watcher.observe.host import Host
from watcher.reconcile import Reconciler, Report, approve_all
from watcher.state.memory import Memory
from watcher.transfer.questions import asking

_OF_MODE = frozenset(Mode._fields) - {"repair", "clean"}


def rules(**given: Any) -> Rules:
    """Rules with some settings, and some of a mode that repairs, by their names."""
    return changed(Rules(mode=Mode(repair=True)), **given)


def changed(base: Rules, **given: Any) -> Rules:
    """Rules with some of their values changed, those that settings and mode share in both."""
    mode = {name: value for name, value in given.items() if name in _OF_MODE}
    both = {name: given[name] for name in ("repair", "clean") if name in given}
    rest = {name: value for name, value in given.items() if name not in _OF_MODE}
    return Rules(replace(base.settings, **rest), base.mode._replace(**mode, **both))


def one_run(
    host: Host,
    by: Rules,
    scope: frozenset[str] | None = None,
    approve: Approve = approve_all,
    *,
    first_look: bool = False,
    lock_seconds: float = 10.0,
    stop: Callable[[], bool] | None = None,
    past: Memory | None = None,
    ended: frozenset[str] = frozenset(),
) -> Report:
    """One run; `past`: what a run before could not write down."""
    host = asking(host)
    reconciler = Reconciler(replace(host, stops=stop) if stop else host, by.settings)
    reconciler._unsaved = past
    mode = by.mode._replace(lock_seconds=lock_seconds, announce=first_look)
    return reconciler.reconcile(mode, Scope(scope, ended), approve)


def one_look(host: Host, by: Rules, scope: frozenset[str] | None = None) -> Report:
    """One look."""
    return Reconciler(host, by.settings).inspect(by.mode, Scope(scope))


def surveyed(host: Host) -> Space:
    """What takes a store's space."""
    space = Reconciler(host, Settings()).inspect(modes.SURVEY).evidence.space
    assert space is not None
    return space
