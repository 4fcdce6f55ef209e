"""What a server has just finished keeps its bytes in our folder until a manifest is there."""

from __future__ import annotations

import errno
import hashlib
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.filesize import decimal

from tests.support.driving import HealthyStore, audit, host, private_proc, run
from tests.support.notation import age
from tests.support.runs import changed, one_look, one_run, rules, surveyed
from tests.support.transfers import held
from tests.transfer.driven import Here as Driven
from tests.unit.decide.seen import server
from watcher.act import second_names
from watcher.act.journal import Journal, locked
from watcher.config import Settings
from watcher.decide import modes, usage
from watcher.decide import second_names as decided
from watcher.demo.registry import Manners, Registry
from watcher.model import DAY, HOUR, MIB, Evidence, Plan, Rules, UseKind
from watcher.observe import place
from watcher.observe.host import Host
from watcher.reconcile import QUESTIONS, Reconciler, Report
from watcher.state import folders, fs, registry_cache, sums, transfers
from watcher.transfer.mending import Mender
from watcher.transfer.values import Layer

from .conftest import NOBODY, needs_root, open_parents

SIZE = 2_000_000
CLEAN = rules(repair=False, clean=True, writers_visible=True)
VERIFY = rules(repair=False, hash=True, verify=True, writers_visible=True)
#: What the daemon does at a look.
WATCH = rules(patient=True, writers_visible=True)


class Here:
    """A store with a blob that a server has just finished and no manifest names, kept by us."""

    def __init__(self, tmp_path: Path) -> None:
        self.store = HealthyStore(tmp_path / "models")
        self.digest = self.store.text_blob("x" * SIZE, 0)
        proc = Path(private_proc(tmp_path / "proc"))
        (proc / "sys").symlink_to("/proc/sys")  # which start of the machine this is
        self.host: Host = host(self.store, str(proc))

    @property
    def blob(self) -> Path:
        return self.store.blobs / f"sha256-{self.digest}"

    @property
    def folder(self) -> Path:
        return self.store.ours / "transfers" / self.digest

    @property
    def is_kept(self) -> bool:
        found = (self.folder / "data").exists()
        assert found or not self.folder.exists()
        return found

    def keep(self) -> str:
        return second_names.keep(self.host, [self.digest])

    def named(self) -> None:
        self.store.manifest_of("now-here", self.digest, self.store.digests[1])

    def run(self, by: Rules = WATCH) -> Report:
        return one_run(self.host, by)

    def seen(self) -> Evidence:
        return one_look(self.host, WATCH).evidence


@pytest.fixture
def here(tmp_path: Path) -> Here:
    found = Here(tmp_path)
    assert found.keep() == ""
    assert os.path.samefile(found.folder / "data", found.blob)
    return found


def old(here: Here) -> None:
    age(here.blob, HOUR + 60)


def another_comes(here: Here) -> None:
    old(here)
    here.store.download("another", aged=60)


def named_while_another_comes(here: Here) -> None:
    here.named()
    here.store.download("another", aged=60)


def another_came(here: Here) -> None:
    """The last layer of the pull; all of them are young for as long as it has been over."""
    old(here)
    here.store.text_blob("another", 60)


def beside(here: Here) -> None:
    """The server downloads the layer once more, and takes the name from this file."""
    here.named()
    here.store.partial(here.digest).write_bytes(b"begun")


@pytest.mark.parametrize(
    ("how", "by", "stays"),
    [
        (lambda _: None, WATCH, True),
        (Here.named, WATCH, False),
        (named_while_another_comes, WATCH, False),
        (beside, WATCH, True),
        (old, WATCH, False),
        (another_comes, WATCH, True),
        (another_came, WATCH, True),
        (lambda _: None, CLEAN, False),
        (Here.named, VERIFY, True),
    ],
)
def test_when_it_goes(here: Here, how: Callable[[Here], None], by: Rules, stays: bool) -> None:
    how(here)
    before = here.blob.read_bytes()
    report = here.run(by)
    assert not report.outcomes or by is VERIFY
    assert here.is_kept == stays
    assert here.blob.read_bytes() == before
    assert here.blob.stat().st_nlink == 1 + stays


