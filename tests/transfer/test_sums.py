"""The registry's sums of chunks: what is wrong is found as it lands, and alone fetched again."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.driving import audit, run
from watcher.demo.registry import Fault, Manners
from watcher.model import MIB
from watcher.state import sums, transfers
from watcher.transfer import values

from .driven import Background, Here, wait_for, with_options
from .test_mirrors import Mirror
from .test_taking_over import TAKEN, partial_of, take

CHUNK = 4 * MIB
OPTIONS = with_options(sums_from=MIB)


@pytest.fixture(autouse=True)
def complete(here: Here) -> None:
    here.registry.manners = Manners(sums="complete", chunk=CHUNK)


@pytest.fixture
def mirror(here: Here) -> Iterator[Mirror]:
    with Mirror(here.size) as found:
        yield found


def kept(here: Here) -> Path:
    return here.path / ".ollama-watch" / sums.FOLDER / here.digest


def is_said(here: Here) -> bool:
    """Whether the registry's sums are kept."""
    return kept(here).exists() and kept(here).read_bytes().startswith(b"sha256:")


def asked_for_sums(here: Here) -> int:
    return int(here.registry.stats()["requests"].get("sums", 0))


def test_a_sound_layer_costs_no_byte_more_and_its_sums_are_kept(here: Here) -> None:
    here.pull(OPTIONS)
    assert here.served == here.size + 1
    assert asked_for_sums(here) == 1
    assert len(sums.parsed(kept(here).read_bytes(), here.size)) == 3
    assert not here.notices()


def test_clean_removes_the_sums_of_a_layer_of_which_nothing_is_left(here: Here) -> None:
    here.registry.hold(here.model.digests[0], at=(CHUNK,))
    with Background(here.transfer(with_options(sums_from=MIB, connections=1))):
        wait_for(lambda: here.arrived() >= CHUNK - MIB)
    clean = ("clean", "--yes", "--stale-after", "1h")
    assert run(here.path, *clean).returncode == 0
    assert kept(here).exists()
    here.registry.release()
    here.pull(OPTIONS)
    assert run(here.path, *clean).returncode == 0
    assert kept(here).exists()
    here.manifest.unlink()
    aside = here.path / ".ollama-watch" / "quarantine" / f"00000001-{here.blob.name}"
    aside.parent.mkdir()
    here.blob.rename(aside)
    assert run(here.path, *clean).returncode == 0
    assert kept(here).exists(), "its right chunks are copied from there"
    aside.unlink()
    assert run(here.path, *clean).returncode == 0
    assert not kept(here).exists()


def test_a_small_layer_is_not_worth_them(here: Here) -> None:
    here.pull()
    assert asked_for_sums(here) == 0


def test_a_flipped_byte_costs_its_chunk(here: Here) -> None:
    here.registry.add_fault(Fault("flip", begin=6 * MIB, end=6 * MIB + 1, after=5, times=1))
    here.pull(OPTIONS)
    assert here.served == here.size + 1 + CHUNK
    assert f"checksum mismatch in bytes {CHUNK:,} to {2 * CHUNK:,}" in here.notices()


def test_a_layer_arrives_right_though_one_answer_in_seven_has_a_flipped_byte(here: Here) -> None:
    here.registry.add_fault(Fault("flip", begin=1, after=70_000, every=7))
    here.pull(with_options(sums_from=MIB, piece=MIB, tries=None))
    assert "downloading them again" in here.notices()


def test_a_mirror_that_lies_costs_one_chunk_and_is_left_alone(here: Here, mirror: Mirror) -> None:
    mirror.add_fault(Fault("flip", begin=1, after=1000))
    mirror.hold(here.model.digests[0], at=range(CHUNK, here.size, 2 * MIB))
    options = with_options(sums_from=MIB, connections=2)
    with Background(here.transfer(options, mirrors=(mirror.url,))) as running:
        wait_for(lambda: "is no longer used" in here.notices())
        mirror.release()
        here.publish(running.result())
    here.check()
    assert here.served == here.size + 1
    assert here.notices().count("is no longer used") == 1


def test_after_a_resume_they_are_not_asked_for_again(here: Here) -> None:
    here.registry.hold(here.model.digests[0], at=(CHUNK,))
    with Background(here.transfer(with_options(sums_from=MIB, connections=1))):
        wait_for(lambda: here.arrived() >= CHUNK - MIB)
    here.registry.release()
    here.pull(OPTIONS)
    assert asked_for_sums(here) == 1
    assert here.served == here.size + 2


def test_what_was_compared_is_shown_as_proven(here: Here) -> None:
    here.registry.hold(here.model.digests[0], at=(2 * CHUNK + MIB,))
    with Background(here.transfer(with_options(sums_from=MIB, connections=1))):
        wait_for(lambda: here.arrived() >= 2 * CHUNK)
        wait_for(lambda: shown(here)["proven"])
    ranges = shown(here)
    ((start, end),) = ranges["proven"]
    assert (start, end % CHUNK) == (0, 0)
    assert end <= ranges["claimed"][0][1]


