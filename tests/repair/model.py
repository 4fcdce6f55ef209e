"""A server's part in a download's history, by what `docs/store.md` says of it, in small.

All sizes are cut down together (`small_scale`): what is 1 MiB to the package is 64 KiB here, so
that a history of many kills and repairs costs nothing. Files are real and sparse.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.notation import Store, digest_of
from tests.support.runs import changed, one_run, rules
from watcher import reconcile
from watcher.model import Part, Ranges
from watcher.observe import parts
from watcher.observe.host import Host
from watcher.ollama import ranges, sidecars
from watcher.reconcile import Report
from watcher.state import fs

K = 1024
#: What stands for 1 MiB, and the part size of the rule: its borders lie within blocks.
HEAD = 64 * K
STEP = 400_100
BLOCK = 4096
PAGE = b"<html>502 Bad Gateway</html>\n"
POLICY = rules(repair=True, clean=False, hash=True, repair_stale=True, refresh=True)
#: From a power cut to our next look: times are old enough to be set anew.
AN_HOUR = 3600


def small_scale(patch: pytest.MonkeyPatch) -> None:
    """Cut all sizes down; fsync, which only costs here, does nothing."""
    patch.setattr(sidecars, "MIB", HEAD)
    patch.setattr(sidecars, "DOUBTED_HEAD", HEAD)
    patch.setattr(parts, "ZEROS_ENOUGH", 16 * HEAD)
    patch.setattr(parts, "_CHUNK", HEAD)
    patch.setattr(sidecars, "_SMALLEST_PART", STEP)
    patch.setattr(sidecars, "_LARGEST_PART", 10 * STEP)
    patch.setattr(sidecars, "_SMALLEST_CUT", 2 * HEAD)
    patch.setattr(fs, "sync", lambda _: None)
    patch.setattr(os, "fsync", lambda _: None)


def small_rule(total: int) -> list[Part]:
    """The part rule in small, written down again."""
    step = min(max(total // 16, STEP), 10 * STEP)
    return [Part(n, at, min(step, total - at), 0) for n, at in enumerate(range(0, total, step))]


@dataclass
class History:
    """One download, what a server makes of it, and our repairs in between."""

    store: Store
    total: int
    seed: int
    told: list[str] = field(default_factory=list)
    lost: bool = False
    #: Error pages that began where nobody knows that a part had come to: see `forgiven`.
    _hidden: Ranges = ()
    #: How far each part had come when we looked last, by offset.
    _seen: dict[int, int] = field(default_factory=dict)
    #: Seconds by which the machine is ahead of the files, since its last start.
    _later: float = 0.0

    def __post_init__(self) -> None:
        chance = random.Random(self.seed)
        self.content = chance.randbytes(self.total).replace(b"\0", b"\1")
        self.digest = digest_of(self.content)
        self.data = self.store.blobs / f"sha256-{self.digest}-partial"
        self.begin()

    # ------------------------------------------------------------ the server

    def path(self, number: int) -> Path:
        """A sidecar."""
        return self.data.with_name(f"{self.data.name}-{number}")

    def sidecars(self) -> dict[int, Part]:
        """What stands in the sidecars, by the numbers in their names."""
        found = {}
        for path in self.data.parent.glob(f"{self.data.name}-*"):
            found[int(path.name.rsplit("-", 1)[1])] = sidecars.parse(path.read_bytes())
        return found

    def begin(self) -> None:
        """No sidecar at all: they are written by the part rule, the data keeps what it has."""
        for part in small_rule(self.total):
            self.path(part.number).write_bytes(sidecars.write(part))
        with self.data.open("ab") as file:
            file.truncate(self.total)

    def resume(self) -> None:
        """A pull begins: without a single sidecar by the part rule. A wrong total cuts the data."""
        found = self.sidecars()
        if not found:
            self.told.append("begins at 0")
            self.begin()
            return
        with self.data.open("ab") as file:
            file.truncate(sum(part.size for part in found.values()))

    def attempt(self, number: int, end: str, length: int) -> None:
        """One attempt of a part, from Offset + Completed, that gets `length` bytes far.

        killed and reset: bytes that no sidecar tells of. cancelled: the sidecar tells them. well:
        to the part's end. page: an error page instead of bytes, less than 1 MiB.
        """
        part = self.sidecars()[number]
        start = part.starts_at
        stop = part.end if end == "well" else min(part.end, start + length)
        self.told.append(f"part {number} {end} [{start}, {stop}) of [{part.offset}, {part.end})")
        with self.data.open("r+b") as file:
            file.seek(start)
            if end == "page":
                stop = min(stop, start + HEAD - 1)
                file.write((PAGE * (HEAD // len(PAGE) + 1))[: stop - start])
                if self._seen.get(part.offset) != part.completed:
                    self._hidden = ranges.union(self._hidden, ((start, stop),))
                return
            file.write(self.content[start:stop])
            self._hidden = ranges.difference(self._hidden, ((start, stop),))
        if end in ("well", "cancelled"):
            done = part._replace(completed=stop - part.offset)
            self.path(number).write_bytes(sidecars.write(done))

    def lose(self, *numbers: int) -> None:
        """Sidecars are gone."""
        self.told.append(f"lost {numbers}")
        self.lost = True
        for number in numbers:
            self.path(number).unlink()

    def start_over(self) -> bool:
        """Somebody removes all of it, and a pull begins anew; whether the inode has come back."""
        self.told.append("removed, and pulled anew")
        inode = self.data.stat().st_ino
        for path in self.data.parent.glob(f"{self.data.name}*"):
            path.unlink()
        self._hidden, self._seen = (), {}
        made = [self.data.with_name(f"other{number}") for number in range(64)]
        for path in made:
            path.touch()
            if path.stat().st_ino == inode:
                path.rename(self.data)
        for path in made:
            path.unlink(missing_ok=True)
        self.begin()
        return self.data.stat().st_ino == inode

    def power_cut(self, blocks: Iterable[int]) -> None:
        """The machine starts anew; of these blocks what was written has not reached the disk."""
        with self.data.open("r+b") as file:
            held = parts.segments(file.fileno(), self.total)
            lost = ranges.normal((at * BLOCK, (at + 1) * BLOCK) for at in blocks)
            lost = ranges.intersection(held, lost)
            for start, end in lost:
                os.pwrite(file.fileno(), bytes(end - start), start)
        self.told.append(f"power cut, zeros at {lost}")
        self._later += AN_HOUR
        started = int(time.time() + self._later - AN_HOUR / 2)
        machine = Path(self.store.host().proc)
        (machine / "stat").write_text(f"cpu 0 0 0 0\nbtime {started}\n")

    # ------------------------------------------------------------ us

    def _host(self) -> Host:
        return self.store.host(clock=lambda: time.time() + self._later)

    def repair(self) -> Report:
        """A whole cycle of ours."""
        self.told.append("repair")
        report = one_run(self._host(), POLICY)
        self._note()
        return report

    def look(self) -> None:
        """A look of the service that agrees to nothing."""
        self.told.append("look")
        one_run(self._host(), POLICY, approve=reconcile.approve_none)
        self._note()

    def keep_fresh(self) -> Report:
        """Our setting of times alone, as before the server's start."""
        self.told.append("times set")
        report = one_run(self._host(), changed(POLICY, repair=False, hash=False))
        self._note()
        return report

    def _note(self) -> None:
        self._seen = {part.offset: part.completed for part in self.sidecars().values()}

    def claimed(self) -> Ranges:
        """What the sidecars claim."""
        return sidecars.claims(list(self.sidecars().values()))

    def false_claims(self) -> list[tuple[int, int]]:
        """Claimed ranges that are not the true bytes."""
        with self.data.open("rb") as file:
            return list(self._wrong(file.fileno()))

    def _wrong(self, fd: int) -> Iterator[tuple[int, int]]:
        for start, end in self.claimed():
            found = os.pread(fd, end - start, start)
            if found != self.content[start:end]:
                wrong = [
                    (at, at + 1)
                    for at in range(start, end)
                    if found[at - start : at - start + 1] != self.content[at : at + 1]
                ]
                yield from ranges.normal(wrong)

    def forgiven(self, start: int, end: int) -> bool:
        """Whether a false claim is the one that nothing on the disk could have told.

        A part was resumed from a progress that only its sidecar knew, an error page came there,
        and then the sidecar was lost before anybody looked.
        """
        return self.lost and not ranges.difference(((start, end),), self._hidden)

    def __str__(self) -> str:
        return "\n".join((f"seed {self.seed}, {self.total} bytes", *self.told))
