"""Every act, small: what it is done on, and the order that a driver gets for it.

Downloads are of a real layer, so that their end can be pulled; `LAYER` bytes in three parts.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.driving import HealthyStore
from tests.support.notation import age
from tests.support.servers import sidecar
from tests.support.transfers import lay_out
from watcher.model import DAY, HOUR, MIB

PART = 2 * MIB
LAYER = 3 * PART
#: How far each part has come, if nothing else is said.
PRESENT = (PART, 5 * MIB // 4, 0)
LEFT = LAYER - sum(PRESENT)
QUIET = 600.0


class Layer(NamedTuple):
    """The layer that all of this is about: its 64 digits, its bytes, and its model's manifest."""

    digest: str
    content: bytes
    #: Below ``manifests/``.
    path: str
    manifest: bytes


class Act(NamedTuple):
    """What it is done on, the driver's order, and what an ordinary command says for it."""

    lay_out: Callable[[HealthyStore, Layer], None]
    order: dict[str, Any]
    words: tuple[str, ...]
    #: Bytes that a pull may download after it, beside 1 MiB for each part.
    missing: int = LAYER


REPAIR = {"repair": True, "clean": False, "repair_stale": True, "hash": True}
QUARANTINED = "00000001-sha256-"


def download(
    store: HealthyStore,
    layer: Layer,
    present: tuple[int, ...] = PRESENT,
    claimed: tuple[int, ...] = (0, 0, 0),
    aged: float = QUIET,
) -> None:
    """Data and sidecars of the layer, as long as their server lived."""
    with store.partial(layer.digest).open("wb") as file:
        file.truncate(LAYER)
        for number, length in enumerate(present):
            file.seek(number * PART)
            file.write(layer.content[number * PART : number * PART + length])
    for number, done in enumerate(claimed):
        text = sidecar(number, number * PART, PART, done)
        store.partial(layer.digest, number).write_text(text)
    _aged(store, layer, aged)


def _aged(store: HealthyStore, layer: Layer, aged: float = QUIET) -> None:
    for path in store.blobs.glob(f"sha256-{layer.digest}*"):
        age(path, aged)


def _finished(store: HealthyStore, layer: Layer, wrong: bytes = b"") -> Path:
    path = store.blobs / f"sha256-{layer.digest}"
    path.write_bytes(wrong + layer.content[len(wrong) :])
    age(path, 8 * DAY)
    return path


def _behind(store: HealthyStore, layer: Layer) -> None:
    download(store, layer)


def _hollow(store: HealthyStore, layer: Layer) -> None:
    download(store, layer, claimed=(PART, PART, MIB))


def _without_data(store: HealthyStore, layer: Layer) -> None:
    download(store, layer, claimed=(PART, MIB, 0))
    store.partial(layer.digest).unlink()


def _numbers_missing(store: HealthyStore, layer: Layer) -> None:
    download(store, layer)
    store.partial(layer.digest, 1).unlink()


def _numbers_too_many(store: HealthyStore, layer: Layer) -> None:
    download(store, layer)
    for number in (3, 7):
        store.partial(layer.digest, number).write_text(sidecar(number, PART, PART, 0))
    _aged(store, layer)


def _a_strange_number(store: HealthyStore, layer: Layer) -> None:
    """A name that no sidecar has goes away."""
    download(store, layer)
    store.file(f"sha256-{layer.digest}-partial-0.bak", "{}", QUIET)


def _unreadable(store: HealthyStore, layer: Layer) -> None:
    download(store, layer)
    store.partial(layer.digest, 1).write_bytes(b"")
    _aged(store, layer)


def _unclaimed(store: HealthyStore, layer: Layer) -> None:
    download(store, layer, claimed=())


def _whole(store: HealthyStore, layer: Layer) -> None:
    download(store, layer, present=(PART,) * 3, claimed=(PART, 0, 0))


def _whole_and_wrong(store: HealthyStore, layer: Layer) -> None:
    download(store, layer, present=(PART,) * 3, claimed=(PART, PART, 0))
    with store.partial(layer.digest).open("r+b") as file:
        file.seek(2 * PART)
        file.write(b"<html>")
    _aged(store, layer)


def _sidecars_left_over(store: HealthyStore, layer: Layer) -> None:
    _finished(store, layer)
    for number in (0, 1, 16):
        store.file(f"sha256-{layer.digest}-partial-{number}", "{}", QUIET)


def _redundant(store: HealthyStore, layer: Layer) -> None:
    download(store, layer)
    _finished(store, layer)


