"""The honest way: the command itself, killed by the kernel at each of its changing system calls."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.breaking import REFUSED
from tests.support.driving import HealthyStore, command, environment
from tests.support.workers import ALONE

from .acts import ACTS, QUARANTINED, Layer
from .conftest import Driver
from .test_every_act import Trial, layer, model, registry
from .test_every_call import assert_settled, places, shape

__all__ = ["layer", "model", "registry"]

#: System calls that change a file, or bring a change to the disk.
CALLS = [
    *("rename", "renameat", "renameat2", "unlink", "unlinkat", "link", "linkat"),
    *("mkdir", "mkdirat", "rmdir", "openat", "write", "pwrite64"),
    *("fsync", "fdatasync", "ftruncate", "fchmod", "fchown"),
]


def _works() -> bool:
    """Whether strace is there and may trace."""
    if shutil.which("strace") is None:
        return False
    return (
        subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True).returncode == 0
    )


pytestmark = pytest.mark.skipif(not _works(), reason="strace is missing, or may not trace")


def _store(path: Path) -> HealthyStore:
    """A store with something to clean; named after its folder, since who opens a file of that name
    counts as its holder in any store, and two stores are treated at once.
    """
    store = HealthyStore(path)
    store.download("a young download", aged=3600)
    store.download(f"stale {path.name}", parts=2)
    return store


def _traced(
    store: HealthyStore, words: Sequence[str], *options: str
) -> subprocess.CompletedProcess[str]:
    """A command of ours under strace."""
    return subprocess.run(
        [*ALONE, "strace", "-y", *options, *command(store.path, "--json", *words)],
        # Byte code that only the first run writes would shift the count of the later ones.
        env=environment(store.path, {"PYTHONDONTWRITEBYTECODE": "1"}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def _calls(store: HealthyStore, words: Sequence[str], log: Path) -> dict[tuple[str, int], str]:
    """Run a command to its end; the calls by which it has changed the store, as `_changing`."""
    done = _traced(store, words, "-o", str(log), "-e", f"trace={','.join(CALLS)}")
    assert done.returncode == 0, done.stdout + done.stderr
    calls = _changing(log, store)
    assert {name for name, _ in calls} >= {"openat", "write", "mkdirat", "unlinkat"}
    return calls


def _kill(store: HealthyStore, words: Sequence[str], call: tuple[str, int]) -> str:
    """Run a command until the kernel kills it at a call; where that was."""
    name, number = call
    inject = ["-e", f"trace={name}", "-e", f"inject={name}:signal=KILL:when={number}"]
    where = f"killed at {name} number {number}"
    ended = _traced(store, words, "-o", "/dev/null", *inject)
    # How many files are opened before it depends on who else runs on the machine.
    assert ended.returncode in (-9, 137) or name == "openat", f"{where}: it did not come"
    return where


def _changing(log: Path, store: HealthyStore) -> dict[tuple[str, int], str]:
    """Of a recorded run the calls that change the store: which call, and its how-manieth it is.

    Each with its words, as those of `Breaking`.
    """
    counts: Counter[str] = Counter()
    shown: list[str] = []
    found: list[tuple[str, int]] = []
    for line in log.read_text().splitlines():
        match = re.match(r"(?:\d+ +)?(\w+)\((.*)", line)
        if match is None:
            continue
        name, words = match.groups()
        counts[name] += 1
        if words.startswith(("1<", "2<")) or (name == "openat" and "O_CREAT" not in words):
            continue
        if str(store.path) in words:
            target = re.findall(r"[\w.@-]+(?=[\">])", words.split(", 0", 1)[0])
            refused = REFUSED if " = -1 " in words else ""
            shown.append(f"{name} {target[-1] if target else ''}{refused}")
            found.append((name, counts[name]))
    return {found[at - 1]: shown[at - 1] for at in places(shown, "kill")}


def test_killed_at_any_system_call_the_next_run_comes_to_the_same_end(
    tmp_path: Path, driver: Driver, slow: bool
) -> None:
    """Before the first intent: at the first system call of each name; from it on at every second.

    With `--slow` at each one; each call of ours to the file system breaks beside this.
    """
    words = ("clean", "--yes")
    reference = _store(tmp_path / "reference")
    found = _calls(reference, words, tmp_path / "strace")
    calls, acts = list(found), list(found.values()).index("mkdirat intents")
    of_each_name = {call[0]: call for call in reversed(calls)}.values()
    before = calls[:acts] if slow else [each for each in calls[:acts] if each in of_each_name]
    end = shape(reference)

    def killed(call: tuple[str, int]) -> tuple[str, HealthyStore]:
        store = _store(tmp_path / f"{call[0]}{call[1]}")
        return _kill(store, words, call), store

    with ThreadPoolExecutor(2) as pool:
        for where, store in pool.map(killed, before + calls[acts :: 1 if slow else 2]):
            again = driver.cycle(store)
            assert again.code == 0, f"{where}: {driver.errors}"
            assert shape(store) == end, where
            assert_settled(store, where)


@pytest.mark.slow("a traced process for each system call of each act")
@pytest.mark.parametrize(
    "name", ["behind", "a-strange-number", "redundant", "quarantine", "restore", "purge", "prepare"]
)
def test_every_other_act_killed_at_any_system_call_comes_to_the_same_end(
    name: str, tmp_path: Path, driver: Driver, layer: Layer
) -> None:
    """One after another: it is the same layer in each store."""
    trial = Trial(tmp_path, driver, ACTS[name], layer)
    words = list(ACTS[name].words)
    if words[0] == "quarantine":
        words += [f"{QUARANTINED}{layer.digest}", "--yes"]
    elif words[0] == "repair":
        words += [layer.digest, "--yes"]
    for call in _calls(trial.store(), words, tmp_path / "strace"):
        store = trial.store()
        trial.assert_same_end(store, _kill(store, words, call))
        shutil.rmtree(store.path)