def test_while_a_server_may_be_hashing_it_it_stays(here: Here) -> None:
    old(here)
    seen = here.seen()
    assert decided.needless(seen, clean=False) == {here.digest}
    held = seen._replace(second_names=tuple(x._replace(held=True) for x in seen.second_names))
    assert decided.needless(held, clean=False) == set()


def test_what_a_daemon_that_was_away_makes(tmp_path: Path) -> None:
    here = Here(tmp_path)
    seen = here.seen()
    assert not decided.wanted(seen), "no server is there that could discard it"
    seen = seen._replace(servers=(server(),))
    assert decided.wanted(seen) == {here.digest}
    assert not decided.wanted(seen._replace(scope=frozenset({here.digest})))
    (entry,) = seen.census.unnamed
    hashed = seen.census._replace(unnamed=(entry._replace(sha256=here.digest),))
    assert not decided.wanted(seen._replace(census=hashed))
    assert not decided.wanted(seen._replace(now=seen.now + HOUR, clock=None))
    here.keep()
    assert not decided.wanted(here.seen()._replace(servers=(server(),)))


@pytest.mark.parametrize("restarted", [False, True])
def test_what_no_server_has_hashed_is_hashed_here(here: Here, restarted: bool) -> None:
    """Its server has ended before it did, and to the next one's pull the layer was there."""
    here.run()
    here.named()
    since = (here.folder / "ledger").stat().st_mtime + (0.5 if restarted else -2)
    seen = here.seen()._replace(servers=(server(since=since),))
    with folders.opened_store(str(here.store.path)) as store, locked(store, 1.0):
        journal = Journal(store, WATCH.settings, here.host)
        known = second_names.let_go(journal, journal.recall(), seen, clean=False)
        assert (
            known.unproven == journal.recall().unproven == ({here.digest} if restarted else set())
        )
    assert not here.is_kept


def test_of_some_digests_nobody_knows_whether_a_manifest_names_them(here: Here) -> None:
    here.named()
    one_run(here.host, WATCH, frozenset({here.digest}))
    assert here.is_kept


@pytest.mark.parametrize("is_discarded", [False, True])
def test_a_disk_that_is_as_full_as_it_may_be_keeps_none(
    here: Here, monkeypatch: pytest.MonkeyPatch, is_discarded: bool
) -> None:
    monkeypatch.setattr(transfers, "reserve", lambda _: 1 << 62)
    if is_discarded:
        here.blob.unlink()
    one_run(here.host, WATCH, frozenset({"0" * 64}))
    assert not here.is_kept
    if not is_discarded:
        assert here.keep() == ""
        assert not here.is_kept


