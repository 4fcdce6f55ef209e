"""An intent is input: whoever may write to the store can put one there, and says what they like.

What is not believed is left as it is, reported once, and in nobody's way; what is believed is put
back, and the store's own rules say what becomes of it.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import needs_root
from tests.support.driving import POLICY, HealthyStore, content, host, private_proc
from tests.support.runs import changed, one_look, one_run, rules
from tests.support.transfers import lay_out
from watcher.model import MIB, ActionKind, Kind, Part, Result, Rules
from watcher.observe import intents
from watcher.ollama.sidecars import write
from watcher.state import transfers

REPAIR = rules(repair=True, repair_stale=True, writers_visible=True)
NUMBER = "00000007"


@pytest.fixture
def store(tmp_path: Path) -> HealthyStore:
    return HealthyStore(tmp_path / "models")


@pytest.fixture
def proc(tmp_path: Path) -> str:
    folder = tmp_path / "proc"
    shown = private_proc(folder)
    (folder / "sys").symlink_to("/proc/sys")  # which start of the machine this is
    return shown


class Planted:
    """An intent that somebody has put there."""

    def __init__(self, store: HealthyStore, number: str = NUMBER) -> None:
        self.store = store
        self.path = store.ours / "intents" / number
        for name in ("new", "out"):
            (self.path / name).mkdir(parents=True)

    def folder(self) -> intents.Folder:
        """What tells the store's ``blobs`` apart."""
        fd = os.open(self.store.blobs, os.O_RDONLY)
        try:
            return intents.folder_of(
                fd, Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            )
        finally:
            os.close(fd)

    def says(self, kind: ActionKind, *taken: Path, digest: str = "", **more: Any) -> intents.Intent:
        """Write down what it is about: files that it takes, which lie in their places."""
        files = {
            path.name: intents.File(
                path.name,
                Kind.FILE,
                path.stat().st_size,
                path.stat().st_mtime_ns,
                path.stat().st_ino,
                True,
            )
            for path in taken
        }
        guard = None
        if digest:
            (self.path / "guard").write_bytes(b"")
            guard = (self.path / "guard").stat().st_ino
        made = intents.Intent(kind, digest, self.folder(), guard, files, {})
        return self.write(made._replace(**more))

    def write(self, intent: intents.Intent) -> intents.Intent:
        """Write an intent down as ollama-watch does."""
        (self.path / intents.NOTE).write_bytes(intents.encode(intent))
        return intent

    def change(self, **fields: Any) -> None:
        """Say something else in its note."""
        note = json.loads((self.path / "intent.json").read_bytes())
        (self.path / "intent.json").write_text(json.dumps({**note, **fields}))

    def take(self, *paths: Path) -> None:
        """Move files out of their places."""
        for path in paths:
            path.rename(self.path / "out" / path.name)

    def decide(self) -> None:
        """Say that it is decided."""
        (self.path / "decided").write_bytes(b"")


def foreign(store: HealthyStore, proc: str) -> list[str]:
    """Why intents are not believed, as an audit has it."""
    report = one_look(host(store, proc), POLICY)
    return [
        each.message for each in report.diagnosis.findings if each.kind == "store_foreign_intent"
    ]