def _corrupt(store: HealthyStore, layer: Layer) -> None:
    """A blob that its manifest names, and that is not what it should be."""
    _finished(store, layer, b"wrong")
    path = store.path / "manifests" / layer.path
    path.parent.mkdir(parents=True)
    path.write_bytes(layer.manifest)


def _corrupt_and_fetched(store: HealthyStore, layer: Layer) -> None:
    """Beside it, all of the layer has arrived with us."""
    _corrupt(store, layer)
    lay_out(store.path, layer.digest, layer.content, ((0, LAYER),), aged=QUIET)


def _in_quarantine(store: HealthyStore, layer: Layer) -> None:
    for folder in (store.ours, store.ours / "quarantine"):
        folder.mkdir()
    os.replace(_finished(store, layer), store.ours / "quarantine" / f"{QUARANTINED}{layer.digest}")


def _soon_an_hour_old(store: HealthyStore, layer: Layer) -> None:
    download(store, layer, aged=0.9 * HOUR)


def _worth_nothing(store: HealthyStore, layer: Layer) -> None:
    download(store, layer, aged=8 * DAY)
    store.text_blob("an orphan")
    store.file("split-copy123")


def _of_ours(store: HealthyStore, layer: Layer) -> None:
    """Where a server has nothing: the same bytes as in `_behind`."""
    ends = enumerate(PRESENT)
    durable = tuple((n * PART, n * PART + length) for n, length in ends if length)
    lay_out(store.path, layer.digest, layer.content, durable, aged=QUIET)


def _of_both(store: HealthyStore, layer: Layer) -> None:
    """As a pull leaves it that was stopped while it copied what a server has left."""
    _behind(store, layer)
    copied = ((PART // 2, PART),)
    lay_out(store.path, layer.digest, layer.content, copied, taken=copied, aged=QUIET)


ACTS = {
    "behind": Act(_behind, {"policy": REPAIR}, ("repair",), LEFT),
    "hollow": Act(_hollow, {"policy": REPAIR}, ("repair",), LEFT),
    "without-data": Act(_without_data, {"policy": REPAIR}, ("repair",)),
    "numbers-missing": Act(_numbers_missing, {"policy": REPAIR}, ("repair",), LEFT),
    "numbers-too-many": Act(_numbers_too_many, {"policy": REPAIR}, ("repair",), LEFT),
    "a-strange-number": Act(_a_strange_number, {"policy": REPAIR}, ("repair",), LEFT),
    "unreadable": Act(_unreadable, {"policy": REPAIR}, ("repair",), LEFT),
    "unclaimed": Act(_unclaimed, {"policy": REPAIR}, ("repair",), LEFT),
    "whole": Act(_whole, {"policy": REPAIR}, ("repair",), 0),
    "whole-and-wrong": Act(_whole_and_wrong, {"policy": REPAIR}, ("repair",), MIB),
    "sidecars-left-over": Act(_sidecars_left_over, {"policy": REPAIR}, ("repair",)),
    "redundant": Act(_redundant, {"policy": REPAIR}, ("repair",)),
    "quarantine": Act(
        _corrupt,
        {"policy": {**REPAIR, "online": True}, "registry": LAYER, "known": True},
        ("repair",),
    ),
    "fetch": Act(
        _corrupt_and_fetched,
        {
            "policy": {**REPAIR, "online": True, "fetch": True, "quarantine_max_bytes": 0},
            "registry": LAYER,
            "known": True,
        },
        ("repair", "--fetch"),
        0,
    ),
    "restore": Act(
        _in_quarantine, {"policy": {"clean": False, "restore": []}}, ("quarantine", "restore")
    ),
    "purge": Act(
        _in_quarantine, {"policy": {"clean": False, "purge": []}}, ("quarantine", "purge")
    ),
    "clean": Act(_worth_nothing, {"policy": {"clean": True}}, ("clean",)),
    "give-back": Act(
        _of_ours, {"policy": {"clean": False, "give_back": True}}, ("repair", "--give-back"), LEFT
    ),
    "take-over": Act(_behind, {"policy": {"clean": False, "take_over": True}}, ("pull",)),
    "take-over-copied": Act(_of_both, {"policy": {"clean": False, "take_over": True}}, ("pull",)),
    "prepare": Act(
        _soon_an_hour_old,
        {"policy": {"repair": True, "clean": False, "refresh": True}, "prepare": True},
        ("prepare",),
        LEFT,
    ),
}
