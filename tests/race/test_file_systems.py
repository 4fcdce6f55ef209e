"""Acts on file systems without hard links, and on overlays, where a file changes its inode."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import needs_root
from tests.support.driving import POLICY, HealthyStore, host, ollama_process, private_proc
from tests.support.notation import age
from tests.support.runs import one_look, one_run, rules
from watcher import reconcile
from watcher.act import second_names, transaction
from watcher.decide import safety
from watcher.model import ActionKind, RefusalKind, Result

pytestmark = needs_root

REPAIR = rules(repair=True, repair_stale=True, writers_visible=True)
TAKE = rules(repair=False, clean=False, take_over=True, writers_visible=True)
MB = 1 << 20


@pytest.fixture
def one_at_a_time(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What one of these tests has the kernel forget it forgets of the others in other workers."""
    with (tmp_path_factory.getbasetemp().parent / "inodes.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(params=["vfat", "exfat", "exfat-fuse"])
def linkless(request: pytest.FixtureRequest, tmp_path: Path, one_at_a_time: None) -> Iterator[Path]:
    """A file system on a loop device that has no hard links; by FUSE it is of no known type."""
    kind, _, by_fuse = request.param.partition("-")
    make, mount = shutil.which(f"mkfs.{kind}"), shutil.which("mount.exfat-fuse")
    if make is None or (by_fuse and mount is None):
        pytest.skip(f"mkfs.{kind}, or mount.exfat-fuse, is missing")
    image, point = tmp_path / "image", tmp_path / "mounted"
    with image.open("wb") as file:
        file.truncate(64 * MB)
    subprocess.run([make, str(image)], check=True, capture_output=True)
    point.mkdir()
    loop = subprocess.run(["losetup", "-f", "--show", str(image)], capture_output=True, text=True)
    device = loop.stdout.strip()
    words = [str(mount)] if by_fuse else ["mount", "-t", kind]
    done = subprocess.run([*words, device, str(point)], capture_output=True, text=True)
    try:
        if loop.returncode or done.returncode:
            pytest.skip(f"can't be mounted here: {loop.stderr.strip()} {done.stderr.strip()}")
        yield point
        subprocess.run(["umount", str(point)], check=True)
    finally:
        subprocess.run(["losetup", "-d", device], check=False)


class Layers:
    """An overlay: what lies there at first is a lower layer's, on another file system."""

    def __init__(self, lower: Path, upper: Path) -> None:
        self.lower, self._upper = lower, upper
        self.merged = upper / "merged"
        for folder in (lower, *(upper / name for name in ("upper", "work", "merged"))):
            folder.mkdir()

    def mount(self) -> None:
        """Show it, and what the lower layer has by now."""
        where = f"lowerdir={self.lower},upperdir={self._upper}/upper,workdir={self._upper}/work"
        words = ["mount", "-t", "overlay", "overlay", "-o", f"{where},xino=off", str(self.merged)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"can't be mounted here: {done.stderr.strip()}")


@pytest.fixture
def layers(tmp_path: Path, one_at_a_time: None) -> Iterator[Layers]:
    """The upper layer in memory: an overlay can't lie on another one."""
    upper = Path(tempfile.mkdtemp(prefix="overlay-", dir="/dev/shm"))
    upper.chmod(0o755)
    made = Layers(tmp_path / "lower", upper)
    yield made
    if os.path.ismount(made.merged):
        subprocess.run(["umount", "-l", str(made.merged)], check=True)
    shutil.rmtree(upper)


def proc_of(tmp_path: Path, *pids: int) -> str:
    return private_proc(tmp_path / "proc", *pids)


def broken(store: HealthyStore, text: str = "broken") -> str:
    """A download with a sidecar missing."""
    digest = store.download(text, aged=7200)
    store.partial(digest, 2).unlink()
    return digest


def results(report: reconcile.Report) -> list[Result]:
    return [each.result for each in report.outcomes]


def kept(store: HealthyStore) -> list[str]:
    folder = store.ours / "quarantine"
    return sorted(os.listdir(folder)) if folder.exists() else []


# ---------------------------------------------------------------- without hard links


def test_without_hard_links_what_broke_is_repaired_and_what_is_stale_goes(
    linkless: Path, tmp_path: Path
) -> None:
    store = HealthyStore(linkless / "models")
    digests = [broken(store, text) for text in "ab"]
    stale = store.download("stale")
    here = host(store, proc_of(tmp_path))
    assert results(one_run(here, REPAIR, approve=only(*digests))) == [Result.DONE] * 2
    for digest in digests:
        assert all(path.stat().st_size for path in store.blobs.glob(f"*{digest}-partial-*"))
    assert results(one_run(here, POLICY)) == [Result.DONE]
    assert store.partials(stale) == []
    assert store.leftovers() == []


def taken_over(store: HealthyStore, digest: str, tmp_path: Path) -> None:
    """All that is trusted of a download becomes a transfer's."""
    here = host(store, proc_of(tmp_path))
    (left,) = one_look(here, TAKE).diagnosis.diagnosed
    assert left.download.trust.trusted
    assert results(one_run(here, TAKE)) == [Result.DONE]
    assert store.partials(digest) == []
    (ours,) = one_look(here, TAKE).diagnosis.diagnosed
    assert ours.download.ours
    assert ours.download.trust.trusted == left.download.trust.trusted
    assert store.leftovers() == []


def test_without_hard_links_what_a_server_has_left_is_taken_over(
    linkless: Path, tmp_path: Path
) -> None:
    store = HealthyStore(linkless / "models")
    taken_over(store, broken(store), tmp_path)


def forget(*_: object) -> None:
    """Have the kernel drop what it knows of files: some get another inode when they are read again.

    That is so for all of the machine, and those of the tests beside this one.
    """
    Path("/proc/sys/vm/drop_caches").write_text("2")


def once_seen(planned: Any) -> Any:
    forget()
    return planned


def once_begun(event: Any) -> None:
    if event.event_type == "act_started":
        forget()


def test_without_hard_links_a_file_that_the_kernel_forgets_meanwhile_is_the_same(
    linkless: Path, tmp_path: Path
) -> None:
    """It gets another inode, and so does its folder."""
    store = HealthyStore(linkless / "models")
    here = host(store, proc_of(tmp_path), report=once_begun)
    left = broken(store, "left")
    assert results(one_run(here, TAKE, approve=once_seen)) == [Result.DONE]
    broken(store)
    stale = store.download("stale")
    orphan = store.text_blob("orphan")
    label = kept_in_quarantine(store)
    restore = rules(repair=False, restore=frozenset({label}), writers_visible=True)
    for policy, expected in ((REPAIR, 1), (POLICY, 2), (restore, 1)):
        report = one_run(here, policy, approve=once_seen)
        assert results(report) == [Result.DONE] * expected, report.outcomes
    assert store.partials(left) == store.partials(stale) == []
    assert not (store.blobs / f"sha256-{orphan}").exists()
    assert (store.blobs / label.partition("-")[2]).exists()


def kept_in_quarantine(store: HealthyStore) -> str:
    """Move a blob of the healthy model there; its label."""
    name = f"sha256-{store.digests[0]}"
    folder = store.ours / "quarantine"
    folder.mkdir(parents=True)
    (store.blobs / name).rename(folder / f"00000001-{name}")
    return f"00000001-{name}"


def only(*digests: str) -> Any:
    return lambda planned: planned.filtered(lambda each: each.subject in digests)


def test_without_hard_links_nothing_is_done_beside_a_server(linkless: Path, tmp_path: Path) -> None:
    store = HealthyStore(linkless / "models")
    digest = broken(store)
    before = store.tree()
    with ollama_process(tmp_path) as pid:
        report = one_run(host(store, proc_of(tmp_path, pid)), REPAIR)
    acted = (each.refusal for each in report.outcomes)
    (refused,) = [each for each in (*report.plan.refusals, *acted) if each]
    assert refused.subject == digest
    assert refused.kind is RefusalKind.SERVER_RUNS
    assert "no hard links" in refused.why
    assert refused.remedy
    assert store.tree() == before
    assert store.leftovers() == []


def test_other_inodes_beside_a_server_are_no_change_where_files_get_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of FUSE once the kernel has dropped those that it knew; elsewhere a file was replaced."""
    store = HealthyStore(tmp_path / "models")
    digest = broken(store)
    before = sorted(store.tree())
    put_guard = transaction._put_guard

    def dropped(*words: Any) -> None:
        progress = store.partial(digest, 0)
        shutil.copy2(progress, aside := store.path / "copy")
        aside.replace(progress)
        put_guard(*words)

    monkeypatch.setattr(transaction, "_put_guard", dropped)
    for is_loose, kind in (True, RefusalKind.SERVER_RUNS), (False, RefusalKind.CHANGED):
        monkeypatch.setattr(safety, "is_loose", lambda _, is_so=is_loose: is_so)
        with ollama_process(tmp_path) as pid:
            report = one_run(host(store, proc_of(tmp_path, pid)), REPAIR)
        (refused,) = [each.refusal for each in report.outcomes if each.refusal]
        assert refused.kind is kind
        assert ("another inode" in refused.why) == is_loose
        assert sorted(store.tree()) == before
        shutil.rmtree(tmp_path / "proc")


def test_without_reliable_hard_links_a_finished_layer_gets_no_second_name(linkless: Path) -> None:
    store = HealthyStore(linkless / "models")
    digest = store.text_blob("finished", 0)
    why = second_names.keep(host(store), [digest])
    assert "hard link" in why
    assert not list(store.path.glob(".ollama-watch/transfers/*"))


@pytest.mark.parametrize("step", ["_check_unchanged", "_take_of_download", "_decide"])
def test_without_hard_links_a_kill_is_put_back_to_the_byte(
    step: str, linkless: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other inodes then: the kernel has dropped those that it knew."""
    store = HealthyStore(linkless / "models")
    digest = broken(store)
    before = texts(store)
    here = host(store, proc_of(tmp_path))
    pid = os.fork()
    if pid == 0:
        setattr(transaction, step, lambda *_: os._exit(9))
        one_run(here, REPAIR)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert store.partial(digest, 0).read_bytes() == b""
    forget()
    for _ in range(2):
        report = one_run(here, rules(repair=False, writers_visible=True))
        assert not report.stuck
    assert texts(store) == before
    assert store.leftovers() == []
    assert results(one_run(here, REPAIR)) == [Result.DONE]


def texts(store: HealthyStore) -> dict[str, tuple[bytes, float]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime) for path in store.blobs.iterdir()}


