"""What the machine refuses is named for what it is: no traceback, and nothing else is blamed."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Run, environment, needs_root
from .support.notation import Store, digest_of

Done = subprocess.CompletedProcess[bytes]
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is missing")
#: What none of these is.
OTHER_THINGS = (b"Traceback", b"bug in ollama-watch", b"Exception ignored", b"writing the output")


def said(done: Done, *codes: int) -> str:
    text = done.stdout + done.stderr
    for each in OTHER_THINGS:
        assert each not in text, text.decode(errors="replace")
    assert done.returncode in codes, (done.returncode, text)
    return text.decode()


SAME_LOOK = pytest.mark.slow("another command looks in the same way")


def at_most(number: int, limit: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(limit, (number, number))


@pytest.fixture
def full(models: Store) -> Store:
    models.model()
    return models


BETWEEN = pytest.mark.slow("one more limit between two that are tried")


@pytest.mark.parametrize(
    "most",
    [pytest.param(most, marks=BETWEEN if most in (6, 8, 10, 12) else ()) for most in range(5, 14)],
)
def test_too_few_descriptors(run: Run, full: Store, most: int) -> None:
    limit = at_most(most, resource.RLIMIT_NOFILE)
    done = run("--store", str(full.path), "audit", preexec_fn=limit)
    told = said(done, 0, 4)
    if done.returncode:
        assert "Too many open files" in told
        assert "no store" not in told


def test_too_small_a_file_limit_is_no_failing_disk(run: Run, full: Store) -> None:
    limit = at_most(0, resource.RLIMIT_FSIZE)
    done = run("--store", str(full.path), "queue", "add", "llama3", preexec_fn=limit)
    told = said(done, 4)
    assert "larger files" in told
    assert "dmesg" not in told


@pytest.mark.parametrize(
    "megabytes",
    [
        pytest.param(each, marks=BETWEEN if each in (25, 35, 50) else ())
        for each in (25, 30, 35, 40, 50, 60)
    ],
)
def test_too_little_memory(run: Run, full: Store, megabytes: int) -> None:
    limit = at_most(megabytes << 20, resource.RLIMIT_AS)
    done = run("--store", str(full.path), "verify", preexec_fn=limit)
    if b"Python runtime" in done.stderr or done.returncode < 0:
        pytest.skip("not even Python starts in that")
    said(done, 0, 4)


@needs_root
@pytest.mark.parametrize(
    "command",
    [
        "audit",
        "repair",
        "status",
        *(pytest.param(each, marks=SAME_LOOK) for each in ("clean", "df", "verify")),
    ],
)
def test_a_machine_without_proc(full: Store, tmp_path: Path, command: str) -> None:
    words = [sys.executable, "-m", "watcher", "--store", str(full.path), command]
    script = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        'while umount -l /proc 2>/dev/null; do :; done; exec "$@"',
        "sh",
        *words,
    ]
    done = subprocess.run(script, capture_output=True, env=environment(tmp_path), timeout=120)
    told = said(done, 4)
    assert "/proc" in told
    assert "no store" not in told


def fails(
    store: Store, tmp_path: Path, call: str, path: Path, command: str, error: str = "EIO"
) -> Done:
    """A command for which the kernel refuses one kind of call on a path."""
    inject = f"inject={call}:error={error}"
    trace = ["strace", "-f", "-o", "/dev/null", "-P", str(path), "-e", inject]
    words = [sys.executable, "-m", "watcher", "--store", str(store.path), *command.split()]
    done = subprocess.run(
        [*trace, *words], capture_output=True, env=environment(tmp_path), timeout=120
    )
    if "PTRACE" in done.stderr.decode(errors="replace"):
        pytest.skip("strace may not trace")
    return done


@needs_strace
@pytest.mark.parametrize("where", ["data", "progress file", "manifest", "transfer", "transfers"])
@pytest.mark.parametrize("command", ["audit", pytest.param("repair -n", marks=SAME_LOOK)])
def test_a_lack_of_descriptors_is_no_fault_of_a_file(
    full: Store, tmp_path: Path, where: str, command: str
) -> None:
    digest = full.broken("48:48 10:20", name="unfinished")
    transfers = full.path / ".ollama-watch/transfers"
    ours = transfers / digest_of("a transfer")
    ours.mkdir(parents=True)
    (ours / "data").write_bytes(b"data")
    # As they are opened: by their names in a folder.
    name = {
        "data": f"sha256-{digest}-partial",
        "progress file": f"sha256-{digest}-partial-1",
        "manifest": "latest",
        "transfer": ours.name,
        "transfers": transfers.name,
    }[where]
    done = fails(full, tmp_path, "openat", Path(name), command, "EMFILE")
    assert "Too many open files" in said(done, 4)


@needs_strace
@pytest.mark.parametrize(
    ("command", "where"),
    [
        *(("audit", where) for where in ("", "blobs", "manifests")),
        *(("repair -n", "blobs"), ("clean -n", "manifests"), ("status", ""), ("df", "blobs")),
        *(
            pytest.param(command, where, marks=SAME_LOOK)
            for command, places in {
                "repair -n": ("", "manifests"),
                "clean -n": ("", "blobs"),
                "status": ("blobs", "manifests"),
                "df": ("", "manifests"),
            }.items()
            for where in places
        ),
    ],
)
def test_a_disk_that_fails(full: Store, tmp_path: Path, where: str, command: str) -> None:
    done = fails(full, tmp_path, "getdents64", full.path / where, command)
    told = said(done, 0, 1, 4)
    if done.returncode == 4:
        assert "Input/output error" in told or "can't be listed" in told


@needs_strace
@pytest.mark.parametrize("command", ["audit", "repair -n", "clean -n", "status"])
def test_an_error_without_a_path_is_not_blamed_on_the_output(
    full: Store, tmp_path: Path, command: str
) -> None:
    """Python names no path where the kernel does not say how large a file system is."""
    done = fails(full, tmp_path, "fstatfs", full.path, command)
    assert "Input/output error" in said(done, 4)


@pytest.mark.parametrize("module", ["click", "typing"])
def test_interrupted_while_it_is_loaded(module: str, full: Store, tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / f"{module}.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(60)\n")
    words = [sys.executable, "-m", "watcher", "--store", str(full.path), "audit"]
    env = {**environment(tmp_path), "PYTHONPATH": str(slow)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, env=env, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == b"here\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
        done = Done(words, process.returncode, out, err)
    assert "interrupted" in said(done, 130)


def test_interrupted_in_a_library_that_leaves_its_socket_open(tmp_path: Path) -> None:
    script = """