def test_what_is_fetched_again_or_lost_is_proven_no_more(here: Here) -> None:
    with here.ledger() as ledger:
        os.ftruncate(ledger.data, here.size)
        ledger.mark(0, 2 * CHUNK)
        ledger.prove(0, CHUNK)
        ledger.make_durable(ledger.arrived)
        ledger.mark(2 * CHUNK, 3 * CHUNK)
        ledger.prove(2 * CHUNK, 3 * CHUNK)
        ledger.lose()
        assert ledger.proven == ((0, CHUNK),)
        ledger.forget(((0, MIB),))
        ledger.mark(0, MIB)  # it has come again, and was not compared yet
        ledger.make_durable(ledger.arrived)
    with here.ledger() as ledger:
        assert ledger.proven == ((MIB, CHUNK),)


def shown(here: Here) -> dict[str, list[list[int]]]:
    """The ranges of the transfer in the document of `audit`."""
    downloads = audit(here.path)["downloads"]
    return next(dict(each["ranges"]) for each in downloads if here.digest in each["digest"])


def test_damage_in_what_came_earlier_costs_its_chunk(here: Here) -> None:
    here.registry.hold(here.model.digests[0], at=(2 * CHUNK,))
    with Background(here.transfer(with_options(sums_from=MIB, connections=1))):
        wait_for(lambda: here.arrived() >= 2 * CHUNK - MIB)
    here.registry.release()
    before = here.served
    here_already = here.arrived()
    data = here.folder / transfers.DATA
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(content)
    here.pull(OPTIONS)
    assert "comparing its chunks with their sums" in here.notices()
    assert here.served - before == here.size - here_already + 1 + CHUNK


def test_wrong_bytes_that_were_taken_over_cost_their_chunk(here: Here) -> None:
    data = bytearray(here.content())
    data[6 * MIB] ^= 1
    fetched = here.fetch(OPTIONS, partials=(partial_of(here, bytes(data)),))
    (here.path / "blobs" / f"sha256-{here.digest}-partial").unlink()
    here.publish(fetched)
    here.check()
    assert here.served == CHUNK + 1
    assert "of the server's download 7.8 MB match their sums, 4.2 MB don't" in here.notices()


def test_right_chunks_are_taken_over_whatever_the_sidecars_say(here: Here) -> None:
    fetched = here.fetch(OPTIONS, partials=(partial_of(here, here.content()),))
    assert here.served == 0
    (here.path / "blobs" / f"sha256-{here.digest}-partial").unlink()
    here.publish(fetched)
    here.check()


@pytest.mark.parametrize("damaged", [False, True])
def test_what_became_ours_by_a_rename_is_compared_as_well(here: Here, damaged: bool) -> None:
    take(here, here.content())
    content = bytearray(here.content())
    content[6 * MIB] ^= damaged
    (here.folder / transfers.DATA).write_bytes(content)
    (here.path / "blobs" / f"sha256-{here.digest}-partial").unlink()
    here.pull(OPTIONS)
    # What was not recorded of the wrong chunk is fetched first, since the rest of it may be right.
    missing = TAKEN[1][0] - CHUNK
    assert here.served == (missing + CHUNK + 1 if damaged else 0)


