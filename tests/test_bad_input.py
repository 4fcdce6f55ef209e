"""Whatever lies in a store, and however we are called: an answer in time, never a traceback.

All of it goes through the command line, as a process of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from watcher.ollama.names import from_exact

from .conftest import IS_ROOT, Run, environment, needs_root, open_parents
from .support.notation import LIBRARY, MB, Store, age, digest_of, manifest_bytes
from .support.servers import wait_until

Done = subprocess.CompletedProcess[bytes]
FULL = 400 << 20


def calm(done: Done, *codes: int) -> Done:
    """The call has ended as promised: with one of these codes, and without a traceback."""
    said = (done.stdout or b"") + (done.stderr or b"")
    assert b"Traceback" not in said, said.decode(errors="replace")
    assert b"Exception ignored" not in said, said.decode(errors="replace")
    assert b"bug in ollama-watch" not in said, said.decode(errors="replace")
    assert done.returncode in codes, (done.returncode, said.decode(errors="replace"))
    return done


def little_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (FULL, FULL))


@pytest.fixture
def audit(run: Run, models: Store) -> Callable[..., dict[str, Any]]:
    """Audits the store in all ways of showing it; gives back the document."""

    def call(*words: str | bytes, path: str | bytes | None = None, **more: Any) -> dict[str, Any]:
        named = ["--store", str(models.path) if path is None else path]
        calm(run(*named, *words, "audit", **more), 0, 1)
        calm(run(*named, "-v", *words, "audit", **more), 0, 1)
        done = calm(run(*named, "--json", *words, "audit", **more), 0, 1)
        document: dict[str, Any] = json.loads(done.stdout)
        return document

    return call


def conditions(document: dict[str, Any]) -> list[str]:
    return [each["condition"] for each in document["downloads"]]


def kinds(document: dict[str, Any]) -> set[str]:
    return {each["kind"] for each in document["findings"]}


# ---------------------------------------------------------------- which store


@pytest.mark.parametrize("command", ["audit", "clean"])
def test_without_a_store_it_names_where_it_looked(run: Run, tmp_path: Path, command: str) -> None:
    done = run(command)
    if done.returncode != 10:
        pytest.skip("this machine has a model store")
    calm(done, 10)
    for place in ("/usr/share/ollama/.ollama/models", "/var/lib/ollama/models", f"{tmp_path}/home"):
        assert place.encode() in done.stderr
    assert b"--store" in done.stderr


@pytest.mark.parametrize("command", ["audit", "clean"])
@pytest.mark.parametrize("kind", ["file", "absent", "empty folder", "dangling link", "fifo", "nul"])
def test_what_is_no_store_is_reported(run: Run, tmp_path: Path, command: str, kind: str) -> None:
    path = tmp_path / "x"
    match kind:
        case "file":
            path.write_text("x")
        case "empty folder":
            path.mkdir()
        case "dangling link":
            path.symlink_to("nowhere")
        case "fifo":
            os.mkfifo(path)
        case "nul":
            path = tmp_path / ("x" * 300)
    before = sorted(os.listdir(tmp_path))
    done = calm(run("--store", str(path), command), 10)
    assert str(path).encode() in done.stderr
    assert sorted(os.listdir(tmp_path)) == before


def test_an_empty_name_of_a_store_is_no_crash(run: Run) -> None:
    calm(run("--store", "", "audit"), 2, 10)
    calm(run("audit", env={"OLLAMA_MODELS": "  "}), 0, 1, 10)


def test_quotes_and_spaces_around_the_variable_do_not_count(run: Run, models: Store) -> None:
    models.model()
    done = calm(run("--json", "audit", env={"OLLAMA_MODELS": f' "{models.path}" '}), 0, 1)
    assert json.loads(done.stdout)["store"]["path"] == str(models.path)


def test_blobs_and_manifests_may_be_files(audit: Callable[..., Any], models: Store) -> None:
    models.blobs.rmdir()
    models.manifests.rmdir()
    models.blobs.write_text("x")
    models.manifests.write_text("x")
    audit()


@pytest.mark.parametrize(
    "name",
    [b"models [1]", b"a b", b"new\nline", b"not\xffutf8", b"back\\slash", b"-rf", b"\x1b[31mred"],
)
@pytest.mark.parametrize("command", ["audit", "clean"])
def test_a_path_of_any_bytes(
    run: Run, tmp_path: Path, name: bytes, command: str, models: Store
) -> None:
    models.broken("0:1 -:1", aged="9d")
    models.model()
    path = os.fsencode(tmp_path) + b"/" + name
    models.path.rename(os.fsdecode(path))
    words = ["--yes"] if command == "clean" else []
    done = calm(run("--store", path, "--json", command, *words), 0, 1, 3)
    told = json.loads(done.stdout)["store"]["path"]
    assert os.fsencode(from_exact(told)) == path
    done = calm(run(b"--store=" + path, command, *words), 0, 1, 3)
    assert b"\x1b" not in done.stdout
    done.stdout.decode()


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="there is no tmpfs")
def test_a_store_in_memory(run: Run, tmp_path: Path) -> None:
    path = Path(f"/dev/shm/{tmp_path.name}.{os.getpid()}")
    try:
        store = Store(path / "models")
        store.broken("0:3 1:2", aged="9d")
        done = calm(run("--store", str(store.path), "--json", "audit"), 1)
        document = json.loads(done.stdout)
        assert document["store"]["file_system"] == "tmpfs"
        assert conditions(document) == ["behind"]
    finally:
        shutil.rmtree(path, ignore_errors=True)


@pytest.mark.parametrize("years", [-(2**33), 2**33, -(2**40), 2**40])
def test_times_far_away(audit: Callable[..., Any], models: Store, years: int) -> None:
    digest = models.broken("0:1 0:1")
    orphan = models.orphan()
    for path in (f"sha256-{digest}-partial", f"sha256-{digest}-partial-0", f"sha256-{orphan}"):
        os.utime(models.blobs / path, (years, years))
    audit()


# ---------------------------------------------------------------- names


HOSTILE = [
    b"\xff\xfe",
    b"new\nline",
    b"x" * 255,
    b"sha256:",
    b"sha256:" + b"G" * 64,
    b"-partial",
    b"sha256-" + b"a" * 63,
    b"sha256-" + b"a" * 65,
    b"sha256-" + b"A" * 64,
    b"\x1b[2J",
    b"%s%n",
    b"sha256-" + b"b" * 64 + b"-partial-\xff\n",
    b"sha256-" + b"c" * 64 + b"-partial-" + b"9" * 170,
    b"sha256-" + b"d" * 64 + b"-partial-",
    b"sha256-" + b"e" * 64 + b"-partial-00",
    b"~",
    b"*",
    b"sha256-" + b"f" * 64 + b"-partial-\x1b[2J",
    b"[bold]x",
    b":smile:",
    b"\\x41",
]


def test_hostile_names(audit: Callable[..., Any], run: Run, models: Store) -> None:
    models.model()
    for name in HOSTILE:
        path = os.path.join(os.fsencode(models.blobs), name)
        Path(os.fsdecode(path)).write_bytes(b"x")
        os.utime(path, (1, 1))
    audit()
    done = calm(run("--store", str(models.path), "-v", "audit"), 1)
    assert b"\x1b" not in done.stdout
    calm(run("--store", str(models.path), "--json", "clean", "--yes"), 0, 1, 3)
    calm(run("--store", str(models.path), "clean", "--yes"), 0, 1, 3)


def test_hostile_names_of_manifests(audit: Callable[..., Any], models: Store) -> None:
    models.model()
    top = os.fsencode(models.manifests)
    for parts in (
        [b"\xff", b"n", b"m", b"t"],
        [b"h", b"n", b"m", b"\xff\n"],
        [b"h", b"n", b"m", b".DS_Store"],
        [b"h", b"n", b"\x1b[2J", b"t"],
        [b"file"],
        [b"h", b"file"],
        [b"a", b"b", b"c", b"d", b"e"],
        [b"h", b"n", b"m", b"x" * 255],
        [*([b"deep"] * 40), b"x"],
    ):
        path = os.path.join(top, *parts)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(os.fsdecode(path)).write_bytes(b"{}")
    assert {"manifest_bad_name", "manifest_misplaced"} <= kinds(audit())


@needs_root
def test_a_folder_that_others_may_not_list_has_any_name(
    models: Store, as_nobody: Callable[[Sequence[str]], list[str]]
) -> None:
    hidden = os.fsencode(models.manifests) + b"/\xff\n"
    os.mkdir(hidden, 0o700)
    open_parents(models.path)
    for words in (["--json"], []):
        command = as_nobody(["-m", "watcher", "--store", str(models.path), *words, "audit"])
        calm(subprocess.run(command, capture_output=True, timeout=120), 1)


@needs_root
@pytest.mark.parametrize("where", ["blobs/folder", "blobs", "manifests/h/n/m", "manifests"])
def test_a_folder_whose_names_others_see_and_no_more_is_reported(
    models: Store, as_nobody: Callable[[Sequence[str]], list[str]], where: str
) -> None:
    """Its mode is r--: a listing goes well, and each look at what was listed fails."""
    models.model()
    folder = models.path / where
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "latest").write_bytes(b"{}")
    open_parents(models.path)
    folder.chmod(0o744)
    command = as_nobody(["-m", "watcher", "--store", str(models.path), "--json", "audit"])
    document = json.loads(calm(subprocess.run(command, capture_output=True, timeout=120), 1).stdout)
    told = [each for each in document["findings"] if each["kind"] == "store_unlisted"]
    assert [each["path"] for each in told] == [where]


# ---------------------------------------------------------------- content


SIDECARS = [
    b"",
    b" ",
    b"{}",
    b"null",
    b"[]",
    b"x",
    b"\0" * 60,
    b"\xff\xfe{}",
    b"\xef\xbb\xbf{}",
    b"[" * 4000,
    b'{"N":0,"Offset":-1,"Size":5,"Completed":0}',
    b'{"N":0,"Offset":0,"Size":-5,"Completed":-9}',
    b'{"N":0,"Offset":0,"Size":9223372036854775807,"Completed":9223372036854775807}',
    b'{"N":0,"Offset":9223372036854775807,"Size":9223372036854775807,"Completed":1}',
    b'{"N":0,"Offset":0,"Size":1e3,"Completed":0}',
    b'{"N":0,"Offset":0,"Size":1.0,"Completed":0}',
    b'{"N":0,"Offset":0,"Size":' + b"9" * 3000 + b',"Completed":0}',
]


def test_sidecars_with_anything_in_them(audit: Callable[..., Any], run: Run, models: Store) -> None:
    for at, raw in enumerate(SIDECARS):
        digest = models.broken("0:1 1:2", name=str(at), aged="9d")
        path = models.blobs / f"sha256-{digest}-partial-0"
        path.write_bytes(raw)
        age(path, "9d")
    document = audit()
    assert set(conditions(document)) <= {"blocked", "live"}
    assert len(document["downloads"]) == len(SIDECARS)
    calm(run("--store", str(models.path), "clean", "-n"), 1, 3)


def test_a_sidecar_of_a_gigabyte_costs_nothing(audit: Callable[..., Any], models: Store) -> None:
    digest = models.broken("0:1 1:2")
    path = models.blobs / f"sha256-{digest}-partial-0"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    age(path, "2h")
    assert conditions(audit(preexec_fn=little_memory)) == ["blocked"]


@pytest.mark.parametrize("filler", [b"\0", b" ", b"[", b"9", b'"'])
def test_a_manifest_of_100_megabytes_costs_nothing(run: Run, models: Store, filler: bytes) -> None:
    models.manifest("big/latest", b"{" + filler * (100 << 20))
    done = run("--store", str(models.path), "--json", "audit", preexec_fn=little_memory)
    assert "manifest_corrupt" in kinds(json.loads(calm(done, 1).stdout))


@pytest.mark.parametrize("filler", [b"\0", b"[", b"[{", b'{"a":', b"9"])
def test_a_manifest_of_15_megabytes_is_read_in_bounds(
    run: Run, models: Store, filler: bytes
) -> None:
    models.manifest("big/latest", filler * ((15 << 20) // len(filler)))
    done = run("--store", str(models.path), "--json", "audit", preexec_fn=little_memory)
    assert "manifest_corrupt" in kinds(json.loads(calm(done, 1).stdout))


MANIFESTS = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"\0",
    b"\xff",
    b'{"layers":[{"digest":"sha256:x","size":1}]}',
    b'{"layers":[{"digest":"\\ud800","size":1}]}',
    b'{"layers":[{"digest":"\\n\\u001b[2J"}]}',
    b'{"layers":[{"digest":"' + b"x" * 100_000 + b'","size":1}]}',
    b'{"layers":[null,null]}',
    b'{"layers":[{"digest":"sha256:' + b"0" * 64 + b'","size":-1}]}',
    b'{"layers":[{"digest":"sha256:' + b"1" * 64 + b'","size":9223372036854775807}]}',
    b'{"layers":[{"digest":"../../../../etc/passwd","size":1}]}',
]


def test_manifests_with_anything_in_them(
    audit: Callable[..., Any], run: Run, models: Store
) -> None:
    for at, raw in enumerate(MANIFESTS):
        models.manifest(f"m{at}/latest", raw)
    assert {"manifest_corrupt", "manifest_bad_digest", "blob_missing"} <= kinds(audit())
    calm(run("--store", str(models.path), "clean", "--yes"), 0, 1, 3)


@pytest.mark.parametrize("raw", MANIFESTS[7:10])
def test_each_odd_digest_alone(audit: Callable[..., Any], models: Store, raw: bytes) -> None:
    models.manifest("odd/latest", raw)
    audit()


@pytest.mark.parametrize("parts", ["-:1", "0:1 -:1", "0:1 {}:1"])
def test_a_manifest_with_an_absurd_size_costs_nothing(run: Run, models: Store, parts: str) -> None:
    digest = models.broken(parts)
    models.manifest("m/latest", {digest: 2**63 - 1})
    done = run(
        "--store", str(models.path), "--json", "audit", preexec_fn=little_memory, timeout=120
    )
    assert len(json.loads(calm(done, 0, 1).stdout)["downloads"]) == 1


def test_a_data_file_of_ten_terabytes_costs_nothing(run: Run, models: Store) -> None:
    digest = models.broken("-:1 -:1")
    os.truncate(models.blobs / f"sha256-{digest}-partial", 10 * 10**12)
    age(models.blobs / f"sha256-{digest}-partial", "2h")
    done = run("--store", str(models.path), "--json", "audit", preexec_fn=little_memory)
    assert conditions(json.loads(calm(done, 1).stdout)) == ["unclaimed"]


def test_five_thousand_sidecars_of_one_digest(run: Run, models: Store) -> None:
    digest = models.broken("-:1", total=500, aged="9d")
    for number in range(5000):
        path = models.blobs / f"sha256-{digest}-partial-{number}"
        size = 100_000
        offset = number * size + (7 if number % 2 else 0)
        text = '{"N":%d,"Offset":%d,"Size":%d,"Completed":0}\n'
        path.write_text(text % (number, offset, size - 10))
        age(path, "9d")
    done = run("--store", str(models.path), "--json", "audit", timeout=120)
    assert conditions(json.loads(calm(done, 1).stdout)) == ["blocked"]
    calm(run("--store", str(models.path), "clean", "-n", timeout=120), 1, 3)


# ---------------------------------------------------------------- kinds of entries


def test_links_pipes_sockets_and_folders_in_every_place(
    audit: Callable[..., Any], run: Run, models: Store, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("mine")
    os.utime(secret, (1, 1))
    models.model()
    names = [
        f"sha256-{digest_of(f'{at}')}{tail}"
        for at, tail in enumerate(["", "-partial", "-partial-0", ".tmp", "-partial-x"] * 4)
    ]
    for at, name in enumerate((*names, "COPY1", "COPY2", "sha256-12", "sha256-13")):
        path = models.blobs / name
        match at // 5 if at < 20 else at % 4:
            case 0:
                path.symlink_to(secret)
            case 1:
                os.mkfifo(path)
            case 2:
                path.mkdir()
                (path / "inside").write_text("x")
            case _:
                fd = os.open(models.blobs, os.O_RDONLY)
                with socket.socket(socket.AF_UNIX) as made:
                    made.bind(f"/proc/self/fd/{fd}/{name}")
                os.close(fd)
    (models.blobs / f"sha256-{digest_of('loop')}").symlink_to(models.blobs)
    before = secret.stat()
    document = audit(env={"OLLAMA_WATCH_WRITERS_VISIBLE": "true"})
    assert set(conditions(document)) <= {"unknown", "paused"}
    calm(run("--store", str(models.path), "clean", "--yes", "--stale-after", "0s"), 0, 1, 3)
    assert secret.stat() == before
    assert {"inside"} <= {path.name for path in models.blobs.rglob("*")}


def test_links_pipes_and_folders_as_manifests(audit: Callable[..., Any], models: Store) -> None:
    model = models.manifests / LIBRARY / "m"
    model.mkdir(parents=True)
    os.mkfifo(model / "pipe")
    (model / "folder").mkdir()
    (model / "dangling").symlink_to("nowhere")
    (model / "loop").symlink_to("loop")
    (model / "device").symlink_to("/dev/zero")
    (models.manifests / "loop").symlink_to("..")
    found = kinds(audit())
    assert {"manifest_dangling", "manifest_corrupt", "manifest_misplaced"} <= found


# ---------------------------------------------------------------- while it changes


def test_files_that_come_and_go_all_the_time(run: Run, models: Store) -> None:
    models.model()
    digest = models.broken("0:1 1:2")
    stop = threading.Event()

    def churn() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            for name in (
                f"sha256-{digest}-partial-0",
                f"sha256-{digest_of(str(turn % 7))}-partial",
            ):
                path = models.blobs / name
                path.write_bytes(b'{"N":0,"Offset":0,"Size":100000000,"Completed":0}')
                path.unlink()
            manifest = models.manifest(f"come{turn % 5}/latest", b"")
            manifest.write_bytes(manifest_bytes({digest_of("x"): 5}))
            shutil.rmtree(manifest.parent)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(20):
            calm(run("--store", str(models.path), "--json", "audit", timeout=120), 0, 1)
    finally:
        stop.set()
        thread.join()


def test_a_store_that_goes_and_comes_all_the_time(run: Run, models: Store, tmp_path: Path) -> None:
    models.broken("0:1 1:2")
    models.model()
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            for path in (models.blobs, models.manifests, models.path):
                aside = tmp_path / "aside"
                path.rename(aside)
                aside.rename(path)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(15):
            calm(run("--store", str(models.path), "--json", "audit", timeout=120), 0, 1, 10)
    finally:
        stop.set()
        thread.join()


# ---------------------------------------------------------------- who may do what


@pytest.fixture
def everything(models: Store) -> Store:
    """A store with something of every kind in it."""
    models.broken("0:2 -:2 {}:1", aged="9d", name="blocked")
    models.broken("0:2 1:2", aged="9d", name="behind")
    models.broken("-:2", aged="9d", name="unclaimed")
    models.model()
    models.orphan()
    models.temporary()
    models.temporary("README")
    models.manifest("corrupt/latest", b"{")
    for path in (models.blobs, models.manifests):
        age(path, "1h")
    return models


def test_audit_changes_nothing_at_all(run: Run, everything: Store) -> None:
    for path in everything.path.rglob("*"):
        if path.is_file():
            os.utime(path, (time.time() - 9 * 86400, path.stat().st_mtime))
    before = everything.snapshot()
    for words in (
        ["audit"],
        ["--json", "audit"],
        ["-v", "audit"],
        ["-q", "audit"],
        ["clean", "-n"],
    ):
        calm(run("--store", str(everything.path), *words), 1, 3)
    assert everything.snapshot() == before


def test_clean_without_a_terminal_and_without_yes_does_nothing(run: Run, everything: Store) -> None:
    names = everything.names()
    calm(run("--store", str(everything.path), "clean", stdin=subprocess.DEVNULL), 2)
    assert everything.names() == names


def test_clean_takes_what_is_stale_and_nothing_else(run: Run, models: Store) -> None:
    stale = models.broken("0:1 -:1", aged="9d", name="stale")
    young = models.broken("0:1 -:1", aged="2h", name="young")
    kept = models.model()
    orphan, temporary = models.orphan(), models.temporary()
    done = calm(run("--store", str(models.path), "clean", "--yes"), 0, 1, 3)
    left = set(models.names())
    assert f"sha256-{kept}" in left
    assert f"sha256-{young}-partial" in left
    if b"Refused" not in done.stdout:  # an Ollama of this machine, or a container, forbids it
        assert not left & {f"sha256-{stale}-partial", f"sha256-{orphan}", temporary.name}


@pytest.fixture
def nobodys(
    as_nobody: Callable[[Sequence[str]], list[str]], nobodys_package: Path
) -> Callable[..., Done]:
    """Runs the command line as an ordinary user."""

    def call(*words: str) -> Done:
        command = as_nobody(["-W", "error", "-m", "watcher", *words])
        return subprocess.run(command, capture_output=True, timeout=120)

    return call


@needs_root
def test_without_permission_the_exact_command_is_printed(
    nobodys: Callable[..., Done], models: Store, nobodys_package: Path, tmp_path: Path
) -> None:
    models.model()
    models.path.chmod(0o700)
    done = calm(nobodys("--store", str(models.path), "--json", "audit"), 4)
    said = done.stderr.decode()
    assert "permission denied" in said
    # The interpreter is another user's here; the words behind it are what has to be right.
    _, python, *words = shlex.split(said[said.index("sudo ") :].splitlines()[0])
    assert Path(python).name.startswith("python")
    again = {**environment(tmp_path), "PYTHONPATH": str(nobodys_package)}
    done = subprocess.run([sys.executable, *words], capture_output=True, env=again, timeout=120)
    assert json.loads(calm(done, 0, 1).stdout)["store"]["path"] == str(models.path)


@needs_root
def test_an_ordinary_user_may_look_and_can_not_change(
    nobodys: Callable[..., Done], everything: Store
) -> None:
    before = everything.names()
    calm(nobodys("--store", str(everything.path), "--json", "audit"), 1)
    done = calm(nobodys("--store", str(everything.path), "clean", "--yes"), 0, 1, 3, 4)
    assert everything.names() == before
    assert b"sudo" in done.stdout + done.stderr or b"root" in done.stdout + done.stderr


@needs_root
@pytest.mark.parametrize("what", ["blobs", "manifests", "data", "sidecar", "manifest"])
def test_what_can_not_be_read_is_reported(
    nobodys: Callable[..., Done], everything: Store, what: str
) -> None:
    digest = digest_of("behind")
    path = {
        "blobs": everything.blobs,
        "manifests": everything.manifests,
        "data": everything.blobs / f"sha256-{digest}-partial",
        "sidecar": everything.blobs / f"sha256-{digest}-partial-0",
        "manifest": everything.manifests / LIBRARY / "llama3" / "latest",
    }[what]
    path.chmod(0o000)
    done = calm(nobodys("--store", str(everything.path), "--json", "audit"), 1, 4)
    assert b"denied" in done.stdout + done.stderr or b"listed" in done.stdout


@needs_root
def test_a_read_only_store(run: Run, everything: Store) -> None:
    path = str(everything.path)
    subprocess.run(["mount", "--bind", path, path], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", path], check=True)
        assert json.loads(calm(run("--store", path, "--json", "audit"), 1).stdout)["store"][
            "read_only"
        ]
        before = everything.names()
        done = calm(run("--store", path, "clean", "--yes"), 3, 4)
        assert b"read-only" in (done.stdout + done.stderr).lower()
        assert everything.names() == before
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.mark.skipif(IS_ROOT, reason="root may write everywhere")
def test_a_store_without_the_right_to_write(run: Run, everything: Store) -> None:
    for path in (everything.path, everything.blobs):
        path.chmod(0o555)
    try:
        calm(run("--store", str(everything.path), "audit"), 1)
        done = calm(run("--store", str(everything.path), "clean", "--yes"), 3, 4)
        assert b"sudo" in done.stdout + done.stderr
    finally:
        for path in (everything.path, everything.blobs):
            path.chmod(0o755)


# ---------------------------------------------------------------- who else is at work


@pytest.mark.parametrize(
    "host", ["127.0.0.1:99999", "[::1", "a b", "x:port", "http://[", "\udcff", "x" * 5000, ":٣"]
)
def test_a_server_with_any_settings(
    audit: Callable[..., Any], models: Store, tmp_path: Path, host: str
) -> None:
    program = tmp_path / "ollama"
    program.write_text("#!/bin/sh\nexec 2>&-\necho ready\nread x\n")
    program.chmod(0o755)
    env = {"OLLAMA_HOST": host, "OLLAMA_MODELS": str(models.path)}
    child = subprocess.Popen(
        [str(program), "serve", "\udcff\n\x1b[2J"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=env,
    )
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        models.broken("0:1 -:1", aged="9d")
        assert child.pid in [each["pid"] for each in audit()["servers"]]
        child.kill()


def test_a_process_of_any_name_that_has_a_file_open(
    audit: Callable[..., Any], run: Run, models: Store
) -> None:
    digest = models.broken("0:1 -:1", aged="9d")
    code = "import ctypes, sys; held = open(sys.argv[1], 'rb'); name = b'\\xff\\n\\x1b[2J'\n"
    code += "ctypes.CDLL(None).prctl(15, name); print('ready', flush=True); sys.stdin.read()"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(models.blobs / f"sha256-{digest}-partial")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        (one,) = audit()["downloads"]
        assert [each["pid"] for each in one["holders"]] == [child.pid]
        done = calm(run("--store", str(models.path), "clean", "--yes"), 3)
        assert b"\x1b" not in done.stdout
        child.kill()


# ---------------------------------------------------------------- what is ours


@pytest.mark.parametrize("what", ["intents/note", "intents", "lock", "state.json", "logs", ""])
@pytest.mark.parametrize("kind", ["file", "folder", "symlink", "fifo"])
def test_anything_in_place_of_our_own_files(
    run: Run, models: Store, tmp_path: Path, what: str, kind: str
) -> None:
    models.broken("0:1 -:1", aged="9d")
    models.model()
    path = models.path / ".ollama-watch" / what
    if what:
        path.parent.mkdir(parents=True)
    outside = tmp_path / "outside"
    outside.mkdir()
    match kind:
        case "file":
            path.write_bytes(b"what is this")
        case "folder":
            path.mkdir()
        case "symlink":
            path.symlink_to(outside)
        case _:
            os.mkfifo(path)
    calm(run("--store", str(models.path), "audit", timeout=120), 0, 1)
    calm(run("--store", str(models.path), "clean", "--yes", timeout=120), 0, 1, 3, 4)
    assert os.listdir(outside) == []


def test_a_state_with_hostile_digests(run: Run, models: Store) -> None:
    models.broken("0:1 -:1", aged="9d")
    ours = models.path / ".ollama-watch"
    calm(run("--store", str(models.path), "clean", "--yes", "--stale-after", "99d"), 0)
    state = json.loads((ours / "state.json").read_bytes())
    (one,) = state["downloads"].values()
    for digest in ("../../../etc/passwd", "a\0b", "9" * 300, ""):
        state["downloads"] = {digest: {**one, "inode": 1}}
        (ours / "state.json").write_text(json.dumps(state))
        calm(run("--store", str(models.path), "clean", "--yes", "--stale-after", "99d"), 0)


# ---------------------------------------------------------------- how it is called


@pytest.mark.parametrize(
    "words",
    [
        ["--frobnicate"],
        ["frobnicate"],
        ["audit", "--fail-on", "bad"],
        ["audit", "x"],
        ["-v", "-q", "audit"],
        ["clean", "--stale-after", "soon"],
        ["--config", "/nonexistent", "audit"],
        ["--config", "/dev/zero", "audit"],
        ["pull", "--host", "ftp://x", "x"],
        ["pull", "--host", "http://[x", "x"],
        ["queue", "run", "--host", "a b"],
        ["clean", "--stale-after", "-1d"],
        ["clean", "--stale-after", "9" * 400 + "d"],
    ],
)
def test_a_wrong_call_is_reported(run: Run, models: Store, words: list[str]) -> None:
    done = calm(run("--store", str(models.path), *words), 2)
    assert done.stderr
    assert not done.stdout


def test_a_bad_setting_is_named(run: Run, models: Store, tmp_path: Path) -> None:
    done = calm(run("--store", str(models.path), "audit", env={"OLLAMA_WATCH_CLEAN": "perhaps"}), 2)
    assert b"OLLAMA_WATCH_CLEAN" in done.stderr
    assert b"perhaps" in done.stderr
    (tmp_path / "bad.toml").write_text('stale_after = "soon"')
    done = calm(run("--config", str(tmp_path / "bad.toml"), "audit"), 2)
    assert b"bad.toml: stale_after" in done.stderr


@pytest.mark.parametrize("days", ["99999d", "999999999d"])
def test_a_very_long_patience(run: Run, models: Store, days: str) -> None:
    models.broken("0:1 -:1")
    calm(run("--store", str(models.path), "--json", "clean", "-n", "--stale-after", days), 0, 1, 2)


def test_a_model_is_meant_whatever_its_case(run: Run, models: Store) -> None:
    digest = models.broken("0:1 -:1", aged="9d")
    models.manifest("llama3/latest", {digest: 200 * MB})
    for target in ("llama3", "LLAMA3", "Llama3:Latest", "registry.ollama.ai/library/llama3"):
        done = calm(run("--store", str(models.path), "--json", "clean", "-n", target), 1, 3)
        planned = json.loads(done.stdout)["plan"]
        assert len(planned["actions"]) + len(planned["refusals"]) == 1, target


@pytest.mark.parametrize(
    "command", [["clean", "-n"], ["repair", "-n", "--offline"], ["verify"], ["repair", "--yes"]]
)
def test_what_no_store_has_is_an_error_that_lists_the_nearest(
    run: Run, models: Store, command: list[str]
) -> None:
    digest = models.broken("0:1 -:1", aged="9d")
    models.manifest("llama3/8b", {digest: 200 * MB})
    for target, nearest in (
        ("llama3", b"llama3:8b"),
        ("lama3:8b", b"llama3:8b"),
        (f"sha256-{digest[:8]}0000", digest[:12].encode()),
    ):
        done = calm(run("--store", str(models.path), *command, target), 2)
        assert target.encode() in done.stderr
        assert nearest in done.stderr, done.stderr
    for target in ("../..", "", "a b", "sha256-", "\x1b[31m", "x" * 4000):
        calm(run("--store", str(models.path), *command, target), 2)


def test_a_beginning_that_several_digests_have_is_an_error(run: Run, models: Store) -> None:
    for last in "ab":
        (models.blobs / f"sha256-{'1' * 63}{last}").write_bytes(b"an orphan")
    done = calm(run("--store", str(models.path), "clean", "-n", "11111"), 2)
    assert b"2 digests" in done.stderr
    calm(run("--store", str(models.path), "clean", "-n", "1" * 63 + "a"), 0)


@pytest.mark.parametrize("words", [["audit"], ["--json", "audit"], ["clean", "-n"], ["--help"]])
@pytest.mark.parametrize("full", [True, False])
def test_a_reader_that_has_gone_and_a_full_disk(
    run: Run, models: Store, words: list[str], full: bool, slow: bool
) -> None:
    """Over a healthy store the one, over a broken one the other; with `--slow` both over both."""
    for healthy in (True, False) if slow else (full,):
        if not healthy:
            models.broken("0:1 -:1", aged="9d")
        with contextlib.ExitStack() as opened:
            if full:
                out = opened.enter_context(open("/dev/full", "wb")).fileno()
            else:
                reader, out = os.pipe()
                os.close(reader)
                opened.callback(os.close, out)
            done = run(
                "--store",
                str(models.path),
                *words,
                capture_output=False,
                stdout=out,
                stderr=subprocess.PIPE,
            )
            calm(done, 0, 1, 4)


def test_closed_streams(run: Run, models: Store) -> None:
    script = 'exec "$0" -m watcher --store "$1" audit >&- 2>&- <&-'
    done = run_shell(script, models)
    assert done.returncode in (0, 1, 4)
    calm(run_shell(script.replace(" 2>&-", ""), models), 0, 1, 4)


def run_shell(script: str, models: Store) -> Done:
    return subprocess.run(
        ["sh", "-c", script, sys.executable, str(models.path)],
        capture_output=True,
        env=environment(models.path.parent),
        timeout=120,
    )


def test_ctrl_c_ends_with_130(models: Store) -> None:
    pipe = models.path.parent / "slow.toml"
    os.mkfifo(pipe)
    held = os.open(pipe, os.O_RDWR)  # the end of the settings never comes
    command = [sys.executable, "-m", "watcher", "--store", str(models.path)]
    child = subprocess.Popen(
        [*command, "--config", str(pipe), "audit"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(models.path.parent),
    )
    wait_until(lambda: _has_open(child.pid, pipe), "it to read them")
    child.send_signal(signal.SIGINT)
    out, said = child.communicate(timeout=120)
    os.close(held)
    calm(subprocess.CompletedProcess([], child.returncode, out, said), 130)
    assert b"interrupted" in said


def _has_open(pid: int, path: Path) -> bool:
    return any(
        os.path.realpath(f"/proc/{pid}/fd/{number}") == str(path.resolve())
        for number in os.listdir(f"/proc/{pid}/fd")
    )
