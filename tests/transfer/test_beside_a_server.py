"""A server that pulls the same layer when ours gets its name: whatever it does, ours is there."""

from __future__ import annotations

import errno

import pytest

from watcher.state import fs

from .driven import Here


class Begun:
    """A server has begun to pull the layer, and ours gets its name."""

    def __init__(self, here: Here) -> None:
        self.here, self.fetched = here, here.fetch()
        self.partial = here.path / "blobs" / f"sha256-{here.digest}-partial"
        self.partial.write_bytes(b"begun")
        with here.opened() as opened:
            self.published = opened.publish(self.fetched.verified)
            opened.place_manifest(here.name, self.fetched.manifest)

    def is_settled(self) -> bool:
        with self.here.opened() as opened:
            return not opened.settle(self.published.named)


def test_while_it_pulls_ours_keeps_a_second_name_and_then_goes(here: Here) -> None:
    begun = Begun(here)
    assert here.blob.stat().st_nlink == 2
    assert not begun.is_settled()
    begun.partial.unlink()
    assert begun.is_settled()
    assert here.blob.stat().st_nlink == 1
    here.check()


def test_a_name_that_it_removes_is_given_again(here: Here) -> None:
    begun = Begun(here)
    begun.partial.write_bytes(b"wrong")
    begun.partial.rename(here.blob)  # it is done, hashes it,
    here.blob.unlink()  # and its bytes were wrong
    assert begun.is_settled()
    here.check()


def test_a_name_that_it_removes_while_another_pull_goes_on_is_given_again(here: Here) -> None:
    begun = Begun(here)
    here.blob.unlink()
    assert not begun.is_settled()
    assert here.blob.stat().st_nlink == 2


def test_a_right_blob_that_the_server_has_named_meanwhile_stays(here: Here) -> None:
    begun = Begun(here)
    begun.partial.write_bytes(here.content())
    begun.partial.rename(here.blob)
    theirs = here.blob.stat().st_ino
    assert begun.is_settled()
    assert here.blob.stat().st_ino == theirs
    here.check()


def test_without_second_names_ours_gets_the_name_alone(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(fs, "second_name", refuse)
    begun = Begun(here)
    assert here.blob.stat().st_nlink == 1
    begun.partial.unlink()
    assert begun.is_settled()
    here.check()


def test_a_new_transfer_in_its_place_gets_no_name(here: Here) -> None:
    begun = Begun(here)
    here.blob.unlink()
    (here.folder / "data").unlink()
    (here.folder / "data").write_bytes(bytes(here.size))
    assert not begun.is_settled()
    assert not here.blob.exists()
