"""A model from a registry to its names: layers, manifest, owners, and what a run leaves."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import stat
import time
from pathlib import Path

import pytest

from watcher.config import Settings
from watcher.demo.registry import Fault, Layer, Manners, Registry
from watcher.model import MIB
from watcher.observe.host import Host
from watcher.state import fs
from watcher.transfer import store
from watcher.transfer import values as transfer
from watcher.transfer.publication import Publication
from watcher.transfer.values import Cause, StoppedError

from .driven import Background, Here, wait_for, with_options


def test_a_model_arrives_byte_for_byte(here: Here) -> None:
    here.pull()
    assert here.served == here.size + 1  # the one that its address costs


def test_a_plain_oci_registry_serves_as_well(here: Here) -> None:
    here.registry.manners.plain = True
    here.pull()
    assert "direct" not in here.registry.stats()["requests"]


def test_nothing_has_a_name_before_all_layers_are_right(here: Here) -> None:
    fetched = here.fetch()
    assert not list((here.path / "blobs").iterdir())
    assert not here.manifest.exists()
    here.publish(fetched)
    here.check()


def test_blobs_are_as_a_server_leaves_them(here: Here) -> None:
    before = time.time()
    os.umask(0o077)
    try:
        here.pull()
    finally:
        os.umask(0o022)
    blob, folder = here.blob.stat(), (here.path / "blobs").stat()
    assert stat.S_IMODE(blob.st_mode) == 0o644
    assert (blob.st_uid, blob.st_gid) == (folder.st_uid, folder.st_gid)
    assert blob.st_mtime >= before - 1
    assert blob.st_nlink == 1
    assert stat.S_IMODE(here.manifest.stat().st_mode) == 0o644


def test_what_lay_there_for_long_gets_its_mode_and_a_time_that_a_server_start_spares(
    here: Here,
) -> None:
    here.fetch()
    os.utime(here.folder / "data", (1, 1))
    (here.folder / "data").chmod(0o600)
    here.pull()
    blob = here.blob.stat()
    assert stat.S_IMODE(blob.st_mode) == 0o644
    assert blob.st_mtime > time.time() - 3600


def test_a_layer_that_is_there_is_not_fetched(here: Here) -> None:
    here.pull()
    here.registry.reset_stats()
    here.pull()
    assert not here.registry.stats()["bytes"]


def test_a_model_of_many_small_layers_arrives(tmp_path: Path, registry: Registry) -> None:
    here = Here(tmp_path / "models", registry, 5000)
    layers = [Layer(1 + 997 * number) for number in range(60)]
    here.model = registry.add_model("demo", "1b", [*layers, Layer(data=b"")])
    here.pull()


def test_somebody_who_stops_need_not_wait_for_the_names_of_many_layers(
    tmp_path: Path, registry: Registry
) -> None:
    here = Here(tmp_path / "models", registry, 5000)
    here.model = registry.add_model("demo", "1b", [Layer(1 + number) for number in range(20)])
    fetched, looks = here.fetch(), itertools.count()
    publication = Publication(Host(str(here.path)), Settings(), lambda: next(looks) >= 5)
    with here.opened() as opened, pytest.raises(StoppedError):
        list(publication.named(opened, fetched.verified))
    assert len(list((here.path / "blobs").iterdir())) == 5
    here.pull()


def test_some_layers_are_fetched_without_their_manifest(here: Here) -> None:
    here.registry.remove_tag("library/demo", "1b")
    fetched = here.fetch(layers=(transfer.Layer(here.digest, here.size),))
    with here.opened() as opened:
        named = opened.publish(fetched.verified).named
        assert opened.settle(named) == []
    assert here.blob.read_bytes() == here.content()
    assert "manifest" not in here.registry.stats()["requests"]


@pytest.mark.parametrize("layers", ["null", "[]"])
def test_a_model_without_layers_gets_its_config_and_manifest(here: Here, layers: str) -> None:
    config = here.model.config
    size = here.registry.content(config).size
    raw = f'{{"layers": {layers}, "config": {{"digest": "{config}", "size": {size}}}}}'.encode()
    here.registry.set_manifests("library/demo", "1b", [raw])
    here.publish(here.fetch())
    assert here.manifest.read_bytes() == raw
    assert len(list((here.path / "blobs").iterdir())) == 1


def test_one_digest_as_layer_and_config_is_fetched_once(here: Here) -> None:
    config = here.model.config
    size = here.registry.content(config).size
    one = f'{{"digest": "{config}", "size": {size}}}'
    raw = f'{{"layers": [{one}], "config": {one}}}'.encode()
    here.registry.set_manifests("library/demo", "1b", [raw])
    here.publish(here.fetch())
    assert here.registry.bytes_served(config) == size + 1


def test_a_tag_that_moves_meanwhile_keeps_the_layers_that_are_named_still(here: Here) -> None:
    old = here.model
    moved = here.registry.add_model(
        "demo", "1b", [Layer(here.size), Layer(3_000_000)], extras=False
    )
    here.registry.set_manifests(
        "library/demo", "1b", [old.manifest, moved.manifest, moved.manifest]
    )
    here.model = moved
    here.pull()
    assert "the tag has moved" in here.notices()
    assert here.served == here.size + 1


def test_a_manifest_that_a_server_would_find_by_another_case_is_replaced(here: Here) -> None:
    older = here.manifest.parent.parent / "DEMO" / "1B"
    older.parent.mkdir(parents=True)
    older.write_bytes(b"{}")
    here.publish(here.fetch())
    assert older.read_bytes() == here.model.manifest
    assert not here.manifest.exists()


def test_a_blob_that_somebody_else_names_meanwhile_stays(here: Here) -> None:
    fetched = here.fetch()
    content = here.registry.content(here.model.digests[0])
    here.blob.write_bytes(content.read(0, here.size))
    theirs = here.blob.stat().st_ino
    here.publish(fetched)
    here.check()
    assert here.blob.stat().st_ino == theirs


def test_a_layer_that_changed_since_it_was_hashed_gets_no_name(here: Here) -> None:
    fetched = here.fetch()
    data = here.folder / "data"
    with data.open("r+b") as file:
        file.write(b"x")
    with store.opened(str(here.path)) as opened:
        changed = opened.publish(fetched.verified).changed
    assert [each.layer.digest for each in changed] == [here.digest]
    assert not here.blob.exists()


def test_a_blob_of_another_size_is_reported_and_left(here: Here) -> None:
    here.blob.write_bytes(b"short")
    with pytest.raises(transfer.TransferError, match="damaged") as caught:
        here.fetch()
    assert caught.value.cause is Cause.DAMAGED_BLOB
    assert here.blob.read_bytes() == b"short"


def test_blobs_on_another_file_system_are_left_to_the_server(here: Here) -> None:
    (here.path / "blobs").rmdir()
    other = Path("/dev/shm") / f"transfer-{os.getpid()}"
    other.mkdir()
    try:
        if other.stat().st_dev == here.path.stat().st_dev:
            pytest.skip("needs a second file system")
        (here.path / "blobs").symlink_to(other)
        with pytest.raises(transfer.TransferError) as caught:
            here.fetch()
        assert caught.value.cause is Cause.OTHER_DISK
    finally:
        other.rmdir()


# ---------------------------------------------------------------- ends that no retry cures


@pytest.mark.parametrize(
    ("manners", "cause"),
    [
        (Manners(newer=True), Cause.NEWER_OLLAMA),
        (Manners(wants="signed"), Cause.NOT_ALLOWED),
    ],
)
def test_what_no_retry_cures_ends_before_a_byte(here: Here, manners: Manners, cause: Cause) -> None:
    here.registry.manners = manners
    with pytest.raises(transfer.TransferError) as caught:
        here.fetch()
    assert caught.value.cause is cause
    assert not here.waits()
    assert not here.registry.stats()["bytes"]


def test_an_unknown_model_ends_before_a_byte(here: Here) -> None:
    here.registry.remove_tag("library/demo", "1b")
    with pytest.raises(transfer.TransferError) as caught:
        here.fetch()
    assert caught.value.cause is Cause.NO_SUCH_MODEL
    assert "MANIFEST_UNKNOWN" in str(caught.value)


def test_bytes_that_are_not_the_manifests_come_twice_and_stay_as_they_are(here: Here) -> None:
    other = here.registry.add_model("other", "1b", [Layer(here.size)], extras=False)
    blobs = here.registry._blobs
    right = blobs[f"sha256:{here.digest}"]
    blobs[f"sha256:{here.digest}"] = here.registry.content(other.digests[0])
    for run in (1, 2):  # what is there is compared, whoever fetched it
        with pytest.raises(transfer.TransferError, match="serves other bytes") as caught:
            here.fetch()
        assert caught.value.cause is Cause.MISMATCH
        served = here.registry.bytes_served(other.digests[0])
        assert served == (run + 1) * here.size + run
        assert here.notices().count("12.0 MB from the registry must be downloaded again") == run
        assert here.believed("another start") == ((0, here.size),)
        data = (here.folder / "data").read_bytes()
        assert hashlib.sha256(data).hexdigest() == other.digests[0][7:]
    blobs[f"sha256:{here.digest}"] = right
    here.pull()


def test_what_was_fetched_anew_already_is_not_fetched_a_third_time(here: Here) -> None:
    """What a server has left is doubted first, and is wrong; then the rest, which was right."""
    with here.ledger() as found:
        os.pwrite(found.data, b"x" * 4 * MIB, 0)
        found.taken = ((0, 4 * MIB),)
        found.mark(0, 4 * MIB)
        found.make_durable(found.arrived)
    here.registry.add_fault(Fault("flip", begin=6 * MIB, end=6 * MIB + 1, after=5, times=1))
    here.pull()
    assert here.served == here.size + (here.size - 4 * MIB) + 1


# ---------------------------------------------------------------- stopping


def test_a_stop_keeps_every_byte_and_the_next_run_fetches_the_rest(here: Here) -> None:
    here.registry.hold(here.model.digests[0], at=(3 * MIB + 5, 7 * MIB + 77))
    with Background(here.transfer()) as running:
        here.registry.wait_held(here.model.digests[0], 2)
        # All but what lies behind the two gates, in pieces of 2 MiB.
        rest = (MIB - 5) + (MIB - 77)
        wait_for(lambda: here.written() == here.size - rest)
        running.work.stop()
        running.join()
    assert isinstance(running.error, transfer.StoppedError)
    assert missing_durable(here) == rest == here.size - (here.served - 1)
    here.registry.release()
    here.pull()
    assert here.served == here.size + 2


def missing_durable(here: Here) -> int:
    """As after a power cut."""
    with here.ledger("another start") as found:
        return here.size - sum(end - start for start, end in found.arrived)


def test_a_stop_before_the_start_counts(here: Here) -> None:
    work = here.transfer()
    work.stop()
    with pytest.raises(transfer.StoppedError):
        work.run()


def test_nothing_runs_further_ahead_of_the_front_than_allowed(here: Here) -> None:
    here.registry.hold(here.model.digests[0], at=(100_000,))
    with Background(here.transfer(with_options(piece=MIB, ahead=4 * MIB))) as running:
        here.registry.wait_held(here.model.digests[0], 1)
        # The piece at 4 MiB begins less than 4 MiB behind the front, the one at 5 MiB does not.
        wait_for(lambda: here.written_if_any() == 4 * MIB + 100_000)
        asked = len(here.registry.asked)
        time.sleep(0.3)
        assert (here.served - 1, len(here.registry.asked)) == (4 * MIB + 100_000, asked)
        here.registry.release()
        here.publish(running.result())
    here.check()


@pytest.mark.parametrize("depth", range(5))
def test_what_is_in_a_manifests_way_is_named_by_its_path(here: Here, depth: int) -> None:
    """A file where a folder is to be, or the other way round."""
    path = Path("manifests", *here.name[:depth])
    shutil.rmtree(here.path / "manifests")
    (here.path / path.parent).mkdir(parents=True, exist_ok=True)
    (here.path / path).touch() if depth < 4 else (here.path / path).mkdir()
    with here.opened() as opened, pytest.raises(OSError, match=r".") as caught:
        opened.place_manifest(here.name, b"{}")
    assert caught.value.filename == str(path)


def test_what_is_in_a_layers_way_is_named_by_its_path(here: Here) -> None:
    here.blob.symlink_to("nowhere")
    fetched = here.fetch()
    with here.opened() as opened, pytest.raises(FileExistsError) as caught:
        opened.settle(opened.publish(fetched.verified).named)
    assert caught.value.filename == f"blobs/{here.blob.name}"


def test_what_is_in_a_ledgers_way_is_named_by_its_path(here: Here) -> None:
    (here.folder / ".ledger.new").mkdir(parents=True)
    with pytest.raises(transfer.TransferError, match=r"/\.ledger\.new: Is a directory"):
        here.fetch()


def test_two_models_that_get_their_manifests_at_once_get_their_own(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In threads of one process, or in two containers, whose processes have the same id."""
    other, create, begun = here.name._replace(model="other"), fs.create, list[str]()
    with here.opened() as opened:

        def created(name: str, *more: object) -> None:
            create(name, *more)  # type: ignore[arg-type]
            begun.append(name)
            if len(begun) == 1:
                opened.place_manifest(other, b"other")

        monkeypatch.setattr(fs, "create", created)
        opened.place_manifest(here.name, b"one")
    assert here.manifest.read_bytes() == b"one"
    assert (here.path / "manifests" / other.path).read_bytes() == b"other"
    assert len(begun) == 2
