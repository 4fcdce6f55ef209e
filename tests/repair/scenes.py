"""Downloads of a registry's layer in every state that a real server leaves, or that befalls one.

Each state is laid out from the true bytes, so that a pull can end it, and says how many bytes are
missing at most: what a pull after a repair may download is that and 1.1 MiB a part.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.driving import run
from tests.support.notation import age
from tests.support.servers import Server, blob, collapsed, sidecar
from watcher.demo.registry import Content, Layer, Model, Registry

MB = 1_000_000
MIB = 1 << 20
#: Three parts by the server's own rule; what is present of each: whole, half, a little.
SIZE = 209 * MB
PART = 100 * MB
PRESENT = (PART, 6 * MB, 3 * MB)
HOUR = 3600


@dataclass
class Download:
    """The files of one download, to break."""

    store: Path
    model: Model
    content: Content
    #: How far each part has come, on the disk and in its sidecar.
    present: tuple[int, ...] = PRESENT
    claimed: tuple[int, ...] = (0, 0, 0)
    #: Bytes that a pull downloads by right, where the presence above does not say it.
    costs: int | None = None

    @property
    def digest(self) -> str:
        """`sha256:…`."""
        return self.content.digest

    @property
    def data(self) -> Path:
        """The data file."""
        return blob(self.store, self.digest, "-partial")

    @property
    def blob(self) -> Path:
        """The finished blob, where its pull has come to its end."""
        return blob(self.store, self.digest)

    def part(self, number: int | str) -> Path:
        """A sidecar."""
        return blob(self.store, self.digest, f"-partial-{number}")

    def texts(self) -> dict[str, bytes]:
        """The sidecars as they stand, by name."""
        found = self.data.parent.glob(f"{self.data.name}-*")
        return {path.name: path.read_bytes() for path in found}

    @property
    def missing(self) -> int:
        """Bytes that a pull has to download."""
        return SIZE - sum(self.present) if self.costs is None else self.costs

    def lay_out(self, aged: float = 600) -> None:
        """Write data and sidecars."""
        self.data.parent.mkdir(parents=True, exist_ok=True)
        with self.data.open("wb") as file:
            file.truncate(SIZE)
            for number, length in enumerate(self.present):
                file.seek(number * PART)
                length = min(length, SIZE - number * PART)
                file.writelines(self.content.slices(number * PART, number * PART + length))
        for number, done in enumerate(self.claimed):
            size = min(PART, SIZE - number * PART)
            text = sidecar(number, number * PART, size, min(done, size))
            self.part(number).write_text(text)
        self.aged(aged)

    def aged(self, seconds: float) -> None:
        """Set the times of all files back."""
        for path in self.data.parent.glob(f"{self.data.name}*"):
            age(path, seconds)

    def copied(self, sparse: str) -> None:
        """The data is a copy, with all zeros as holes (`always`) or without any (`never`)."""
        with self.data.open("rb") as source, self.data.with_suffix(".copy").open("wb") as copy:
            while piece := source.read(1 << 20):
                if sparse == "always" and not piece.strip(b"\0"):
                    copy.seek(len(piece), os.SEEK_CUR)
                else:
                    copy.write(piece)
            copy.truncate(SIZE)
        os.replace(self.data.with_suffix(".copy"), self.data)


def seed_of(folder: Path) -> int:
    """Another layer for each run: who has a file of its name open holds it in any store."""
    return zlib.crc32(str(folder).encode())


def finished(server: Server, registry: Registry, *, right: bool) -> Download:
    """A layer that was killed, repaired and then pulled to its end; the server is stopped.

    Not `right`: some bytes of the blob are wrong, though its pull has ended well.
    """
    layer = Layer(SIZE, seed=seed_of(server.store))
    model = registry.add_model("demo", "1b", [layer], extras=False)
    it = Download(server.store, model, registry.content(model.digests[0]))
    STATES["killed"](it)
    assert run(it.store, "repair", "--yes").returncode == 0
    server.start().wait_ready()
    assert collapsed(server.pull(model.name))[-1] == "success"
    server.stop()
    if not right:
        with it.blob.open("r+b") as file:
            file.seek(70_000_000)
            file.write(b"\0" * 5000)
    return it


Break = Callable[[Download], None]
STATES: dict[str, Break] = {}


def state(function: Break) -> Break:
    """Name a state after its function."""
    STATES[function.__name__.strip("_").replace("_", "-")] = function
    return function


@state
def _killed(it: Download) -> None:
    it.lay_out()


@state
def _terminated(it: Download) -> None:
    it.claimed = PRESENT
    it.lay_out()


@state
def _terminated_while_it_wrote(it: Download) -> None:
    it.claimed = PART, 0, 3 * MB
    it.lay_out()
    it.part(0).write_bytes(b"")


@state
def _first_missing(it: Download) -> None:
    it.lay_out()
    it.part(0).unlink()


@state
def _middle_missing(it: Download) -> None:
    it.lay_out()
    it.part(1).unlink()


@state
def _last_missing(it: Download) -> None:
    it.lay_out()
    it.part(2).unlink()


@state
def _empty(it: Download) -> None:
    it.claimed = PRESENT
    it.lay_out()
    it.part(1).write_bytes(b"")


@state
def _braces(it: Download) -> None:
    it.claimed = PRESENT
    it.lay_out()
    it.part(1).write_text("{}")


@state
def _all_lost(it: Download) -> None:
    it.claimed = ()
    it.lay_out()


@state
def _data_missing(it: Download) -> None:
    it.claimed, it.costs = PRESENT, SIZE
    it.lay_out()
    it.data.unlink()


@state
def _data_short(it: Download) -> None:
    it.claimed, it.costs = PRESENT, SIZE - PART
    it.lay_out()
    os.truncate(it.data, PART)
    it.aged(600)


@state
def _whole_and_claimed(it: Download) -> None:
    it.present = it.claimed = PART, PART, 9 * MB
    it.lay_out()


@state
def _whole_without_sidecars(it: Download) -> None:
    it.present, it.claimed = (PART, PART, 9 * MB), ()
    it.lay_out()


@state
def _whole_with_sidecars_at_0(it: Download) -> None:
    it.present = PART, PART, 9 * MB
    it.lay_out()


@state
def _whole_and_wrong_at_a_start(it: Download) -> None:
    """An error page lies at the start of a part that was there before."""
    it.present = PART, PART, 9 * MB
    it.lay_out()
    with it.data.open("r+b") as file:
        file.seek(PART)
        file.write(b"<html>" * 1000)
    it.aged(600)


@state
def _higher_numbers(it: Download) -> None:
    it.lay_out()
    for number in (3, 7, 40):
        it.part(number).write_text(sidecar(number, PART, PART, 0))
    it.aged(600)


@state
def _a_strange_tail(it: Download) -> None:
    it.lay_out()
    it.part("0.bak").write_text(sidecar(0, 0, PART, 0))
    it.aged(600)


@state
def _more_than_a_thousand(it: Download) -> None:
    it.lay_out()
    step = SIZE // 1100
    for number in range(1100):
        size = step if number < 1099 else SIZE - 1099 * step
        it.part(number).write_text(sidecar(number, number * step, size, 0))
    it.costs = SIZE - PART + MIB * 2
    it.aged(600)


@state
def _another_number_inside(it: Download) -> None:
    it.lay_out()
    it.part(1).write_text(sidecar(2, PART, PART, 0))
    it.aged(600)


@state
def _of_another_total(it: Download) -> None:
    """The sidecars of one part each are of a shorter layer."""
    it.lay_out()
    it.part(2).write_text(sidecar(2, 2 * PART, 5 * MB, 0))
    it.aged(600)


@state
def _claims_in_holes(it: Download) -> None:
    """A copy has made holes of real zeros of the content."""
    it.claimed = PRESENT
    it.lay_out()
    it.copied("always")
    it.aged(600)


@state
def _without_holes(it: Download) -> None:
    it.lay_out()
    it.copied("never")
    it.aged(600)


@state
def _half_old(it: Download) -> None:
    it.lay_out()
    for path in (it.part(0), it.part(2)):
        age(path, 2 * HOUR)


@state
def _old(it: Download) -> None:
    it.lay_out(2 * HOUR)