# ---------------------------------------------------------------- overlays


def lower(layers: Layers, *texts: str, aged: float = 7200) -> tuple[HealthyStore, list[str]]:
    """A store whose downloads lie in a lower layer."""
    below = HealthyStore(layers.lower / "models")
    digests = [below.download(text, aged=aged) for text in texts]
    for digest in digests:
        below.partial(digest, 2).unlink()
    layers.mount()
    store = HealthyStore.at(layers.merged / "models")
    return store, digests


def test_on_an_overlay_what_lies_in_a_lower_layer_is_repaired(
    layers: Layers, tmp_path: Path
) -> None:
    store, digests = lower(layers, "a", "b")
    here = host(store, proc_of(tmp_path))
    assert results(one_run(here, REPAIR)) == [Result.DONE] * 2
    for digest in digests:
        assert all(path.stat().st_size for path in store.blobs.glob(f"*{digest}-partial-*"))
    assert kept(store) == []


def test_on_an_overlay_what_a_server_has_left_in_a_lower_layer_is_taken_over(
    layers: Layers, tmp_path: Path
) -> None:
    store, (digest,) = lower(layers, "a")
    taken_over(store, digest, tmp_path)


def test_on_an_overlay_a_finished_layer_gets_no_second_name(layers: Layers) -> None:
    layers.mount()
    store = HealthyStore(layers.merged / "models")
    digest = store.text_blob("finished", 0)
    why = second_names.keep(host(store), [digest])
    assert why == "overlay has no reliable hard links"