def tree_of(folder: Path) -> dict[str, tuple[object, ...]]:
    """What lies in a folder, to the letter where it is a file of a usual size."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        text = path.read_bytes() if path.is_file() and status.st_size < 1 << 20 else b""
        found[str(path)] = (status.st_mode, status.st_ino, status.st_size, status.st_mtime_ns, text)
    return found


def assert_left(store: HealthyStore, planted: Planted, proc: str) -> None:
    """It stays to the letter; other work is done; it is reported, once, with what helps."""
    before = tree_of(planted.path)
    stale = store.download("stale")
    for _ in range(2):
        report = one_run(host(store, proc), POLICY)
        assert not report.stuck
    assert store.partials(stale) == []
    assert tree_of(planted.path) == before
    (finding,) = [e for e in report.diagnosis.findings if e.kind == "store_foreign_intent"]
    told = [each for each in store.events() if each["event_type"] == "store_problem"]
    assert [each["details"]["kind"] for each in told] == ["store_foreign_intent"]
    subprocess.run(shlex.split(finding.command), check=True)
    assert foreign(store, proc) == []
    one_run(host(store, proc), POLICY)
    assert store.leftovers() == [f"foreign-intent-{planted.path.name}"]


# ---------------------------------------------------------------- not believed


@pytest.mark.parametrize("decided", [True, False])
@pytest.mark.parametrize("where", ["new", "out"])
def test_files_that_no_intent_names_stay(
    where: str, decided: bool, store: HealthyStore, proc: str
) -> None:
    planted = Planted(store)
    (planted.path / where / "passwd").write_text("root::0:0::/:/bin/sh")
    if decided:
        planted.decide()
    assert_left(store, planted, proc)
    assert not (store.blobs / "passwd").exists()


@pytest.mark.parametrize("where", ["new", "out"])
def test_nothing_of_it_goes_through_a_link_in_place_of_blobs(
    where: str, store: HealthyStore, tmp_path: Path, proc: str
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "passwd").write_text("precious")
    planted = Planted(store)
    (planted.path / where / "passwd").write_text("evil")
    planted.decide()
    store.blobs.rename(store.path / "away")
    store.blobs.symlink_to(victim)
    before = content(victim)
    for policy in (POLICY, REPAIR):
        one_run(host(store, proc), policy)
    assert content(victim) == before
    assert (planted.path / where / "passwd").read_text() == "evil"


def _sidecars(digest: str, *parts: Part) -> dict[str, bytes]:
    return {f"sha256-{digest}-partial-{part.number}": write(part) for part in parts}


def _orphan(planted: Planted) -> Path:
    return planted.store.blobs / f"sha256-{planted.store.text_blob('an orphan', aged=60)}"


def _of_orphan(planted: Planted) -> Path:
    path = _orphan(planted)
    planted.says(ActionKind.REMOVE_ORPHAN, path)
    planted.take(path)
    planted.decide()
    return planted.path / "out" / path.name


def _other_blobs(planted: Planted) -> None:
    _of_orphan(planted)
    planted.change(blobs={**planted.folder()._asdict(), "inode": 4711})


def _other_device(planted: Planted) -> None:
    _of_orphan(planted)
    planted.change(blobs={**planted.folder()._asdict(), "device": 4711})


def _path_in_name(planted: Planted) -> None:
    digest = planted.store.digest("any")
    planted.says(ActionKind.WRITE_SIDECARS, digest=digest)
    planted.change(writes={f"sha256-{digest}-partial-/../../../evil": "x"})
    planted.decide()


def _takes_quarantine(planted: Planted) -> None:
    path = planted.store.blobs / f"00000001-sha256-{planted.store.digest('kept')}"
    path.write_text("kept")
    planted.says(ActionKind.REMOVE_ORPHAN, path)
    planted.take(path)
    planted.decide()


def _takes_of_another_download(planted: Planted) -> None:
    path = planted.store.partial(planted.store.download("another"))
    planted.says(ActionKind.REMOVE_DOWNLOAD, path, digest=planted.store.digest("this one"))
    planted.take(path)
    planted.decide()


def _takes_data_in_a_repair(planted: Planted) -> None:
    store = planted.store
    digest = store.download("mine")
    texts = _sidecars(digest, Part(0, 0, 9, 9))
    planted.says(ActionKind.WRITE_SIDECARS, store.partial(digest), digest=digest, writes=texts)
    planted.take(store.partial(digest))
    planted.decide()


def _gives_what_is_no_set(planted: Planted) -> None:
    digest = planted.store.digest("ours")
    here = lay_out(planted.store.path, digest, b"layer", ((0, 5),))
    texts = _sidecars(digest, Part(0, 0, 9, 9), Part(1, 5, 9, 9))
    planted.says(ActionKind.GIVE_BACK, here / "data", digest=digest, writes=texts)
    planted.decide()


def _takes_over(planted: Planted, end: int, **more: object) -> str:
    """A download of 9,000 bytes, and the ledger that it would get."""
    digest = planted.store.digest("mine")
    data = planted.store.file(f"sha256-{digest}-partial", "x" * 9000)
    told = transfers.encoded(digest, transfers.Kept(9000, ((0, end),)))
    writes = {"ledger": json.dumps({**json.loads(told), **more}).encode()}
    planted.says(ActionKind.TAKE_OVER, data, digest=digest, writes=writes)
    (planted.path / "new/ledger").write_bytes(writes["ledger"])
    planted.take(data)
    planted.decide()
    return digest


def _ledger_beyond_the_data(planted: Planted) -> None:
    _takes_over(planted, 9001, total=10_000)


def _ledger_of_another_layer(planted: Planted) -> None:
    _takes_over(planted, 9000, digest="ab" * 32)


def _ledger_that_is_another_one(planted: Planted) -> None:
    _takes_over(planted, 5000)
    (planted.path / "new/ledger").write_text("{}")


def _ledger_and_a_progress_file(planted: Planted) -> None:
    digest = _takes_over(planted, 5000)
    note = json.loads((planted.path / "intent.json").read_bytes())
    planted.change(writes={**note["writes"], f"sha256-{digest}-partial-0": "{}"})


def _takes_over_without_taking_the_data(planted: Planted) -> None:
    _takes_over(planted, 5000)
    note = json.loads((planted.path / "intent.json").read_bytes())
    planted.change(files=[[*row[:-1], False] for row in note["files"]])


def _unknown_verb(planted: Planted) -> None:
    _of_orphan(planted)
    planted.change(verb="hash")


def _no_version(planted: Planted) -> None:
    _of_orphan(planted)
    planted.change(schema="ollama-watch/intent/99")


def _nonsense(planted: Planted) -> None:
    _of_orphan(planted)
    planted.change(files=[["x"] * 6, {}, None])


def _half_a_note(planted: Planted) -> None:
    _of_orphan(planted)
    note = planted.path / "intent.json"
    note.write_bytes(note.read_bytes()[:100])


def _huge_note(planted: Planted) -> None:
    _of_orphan(planted)
    os.truncate(planted.path / "intent.json", 1 << 33)


def _note_that_is_padded_beyond_the_limit(planted: Planted) -> None:
    _of_orphan(planted)
    with (planted.path / "intent.json").open("ab") as note:
        note.write(b" " * intents.READ_LIMIT)


def _other_file(planted: Planted) -> None:
    path = _of_orphan(planted)
    (planted.store.path / "other").write_text("other")
    (planted.store.path / "other").rename(path)


def _link(planted: Planted) -> None:
    path = _of_orphan(planted)
    path.unlink()
    path.symlink_to("/etc/passwd")


def _fifo(planted: Planted) -> None:
    path = _of_orphan(planted)
    path.unlink()
    os.mkfifo(path)


def _note_is_a_fifo(planted: Planted) -> None:
    _of_orphan(planted)
    (planted.path / "intent.json").unlink()
    os.mkfifo(planted.path / "intent.json")


def _note_is_a_link(planted: Planted) -> None:
    _of_orphan(planted)
    (planted.path / "intent.json").rename(planted.store.path / "note")
    (planted.path / "intent.json").symlink_to("../../../note")


def _note_is_a_socket(planted: Planted) -> None:
    _of_orphan(planted)
    (planted.path / "intent.json").unlink()
    here = os.open(planted.path, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"/proc/self/fd/{here}/intent.json")
    os.close(here)


def _out_is_a_link(planted: Planted) -> None:
    (planted.path / "out").rmdir()
    (planted.path / "out").symlink_to(planted.store.blobs)


def _rows_are_wrong(planted: Planted) -> None:
    paths = [planted.store.file(f"split-copy{number}") for number in range(2100)]
    planted.says(ActionKind.REMOVE_TEMPORARY, *paths)
    planted.take(*paths)
    planted.decide()
    planted.change(files=[["split-copy1"]])


def _more_files_than_it_says(planted: Planted) -> None:
    _of_orphan(planted)
    (planted.path / "readme").write_text("of the user")


def _sidecars_that_are_no_set(planted: Planted) -> None:
    digest = planted.store.download("mine")
    texts = _sidecars(digest, Part(0, 0, 9, 9), Part(1, 5, 9, 9))
    planted.says(ActionKind.WRITE_SIDECARS, digest=digest, writes=texts)
    planted.decide()


def _new_is_something_else(planted: Planted) -> None:
    digest = planted.store.download("mine")
    texts = _sidecars(digest, Part(0, 0, 9, 0))
    planted.says(ActionKind.WRITE_SIDECARS, digest=digest, writes=texts)
    (planted.path / "new" / f"sha256-{digest}-partial-0").write_bytes(write(Part(0, 0, 9, 9)))
    planted.decide()


NOT_BELIEVED: dict[str, Callable[[Planted], object]] = {
    name.lstrip("_"): plant
    for name, plant in list(globals().items())
    if name.startswith("_") and getattr(plant, "__annotations__", {}).get("return") == "None"
}


@pytest.mark.parametrize("plant", NOT_BELIEVED)
def test_an_intent_that_differs_from_ours_is_left(
    plant: str, store: HealthyStore, proc: str
) -> None:
    planted = Planted(store)
    NOT_BELIEVED[plant](planted)
    assert_left(store, planted, proc)


@needs_root
@pytest.mark.parametrize("name", [".", "intent.json", "decided"])
def test_an_intent_of_a_stranger_is_left(name: str, store: HealthyStore, proc: str) -> None:
    planted = Planted(store)
    _of_orphan(planted)
    os.chown(planted.path / name, 12345, 12345)
    assert_left(store, planted, proc)


@needs_root
def test_a_change_that_a_member_of_the_group_began_is_put_back(
    store: HealthyStore, proc: str
) -> None:
    planted = Planted(store)
    name = _of_orphan(planted).name
    for folder in (store.ours, store.ours / "intents"):
        os.chown(folder, -1, 4242)
        folder.chmod(0o2775)
    for path in (planted.path, *planted.path.rglob("*")):
        os.chown(path, 12345, 4242)
    one_run(host(store, proc), REPAIR)
    assert (store.blobs / name).read_text() == "an orphan"
    assert not planted.path.exists()


@pytest.mark.parametrize("name", ["7", "٠٠٠٠٠٠٠٧", "9" * 200, "note", "00000007"])
def test_a_folder_of_another_name_is_no_intent(name: str, store: HealthyStore, proc: str) -> None:
    """Nor does it keep an act from finding a number; one that is no folder is foreign."""
    (store.ours / "intents").mkdir(parents=True)
    (store.ours / "intents" / name).write_text("x")
    (store.ours / "quarantine").mkdir()
    (store.ours / "quarantine" / f"{'9' * 100}-x").write_text("x")
    stale = store.download("stale")
    report = one_run(host(store, proc), POLICY)
    assert [each.result for each in report.outcomes] == [Result.DONE]
    assert store.partials(stale) == []
    assert (store.ours / "intents" / name).read_text() == "x"
    assert len(foreign(store, proc)) == (name == NUMBER)


# ---------------------------------------------------------------- believed


def test_a_named_blob_that_is_decided_to_go_comes_back(store: HealthyStore, proc: str) -> None:
    for kind in (ActionKind.REMOVE_ORPHAN, ActionKind.QUARANTINE_BLOB):
        before = store.tree()
        planted = Planted(store)
        path = store.blobs / f"sha256-{store.digests[0]}"
        planted.says(kind, path)
        planted.take(path)
        planted.decide()
        one_run(host(store, proc), POLICY)
        assert store.tree() == before
        assert store.leftovers() == []


@pytest.mark.parametrize("policy", [POLICY, REPAIR], ids=["clean", "repair"])
def test_a_young_orphan_that_is_decided_to_go_comes_back(
    policy: Rules, store: HealthyStore, proc: str
) -> None:
    planted = Planted(store)
    name = _of_orphan(planted).name
    one_run(host(store, proc), policy)
    assert (store.blobs / name).read_text() == "an orphan"
    assert store.leftovers() == []


def test_a_download_that_is_decided_to_go_comes_back_whole(store: HealthyStore, proc: str) -> None:
    digest = store.download("young", aged=3600)
    before = store.tree()
    planted = Planted(store)
    paths = [store.blobs / name for name in store.partials(digest)]
    planted.says(ActionKind.REMOVE_DOWNLOAD, *paths, digest=digest)
    planted.take(*paths)
    (planted.path / "guard").rename(store.partial(digest, 0))
    planted.decide()
    one_run(host(store, proc), POLICY)
    assert store.tree() == before
    assert store.leftovers() == []


def test_sidecars_of_data_that_is_there_do_not_go_on_an_intents_word(
    store: HealthyStore, proc: str
) -> None:
    digest = store.download("young", aged=3600)
    before = store.tree()
    planted = Planted(store)
    paths = [store.partial(digest, number) for number in (1, 2)]
    gone = store.file(f"sha256-{digest}-partial-3", "{}")
    planted.says(ActionKind.REMOVE_SURPLUS, *paths, gone, digest=digest)
    gone.unlink()
    planted.take(*paths)
    planted.decide()
    one_run(host(store, proc), POLICY)
    assert store.tree() == before


@pytest.mark.parametrize("kind", [ActionKind.WRITE_SIDECARS, ActionKind.GIVE_BACK])
@pytest.mark.parametrize("remembered", [False, True])
def test_sidecars_that_nobody_foresaw_are_not_put_beside_data(
    remembered: bool, kind: ActionKind, store: HealthyStore, proc: str
) -> None:
    """Some of them are there already, as after a kill; a repair makes the download good."""
    digest = store.download("mine", aged=600)
    if remembered:  # with its own parts, which are others
        one_run(host(store, proc), changed(POLICY, clean=False))
    size = store.partial(digest).stat().st_size
    texts = _sidecars(digest, Part(0, 0, size - 9, size - 9), Part(1, size - 9, 9, 9))
    planted = Planted(store)
    data = store.partial(digest)
    status = data.stat()
    row = intents.File(
        data.name, Kind.FILE, status.st_size, status.st_mtime_ns, status.st_ino, False
    )
    planted.says(kind, digest=digest, writes=texts, files={data.name: row})
    (planted.path / "guard").rename(store.partial(digest, 0))
    last = f"sha256-{digest}-partial-0"
    (planted.path / "new" / last).write_bytes(texts[last])
    planted.decide()
    before = store.tree()
    one_run(host(store, proc), changed(POLICY, clean=False))
    assert store.tree() == before
    report = one_run(host(store, proc), REPAIR)
    assert [each.result for each in report.outcomes] == [Result.DONE]
    assert store.partial(digest, 0).read_bytes() not in (b"", texts[last])


@pytest.mark.parametrize("taken", [False, True])
def test_a_file_whose_name_is_taken_goes_to_quarantine_under_a_free_label(
    taken: bool, store: HealthyStore, proc: str
) -> None:
    planted = Planted(store)
    name = _of_orphan(planted).name
    (planted.path / "decided").unlink()
    (store.blobs / name).write_text("a new one")
    if taken:
        (store.ours / "quarantine").mkdir()
        (store.ours / "quarantine" / f"{NUMBER}-{name}").write_text("an old one")
    one_run(host(store, proc), changed(POLICY, clean=False))
    texts = {path.name: path.read_text() for path in (store.ours / "quarantine").iterdir()}
    assert texts.pop(f"{'00000008' if taken else NUMBER}-{name}") == "an orphan"
    assert len(texts) == taken
    assert not planted.path.exists()


# ---------------------------------------------------------------- another start of the machine


@pytest.mark.parametrize("born", [True, False])
def test_after_a_restart_the_device_may_have_another_number(
    born: bool, store: HealthyStore, proc: str
) -> None:
    now = Planted(store).folder()
    before = now._replace(boot="an earlier one", device=now.device + 1, born_ns=now.born_ns * born)
    if not born:
        now = now._replace(born_ns=0)
    assert before.is_same(now, loose=False)
    assert not before._replace(inode=1).is_same(now, loose=False)
    other = before._replace(born_ns=1) if born else before._replace(file_system=1)
    assert not other.is_same(now, loose=False)


def test_a_change_from_an_earlier_start_is_put_back(store: HealthyStore, proc: str) -> None:
    planted = Planted(store)
    name = _of_orphan(planted).name
    planted.change(blobs={**planted.folder()._asdict(), "boot": "an earlier one", "device": 4711})
    one_run(host(store, proc), REPAIR)
    assert (store.blobs / name).read_text() == "an orphan"


def test_no_intent_that_is_written_is_too_large_to_be_read(store: HealthyStore, proc: str) -> None:
    """10,000 sidecars in one download; it is killed before anything is decided, and put back."""
    digest = store.download("large", parts=1)
    paths = [store.blobs / f"sha256-{digest}-partial-{number}" for number in range(1, 10_000)]
    for path in paths:
        path.write_bytes(b"{}")
    planted = Planted(store)
    planted.says(ActionKind.REMOVE_DOWNLOAD, store.partial(digest), *paths, digest=digest)
    note = (planted.path / intents.NOTE).stat().st_size
    assert note > MIB, "more than other files of ours may have"
    assert note / len(paths) * intents.MOST_FILES < intents.READ_LIMIT
    planted.take(store.partial(digest), *paths)
    one_run(host(store, proc), changed(POLICY, clean=False))
    assert len(store.partials(digest)) == 10_001
    assert store.leftovers() == []