def test_a_chunk_that_the_disk_can_not_give_back_is_fetched_over_it(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(here, here.content())
    (here.folder / transfers.DATA).write_bytes(here.content())
    (here.path / "blobs" / f"sha256-{here.digest}-partial").unlink()
    usual, failed = sums.hash_of, list[int]()

    def failing_once(fd: int, chunk: sums.Chunk) -> str:
        if chunk.start == CHUNK and not failed:
            failed.append(chunk.start)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return usual(fd, chunk)

    monkeypatch.setattr(sums, "hash_of", failing_once)
    here.pull(OPTIONS)
    missing = TAKEN[1][0] - CHUNK  # of that chunk, which was not recorded as a whole
    assert failed
    assert here.served <= missing + CHUNK + 1


def test_what_is_not_all_there_is_proven_once_it_is(here: Here) -> None:
    data = bytearray(here.content())
    data[6 * MIB] ^= 1
    partial = partial_of(here, bytes(data[: 9 * MIB]))._replace(trusted=((5 * MIB, 9 * MIB),))
    fetched = here.fetch(OPTIONS, partials=(partial,))
    assert here.served == here.size - 9 * MIB + CHUNK + 1
    (here.path / "blobs" / f"sha256-{here.digest}-partial").unlink()
    here.publish(fetched)
    here.check()


def test_with_sums_of_another_blob_what_was_taken_over_counts_as_without(here: Here) -> None:
    here.registry.manners = Manners(sums="other", chunk=CHUNK)
    fetched = here.fetch(OPTIONS, partials=(partial_of(here, here.content()),))
    assert here.served == 0
    (here.path / "blobs" / f"sha256-{here.digest}-partial").unlink()
    here.publish(fetched)
    here.check()


@pytest.mark.parametrize("kind", ["short", "host", ""])
def test_sums_that_are_cut_short_or_elsewhere_are_not_believed(here: Here, kind: str) -> None:
    here.registry.manners = Manners(sums=kind, chunk=CHUNK, wants="bearer")  # type: ignore[arg-type]
    here.pull(OPTIONS)
    assert here.served == here.size + 1
    assert asked_for_sums(here) == {"short": 3, "host": 2, "": 1}[kind]
    assert not is_said(here)
    elsewhere = [headers for path, headers in here.registry.asked if path.startswith("/sums/")]
    assert not any("Authorization" in headers for headers in elsewhere)


def test_sums_of_another_blob_cost_one_chunk_and_are_not_kept(here: Here) -> None:
    here.registry.manners = Manners(sums="other", chunk=CHUNK)
    here.pull(OPTIONS)
    assert here.served == here.size + 1 + CHUNK
    assert "belong to other data, and are ignored" in here.notices()
    assert not is_said(here)


def test_a_stream_of_sums_that_breaks_is_asked_for_again(here: Here) -> None:
    words = "sha256:" + "a" * 64 + f" 0-{CHUNK - 1}\n"
    here.registry.add_fault(Fault("page", on="sums", status=200, body=words, cut=True, times=1))
    here.pull(OPTIONS)
    assert asked_for_sums(here) == 2
    assert is_said(here)


def test_a_line_that_damages_a_chunk_every_time_ends_it_and_keeps_the_rest(here: Here) -> None:
    damaging = here.registry.add_fault(Fault("flip", begin=CHUNK, end=CHUNK + 1, after=5))
    with pytest.raises(values.TransferError, match="3 times in a row") as caught:
        here.fetch(with_options(sums_from=MIB, tries=3))
    assert caught.value.cause is values.Cause.MISMATCH
    here.registry.remove_fault(damaging)
    before, rest = here.served, here.size - here.arrived()
    here.pull(OPTIONS)
    assert here.served - before == rest + 1 + CHUNK


# ---------------------------------------------------------------- ours


@pytest.fixture
def silent(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry has no sums, and ours are of chunks that a test can afford."""
    pytest.importorskip("xxhash")
    here.registry.manners = Manners()
    monkeypatch.setattr(sums, "CHUNK", CHUNK)


def emptied(here: Here) -> None:
    """Nothing of the model is there any more, but what is known of it."""
    here.manifest.unlink()
    for path in (here.path / "blobs").iterdir():
        path.unlink()


@pytest.mark.usefixtures("silent")
def test_of_a_layer_that_came_out_right_sums_of_ours_are_kept(here: Here) -> None:
    here.pull(with_options(sums_from=MIB, piece=MIB + 7))
    chunks = sums.parsed(kept(here).read_bytes(), here.size)
    assert [(each.start, each.kind) for each in chunks] == [
        (start, sums.OURS) for start in range(0, here.size, CHUNK)
    ]
    with here.blob.open("rb") as file:
        assert not any(sums.wrong(file.fileno(), each) for each in chunks)


@pytest.mark.usefixtures("silent")
def test_no_sums_are_made_of_what_is_small_or_wrong(here: Here) -> None:
    damaging = here.registry.add_fault(Fault("flip", begin=6 * MIB, end=6 * MIB + 1, after=5))
    with pytest.raises(values.TransferError):
        here.fetch(OPTIONS)
    assert not kept(here).exists()
    here.registry.remove_fault(damaging)
    here.pull()
    assert not kept(here).exists()


@pytest.mark.usefixtures("silent")
def test_sums_of_ours_prove_the_chunks_of_a_later_pull(here: Here) -> None:
    here.pull(OPTIONS)
    ours, before = kept(here).read_bytes(), here.served
    emptied(here)
    here.registry.add_fault(Fault("flip", begin=6 * MIB, end=6 * MIB + 1, after=5, times=1))
    here.pull(OPTIONS)
    assert here.served - before == here.size + 1 + CHUNK
    assert kept(here).read_bytes() == ours


@pytest.mark.usefixtures("silent")
def test_the_registrys_take_the_place_of_ours(here: Here) -> None:
    here.pull(OPTIONS)
    assert not is_said(here)
    emptied(here)
    here.registry.manners = Manners(sums="complete", chunk=CHUNK)
    here.pull(OPTIONS)
    assert is_said(here)


@pytest.mark.usefixtures("silent")
def test_sums_of_ours_that_somebody_has_changed_cost_one_chunk(here: Here) -> None:
    here.pull(OPTIONS)
    ours = kept(here).read_bytes()
    kept(here).write_bytes(ours.replace(ours[9:13], b"0123"))
    emptied(here)
    before = here.served
    here.pull(OPTIONS)
    assert here.served - before == here.size + 1 + CHUNK
    assert kept(here).read_bytes() == ours
