"""One pass over a store: every kind of name, link, pipe and folder in its place."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from tests.support.calls import calls
from tests.support.notation import LIBRARY, Store, digest_of, manifest_bytes
from watcher.model import BlobFault, Kind, ManifestFault, Mode
from watcher.observe import scan
from watcher.observe.access import Access, user_of


def scanned(fd: int) -> scan.Scan:
    """A scan for a server that runs as the owner of the store."""
    return scan.scan_store(fd, Access(user_of(fd, None)), Mode(), manifests_hidden=False)


@pytest.fixture
def fd(models: Store) -> Iterator[int]:
    made = os.open(models.path, os.O_RDONLY | os.O_DIRECTORY)
    yield made
    os.close(made)


def test_an_empty_store(fd: int) -> None:
    found = scanned(fd)
    assert not found.downloads
    assert found.census.entries == found.census.manifests == 0


def test_the_healthy_are_counted_and_not_kept(models: Store, fd: int) -> None:
    for name in ("a/latest", "b/latest"):
        models.model(name)
    census = scanned(fd).census
    assert (census.healthy, census.manifests, census.entries) == (2, 2, 2)
    assert not census.odd
    assert not census.unnamed


def test_a_blob_is_held_against_the_size_that_its_manifest_gives(models: Store, fd: int) -> None:
    short, long, gone = models.blob(b"1"), models.blob(b"22"), digest_of("gone")
    models.manifest("m/latest", {short: 5, long: 1, gone: 9})
    odd = {each.digest: each for each in scanned(fd).census.odd}
    assert {key: each.fault for key, each in odd.items()} == {
        short: BlobFault.SHORT,
        long: BlobFault.LONG,
        gone: BlobFault.MISSING,
    }
    assert odd[short].models == ("m:latest",)
    assert odd[short].wanted == 5


def test_no_manifest_names_an_orphan(models: Store, fd: int) -> None:
    digest = models.orphan()
    models.model()
    assert [each.name for each in scanned(fd).census.unnamed] == [f"sha256-{digest}"]


def test_pieces_of_a_download_come_together(models: Store, fd: int) -> None:
    digest = models.broken("0:1 -:1 {}:0")
    (models.blobs / f"sha256-{digest}-partial-x").write_bytes(b"")
    (models.blobs / f"sha256-{digest}.tmp").write_bytes(b"")
    models.blob(b"done", name="layer")
    pieces = scanned(fd).downloads[digest]
    assert pieces.data is not None
    assert pieces.transfer is not None
    assert pieces.finished is not None
    assert min(pieces.sidecars, key=str)[0] in (0, 2, None)
    assert {number for number, _ in pieces.sidecars} == {0, 2, None}


def test_a_narrow_look_sees_only_its_digests(models: Store, fd: int) -> None:
    wanted, other = models.broken("0:1", name="wanted"), models.broken("0:1", name="other")
    found = scan.scan_digests(fd, {wanted})
    assert set(found.downloads) == {wanted}
    assert other not in found.downloads


def test_a_look_at_many_digests_sees_each_and_costs_little(models: Store, fd: int) -> None:
    here = {models.broken("0:1", name=f"{number}") for number in range(3)}
    old = models.broken("0:1", name="old")
    for path in models.blobs.glob(f"*{old}*"):
        path.rename(path.with_name(path.name.replace("sha256-", "sha256:")))
    (models.blobs / f"sha256-{digest_of('tensor')}.tmp").write_bytes(b"")
    models.broken("0:1", name="another")
    absent = {digest_of(f"absent {number}") for number in range(200)}
    wanted = {*here, old, digest_of("tensor"), *absent}
    assert scan.scan_digests(fd, wanted).downloads.keys() == wanted - absent
    assert calls(lambda: scan.scan_digests(fd, wanted)) < 20 * len(wanted)


@pytest.mark.parametrize("narrow", [True, False])
def test_old_spellings_of_a_download_count_where_there_are_no_others(
    models: Store, fd: int, narrow: bool
) -> None:
    digest = models.broken("0:1 0:1")
    for path in list(models.blobs.iterdir()):
        path.rename(path.with_name(path.name.replace("sha256-", "sha256:")))

    def sidecars() -> set[str]:
        found = scan.scan_digests(fd, {digest}) if narrow else scanned(fd)
        return {entry.name for _, entry in found.downloads[digest].sidecars}

    assert sidecars() == {f"sha256:{digest}-partial-{number}" for number in range(2)}
    models.broken("0:1")
    assert sidecars() == {f"sha256-{digest}-partial-0"}


def test_left_overs_of_create_and_foreign_files(models: Store, fd: int) -> None:
    for name in ("sha256-123", "COPY1", "split-copy2", "README", ".DS_Store"):
        models.temporary(name)
    (models.blobs / "split-gguf-7").mkdir()
    (models.path / "ollama-safetensors123").mkdir()
    (models.blobs / "folder").mkdir()
    census = scanned(fd).census
    assert {each.path for each in census.temporaries} == {
        "blobs/sha256-123", "blobs/COPY1", "blobs/split-copy2", "blobs/split-gguf-7",
        "ollama-safetensors123",
    }  # fmt: skip
    assert {each.name for each in census.foreign} == {"README", ".DS_Store", "folder"}


def test_no_link_below_blobs_is_followed(models: Store, fd: int) -> None:
    digest = models.blob(b"real")
    path = models.blobs / f"sha256-{digest}"
    path.rename(models.path / "elsewhere")
    path.symlink_to(models.path / "elsewhere")
    models.manifest("m/latest", {digest: 4})
    (odd,) = scanned(fd).census.odd
    assert odd.fault is BlobFault.SYMLINK
    assert odd.entry is not None
    assert odd.entry.kind is Kind.SYMLINK


@pytest.mark.parametrize("make", ["fifo", "socket", "folder"])
def test_a_blob_that_is_no_file(models: Store, fd: int, make: str) -> None:
    digest = digest_of("x")
    path = models.blobs / f"sha256-{digest}"
    if make == "fifo":
        os.mkfifo(path)
    elif make == "folder":
        path.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{fd}/blobs/{path.name}")
    models.manifest("m/latest", {digest: path.lstat().st_size})
    (odd,) = scanned(fd).census.odd
    assert odd.fault is BlobFault.NO_FILE


def test_blobs_itself_may_be_a_link(models: Store, fd: int) -> None:
    models.model()
    models.blobs.rename(models.path / "disk")
    models.blobs.symlink_to("disk")
    assert scanned(fd).census.healthy == 1


def faults(fd: int) -> dict[str, ManifestFault]:
    return {each.path: each.fault for each in scanned(fd).census.odd_manifests}


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("file", ManifestFault.MISPLACED),
        ("h/file", ManifestFault.MISPLACED),
        ("h/n/file", ManifestFault.MISPLACED),
        ("h/n/m/.DS_Store", ManifestFault.BAD_NAME),
        ("h/n/m/two words", ManifestFault.BAD_NAME),
        ("h/n/m/t/deeper", ManifestFault.MISPLACED),
    ],
)
def test_manifests_lie_exactly_four_deep(
    models: Store, fd: int, path: str, fault: ManifestFault
) -> None:
    file = models.manifests / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(manifest_bytes({digest_of("x"): 1}))
    assert faults(fd)[f"manifests/{path}"] is fault
    assert scanned(fd).census.manifests == 0
    assert not scanned(fd).census.odd


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (b"", ManifestFault.CORRUPT),
        (b'{"layers":[', ManifestFault.CORRUPT),
        (manifest_bytes({"sha256:x": 1}), ManifestFault.BAD_DIGEST),
        (b"{}", ManifestFault.EMPTY),
        (b"null", ManifestFault.EMPTY),
        (b'{"layers": [], "config": {}}', ManifestFault.EMPTY),
        (b'{"manifests": [{"digest": "sha256:1", "size": 1}]}', ManifestFault.EMPTY),
    ],
)
def test_a_scan_finds_the_fault_of_a_manifest(
    models: Store, fd: int, raw: bytes, fault: ManifestFault
) -> None:
    models.manifest("m/latest", raw)
    assert faults(fd) == {f"manifests/{LIBRARY}/m/latest": fault}


def test_links_to_manifests_are_followed_and_their_blobs_are_named(models: Store, fd: int) -> None:
    digest = models.model("real/latest")
    real = models.manifests / LIBRARY / "real"
    (models.manifests / LIBRARY / "linked").mkdir()
    (real / "latest").rename(models.path / "manifest")
    (models.manifests / LIBRARY / "linked" / "tag").symlink_to(models.path / "manifest")
    (models.manifests / LIBRARY / "folder").symlink_to(real)
    found = scanned(fd)
    assert found.named.models_of(digest) == ("linked:tag",)


def test_dangling_links_and_loops_are_reported(models: Store, fd: int) -> None:
    model = models.manifests / LIBRARY / "m"
    model.mkdir(parents=True)
    (model / "gone").symlink_to("nowhere")
    (model / "loop").symlink_to("loop")
    (models.manifests / "up").symlink_to("..")
    found = faults(fd)
    assert found[f"manifests/{LIBRARY}/m/gone"] is ManifestFault.DANGLING
    assert found[f"manifests/{LIBRARY}/m/loop"] is ManifestFault.DANGLING


def test_several_models_of_a_blob_are_all_known(models: Store, fd: int) -> None:
    digest = models.blob(b"shared")
    for name in ("b/latest", "a/latest"):
        models.manifest(name, {digest: 6})
    assert scanned(fd).named.models_of(digest) == ("a:latest", "b:latest")


def test_the_store_is_left_as_it_is(models: Store, fd: int) -> None:
    models.model()
    models.broken("0:1 -:1")
    before = models.snapshot()
    scanned(fd)
    after = models.snapshot()
    assert {path: each[:9] for path, each in after.items()} == {
        path: each[:9] for path, each in before.items()
    }