def test_on_an_overlay_what_is_stale_in_a_lower_layer_goes(layers: Layers, tmp_path: Path) -> None:
    store, (digest,) = lower(layers, "stale", aged=8 * 86400)
    assert results(one_run(host(store, proc_of(tmp_path)), POLICY)) == [Result.DONE]
    assert list(store.blobs.glob(f"*{digest}*")) == []
    assert kept(store) == []


def test_on_an_overlay_beside_a_server_it_is_refused_and_nothing_piles_up(
    layers: Layers, tmp_path: Path
) -> None:
    store, _ = lower(layers, "a")
    before = texts(store)
    with ollama_process(tmp_path) as pid:
        here = host(store, proc_of(tmp_path, pid))
        for _ in range(3):
            (outcome,) = one_run(here, REPAIR).outcomes
            assert outcome.result is Result.REFUSED
            assert outcome.refusal is not None
            assert outcome.refusal.kind is RefusalKind.SERVER_RUNS
            assert "another inode" in outcome.message
    assert texts(store) == before
    assert kept(store) == []
    assert list((store.ours / "intents").iterdir()) == []


def test_on_an_overlay_files_of_the_upper_layer_are_changed_beside_a_server(
    layers: Layers, tmp_path: Path
) -> None:
    layers.mount()
    store = HealthyStore(layers.merged / "models")
    broken(store)
    with ollama_process(tmp_path) as pid:
        report = one_run(host(store, proc_of(tmp_path, pid)), REPAIR)
    assert results(report) == [Result.DONE]


def test_a_file_that_was_exchanged_meanwhile_is_no_copy_of_it(
    layers: Layers, tmp_path: Path
) -> None:
    """On an overlay sizes and times count; another time is another file."""
    store, (digest,) = lower(layers, "a")
    path = store.partial(digest, 0)

    def exchange(event: Any) -> None:
        if event.event_type == "act_started":
            age(path, 60)

    report = one_run(host(store, proc_of(tmp_path), report=exchange), REPAIR)
    (outcome,) = report.outcomes
    assert outcome.refusal is not None
    assert outcome.refusal.kind is RefusalKind.CHANGED
    assert kept(store) == []
    assert ActionKind.WRITE_SIDECARS is outcome.action.kind