def test_a_full_disk_takes_none_from_a_pull_of_ours(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps its file by one while a server downloads the same layer, and may replace that."""
    beside(here)
    (here.folder / "ledger").write_bytes(
        transfers.encoded(here.digest, transfers.Kept(SIZE, ((0, SIZE),)))
    )
    monkeypatch.setattr(transfers, "reserve", lambda _: 1 << 62)
    here.run()
    assert here.is_kept


@pytest.mark.parametrize("left", [["data"], ["data", "ledger"], ["data", "arrived"], ["ledger"]])
def test_what_a_power_cut_leaves_goes_as_well(here: Here, left: list[str]) -> None:
    for path in here.folder.iterdir():
        if path.name not in left:
            path.unlink()
        elif path.name != "data":
            path.write_bytes(b"")
    here.run(CLEAN)
    assert not here.is_kept
    assert here.blob.stat().st_nlink == 1


def test_after_another_start_of_the_machine_none_of_it_is_believed(
    here: Here, tmp_path: Path
) -> None:
    here.blob.unlink()
    (found,) = here.seen().downloads
    assert found.trust.trusted == ((0, SIZE),)
    assert (found.trust.claimed, found.may_be_right) == ((), True)
    (tmp_path / "proc/sys").unlink()
    name = tmp_path / "proc/sys/kernel/random/boot_id"
    name.parent.mkdir(parents=True)
    name.write_text("another start")
    (found,) = here.seen().downloads
    assert (found.trust.trusted, found.may_be_right) == ((), False)
    age(here.folder / "data", 61)
    here.run(changed(CLEAN, stale_after=60.0))
    assert not here.is_kept


# ---------------------------------------------------------------- what it counts as


def test_it_is_no_download_and_no_orphan_of_its_own(here: Here) -> None:
    report = one_look(here.host, changed(WATCH, clean=True))
    assert not report.evidence.downloads
    assert [each.digest for each in report.evidence.second_names] == [here.digest]
    kinds = {each.kind for each in report.diagnosis.findings}
    assert not {each for each in kinds if each.startswith("download_")}


def test_an_orphan_with_one_counts_once_and_is_freed_whole(here: Here) -> None:
    age(here.blob, 8 * DAY)
    seen = one_look(here.host, CLEAN)
    uses, _ = usage.usage(surveyed(here.host), seen.diagnosis.diagnosed, seen.evidence.census)
    allocated = here.blob.stat().st_blocks * 512
    (use,) = [each for each in uses if each.kind is UseKind.ORPHAN]
    assert use.sizes.allocated == use.sizes.freed == allocated
    (orphan,) = [each for each in here.run(CLEAN).outcomes if each.action.subject == here.blob.name]
    assert (orphan.action.frees, orphan.freed) == (allocated, allocated)
    assert not here.blob.exists()
    assert not here.is_kept


def test_it_is_protected_from_pruning_all_the_same(here: Here) -> None:
    """Root sets no times of a file that has a name elsewhere, and this one is ours."""
    age(here.blob, HOUR)
    one_run(here.host, rules(refresh=True, repair=False, writers_visible=True))
    assert time.time() - here.blob.stat().st_mtime < HOUR / 2


def test_what_was_hashed_is_not_hashed_anew(tmp_path: Path) -> None:
    """Each of its two names changes the time by which a hash is known to hold."""
    here = Here(tmp_path)
    before = here.blob
    here.digest = hashlib.sha256(before.read_bytes()).hexdigest()
    before.rename(here.blob)
    here.keep()
    here.named()
    assert len(here.run(VERIFY).outcomes) == 3
    age_before = here.blob.stat().st_ctime_ns
    here.run()
    assert not here.is_kept
    assert here.blob.stat().st_ctime_ns != age_before
    assert not here.run(VERIFY).outcomes


# ---------------------------------------------------------------- where it can't be kept


@pytest.mark.parametrize("code", [errno.EPERM, errno.EMLINK, errno.EXDEV])
def test_without_hard_links_nothing_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    here = Here(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fs, "second_name", refuse)
    assert here.keep() == f"a hard link fails: {os.strerror(code)}"
    assert not here.folder.exists()


def test_data_of_a_transfer_of_ours_stays_as_it_is(here: Here) -> None:
    data = here.folder / "data"
    data.unlink()
    data.write_bytes(b"ours")
    assert here.keep() == ""
    assert data.read_bytes() == b"ours"


@pytest.mark.parametrize("how", [os.mkfifo, lambda path: path.symlink_to("/etc/passwd"), os.mkdir])
def test_what_is_no_file_gets_none(tmp_path: Path, how: Callable[[Path], None]) -> None:
    here = Here(tmp_path)
    here.blob.unlink()
    how(here.blob)
    assert here.keep() == ""
    assert not here.folder.exists()


@needs_root
def test_another_users_blob_gets_none_and_says_nothing_of_the_store(
    tmp_path: Path, as_nobody: Callable[[Sequence[str]], list[str]]
) -> None:
    here = Here(tmp_path)
    open_parents(here.store.path)
    for path in (here.store.path, here.store.blobs, here.store.path / "manifests"):
        os.chown(path, NOBODY, NOBODY)
    code = (
        "import sys; from watcher.act import second_names; from watcher.observe.host import Host; "
        "print(repr(second_names.keep(Host(sys.argv[1]), sys.argv[2:])))"
    )
    words = as_nobody(["-c", code, str(here.store.path), here.digest, here.store.digests[0]])
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.stdout == "''\n", done.stderr
    assert not list(here.store.ours.glob("transfers/*"))


def test_a_blob_that_has_gone_leaves_nothing(tmp_path: Path) -> None:
    here = Here(tmp_path)
    here.blob.unlink()
    assert here.keep() == ""
    assert not here.folder.exists()


# ---------------------------------------------------------------- discarded


CHUNK = 4 * MIB


@pytest.fixture
def discarded(tmp_path: Path, registry: Registry) -> Driven:
    """A server has found a finished layer wrong, which has wrong bytes in the middle."""
    here = Driven(tmp_path / "models", registry, sums.FROM + CHUNK)
    registry.manners = Manners(sums="complete", chunk=CHUNK)
    content = bytearray(here.content())
    content[5 * CHUNK : 5 * CHUNK + 100] = b"<html>the gateway has timed out</html>".ljust(100)
    here.blob.write_bytes(content)
    assert second_names.keep(Host(str(here.path)), [here.digest]) == ""
    here.blob.unlink()
    return here


def judge(path: Path, digest: str) -> bool:
    """What the daemon does once a server has removed a layer."""
    return second_names.judge(Host(str(path)), digest)


def test_what_was_removed_for_another_reason_goes_unsaid(
    tmp_path: Path, registry: Registry
) -> None:
    """By `ollama rm`, or by a server's start, while the daemon was away."""
    here = Driven(tmp_path / "models", registry, SIZE)
    here.blob.write_bytes(here.content())
    host = Host(str(here.path))
    assert second_names.keep(host, [here.digest]) == ""
    here.blob.unlink()
    assert not one_run(host, WATCH).events
    assert judge(here.path, here.digest)
    assert not here.folder.exists()
    assert not one_run(host, WATCH).events


def test_what_a_process_is_at_is_not_judged(here: Here) -> None:
    here.blob.unlink()
    with held(here.folder):
        assert not judge(here.store.path, here.digest)
    assert judge(here.store.path, here.digest)


def test_what_a_server_discards_is_reported_once_and_repaired_as_printed(
    discarded: Driven,
) -> None:
    here = discarded
    assert not one_run(Host(str(here.path)), WATCH).events, "it may be right"
    assert judge(here.path, here.digest)
    log = here.path / ".ollama-watch/logs/events.jsonl"
    for _ in range(2):
        one_run(Host(str(here.path)), WATCH)
        assert log.read_text().count('"download_discarded"') == 1
    (finding,) = [x for x in audit(here.path)["findings"] if x["kind"] == "download_discarded"]
    assert finding["command"] == "", "nobody knows the model yet"
    assert "repair --fetch MODEL" in finding["remedy"]
    verdict = " ".join(run(here.path, "audit").stdout.split()).partition(" store ")[0]
    assert "The server discarded it after a checksum mismatch." in verdict
    assert "run `ollama-watch repair --fetch MODEL` with the name" in verdict
    assert "esumable" not in verdict
    assert "100 %" not in verdict
    with folders.opened_store(str(here.path)) as store:
        registry_cache.keep(store, here.name, here.model.manifest, "", time.time())
    (finding,) = [x for x in audit(here.path)["findings"] if x["kind"] == "download_discarded"]
    words = shlex.split(finding["command"])
    here.registry.reset_stats()
    done = run(here.path, *words[words.index("repair") :], "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert here.served <= CHUNK + 1
    assert here.blob.read_bytes() == here.content()
    assert not here.folder.exists()


def test_it_is_reported_if_no_scan_came_between_the_download_and_its_end(here: Here) -> None:
    here.folder.rename(aside := here.store.path.parent / "aside")
    here.blob.rename(partial := here.store.partial(here.digest))
    looks = changed(WATCH, repair=False)
    assert [each.event_type for each in here.run(looks).events] == ["partial_found"]
    aside.rename(here.folder)
    partial.unlink()
    assert judge(here.store.path, here.digest)
    assert [each.event_type for each in here.run(looks).events] == ["download_discarded"]
    assert not here.run(looks).events


def test_what_a_server_discards_is_not_given_back_to_it(discarded: Driven) -> None:
    """It would discard it once more, and no daemon may be there to keep it."""
    here = discarded
    assert judge(here.path, here.digest)
    done = run(here.path, "repair", "--give-back", "--yes", here.digest[:12])
    assert done.returncode == 3, done.stdout
    words = " ".join(done.stdout.split())
    assert "its hash is wrong: the server would discard it again" in words
    assert (here.folder / "data").stat().st_size == here.size


def test_without_sums_the_plan_names_the_reason_and_the_whole_layer(discarded: Driven) -> None:
    here = discarded
    here.registry.manners = Manners()
    words = run(here.path, "repair", "-n", here.model.name).stdout.split()
    assert "the server discarded it" in " ".join(words)
    assert "at most 71.3 MB" in " ".join(words)
    assert here.served == 0
    assert (here.folder / "data").exists()
    assert judge(here.path, here.digest)
    for target in (here.model.name, here.digest[:12]):
        done = run(here.path, "repair", "--yes", target)
        assert (here.served, done.returncode) == (0, 1), done.stdout
        assert "Not repaired: the server discarded its finished download" in done.stdout
        assert "repair --fetch sha256-" in " ".join(done.stdout.split())
    done = run(here.path, "repair", "--yes", "--fetch", here.model.name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert here.blob.read_bytes() == here.content()
    assert here.served <= here.size + 1


def test_a_plan_names_what_is_wrong_of_it_once_that_was_compared(discarded: Driven) -> None:
    """Before the prompt it is, if the registry serves sums of its chunks."""
    here, host = discarded, Host(str(discarded.path))
    assert judge(here.path, here.digest)
    with folders.opened_store(str(here.path)) as store:
        registry_cache.keep(store, here.name, here.model.manifest, "", time.time())
    settings = Settings(writers_visible=True)
    host = replace(host, sums=Mender(host, settings).sums)
    mode = modes.REPAIR._replace(fetch=True)
    seen: list[int] = []

    def questions(plan: Plan) -> Plan:
        seen.append(plan.fetches)
        return plan.filtered(lambda each: each.kind in QUESTIONS)

    Reconciler(host, settings).reconcile(mode, approve=questions)
    assert (seen[-1], here.served) == (CHUNK, 0)
    done = run(here.path, "repair", "--yes", "--fetch", here.digest[:12])
    assert done.returncode == 0, done.stdout
    assert f"is right, {decimal(CHUNK)} fetched" in " ".join(done.stdout.split())
    assert here.served == CHUNK + 1


def begun_anew(here: Driven) -> None:
    """A pull has found all of it wrong, and was stopped when it had fetched some."""
    with here.ledger() as ledger:
        ledger.forget(((0, here.size),))
        ledger.mark(0, CHUNK)


def fetched_anew(here: Driven) -> None:
    """All of it, and it was stopped before it hashed that."""
    (here.folder / "data").write_bytes(here.content())
    with here.ledger(place.boot(Host(str(here.path)))) as ledger:
        ledger.forget(((0, here.size),))
        ledger.mark(0, here.size)


def found_right(here: Driven) -> None:
    """It was right all the time, and waits for its name while its pull fetches another layer."""
    (here.folder / "data").write_bytes(here.content())
    boot = place.boot(Host(str(here.path)))
    assert here.fetch(boot=boot, layers=(Layer(here.digest, here.size),)).verified
    assert here.served == 0


@pytest.mark.parametrize("how", [begun_anew, fetched_anew, found_right])
def test_what_a_pull_of_ours_has_gone_on_with_is_its_own(
    discarded: Driven, monkeypatch: pytest.MonkeyPatch, how: Callable[[Driven], None]
) -> None:
    """Nobody judges it and lets it go, and a full disk takes nothing of it."""
    here, host = discarded, Host(str(discarded.path))
    here.registry.manners = Manners()
    how(here)
    before = (here.folder / "data").stat()
    (found,) = one_look(host, WATCH).evidence.downloads
    assert (found.by_server, found.discarded, found.may_be_right) == (True, False, False)
    assert not judge(here.path, here.digest)
    monkeypatch.setattr(transfers, "reserve", lambda _: 1 << 62)
    one_run(host, WATCH)
    assert (here.folder / "data").stat() == before


def test_a_pull_after_a_kill_before_the_second_name_is_a_pull(discarded: Driven) -> None:
    here, data = discarded, discarded.folder / "data"
    data.unlink()
    with here.ledger(place.boot(Host(str(here.path)))) as ledger:
        ledger.mark(0, ledger.layer.size)
        ledger.make_durable(())
    data.write_bytes(here.content())
    assert not judge(here.path, here.digest)
    assert data.exists()


@pytest.mark.slow("as a repair, by the same transfer")
def test_a_pull_of_ours_goes_on_from_it(discarded: Driven) -> None:
    discarded.pull()
    assert discarded.served <= CHUNK + 1


def test_it_goes_once_another_pull_of_the_server_has_a_manifest(here: Here) -> None:
    content = here.blob.read_bytes()
    here.blob.unlink()
    here.blob.write_bytes(content)
    here.run()
    assert here.is_kept
    here.named()
    here.run()
    assert not here.is_kept