import os, signal, socket, sys
connect = socket.socket.connect
def interrupted(self, address):
    os.kill(os.getpid(), signal.SIGINT)
    connect(self, address)
socket.socket.connect = interrupted
from watcher.cli import main
sys.exit(main(["demo"]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        timeout=120,
        env=environment(tmp_path) | {"TMPDIR": str(tmp_path)},
    )
    assert "interrupted" in said(done, 130)


def test_a_module_that_can_not_be_loaded_is_reported_without_a_traceback(
    full: Store, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "click.py").write_text("import no_such_module_anywhere\n")
    words = [sys.executable, "-m", "watcher", "--store", str(full.path), "audit"]
    env = {**environment(tmp_path), "PYTHONPATH": str(broken)}
    done = subprocess.run(words, capture_output=True, env=env, timeout=120)
    assert "no_such_module_anywhere" in said(done, 4)


@pytest.mark.parametrize("command", ["audit", "df", "clean -n", "--json audit", "status"])
def test_only_what_can_not_be_printed_is_reported_as_that(
    run: Run, full: Store, command: str
) -> None:
    with open("/dev/full", "wb") as nowhere:
        done = run(
            "--store", str(full.path), *command.split(),
            capture_output=False, stdout=nowhere, stderr=subprocess.PIPE,
        )  # fmt: skip
    assert b"writing the output failed: No space left on device" in done.stderr
    assert b"Traceback" not in done.stderr
    assert done.returncode == 4
