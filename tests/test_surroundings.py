"""What a command finds around it: streams that are closed, a folder that is gone, a unit, links."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import Run, environment
from .support.notation import Store
from .test_service import PROGRAM, SYSTEM, install_program

IN_A_GONE_FOLDER = 'cd "$0" && rmdir "$0" && exec "$@"'


SAME_START = pytest.mark.slow("each command with each; streams are looked at before any command")
ALL_CLOSED = "<&- >&- 2>&-"


@pytest.mark.parametrize(
    ("words", "closed"),
    [
        *((["audit"], closed) for closed in ("<&-", "<&- >&-", ALL_CLOSED)),
        *((words, ALL_CLOSED) for words in (["repair"], ["clean"], ["status"], ["queue", "run"])),
        *(
            pytest.param(words, closed, marks=SAME_START)
            for words in (["repair"], ["clean"], ["status"], ["queue", "run"])
            for closed in ("<&-", "<&- >&-")
        ),
    ],
)
def test_closed_streams_do_no_harm(
    models: Store, tmp_path: Path, words: list[str], closed: str
) -> None:
    models.model()
    command = [sys.executable, "-W", "error", "-m", "watcher", "--store", str(models.path), *words]
    done = subprocess.run(
        ["sh", "-c", f'"$@" {closed}', "sh", *command],
        env=environment(tmp_path), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("given", "code", "told"),
    [
        (["--store", "STORE"], 0, ""),
        (
            ["--store", "models"],
            10,
            "models (--store) is relative to the working directory, which is gone",
        ),
        ([], 10, "models (OLLAMA_MODELS) is relative to the working directory, which is gone"),
        (["--store", "STORE", "--config", "x.toml"], 2, "x.toml"),
    ],
)
def test_a_working_directory_that_is_gone(
    models: Store, tmp_path: Path, given: list[str], code: int, told: str
) -> None:
    models.model()
    (tmp_path / "gone").mkdir()
    words = [str(models.path) if each == "STORE" else each for each in given]
    command = [sys.executable, "-W", "error", "-m", "watcher", *words, "audit"]
    done = subprocess.run(
        ["sh", "-c", IN_A_GONE_FOLDER, str(tmp_path / "gone"), *command],
        env={**environment(tmp_path), "OLLAMA_MODELS": "models"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert told in done.stderr
    assert "fault" not in done.stderr


@pytest.mark.parametrize("target", ["/nowhere/blobs", "here"])
def test_blobs_that_are_a_link_to_nowhere_say_where_it_points(
    models: Store, run: Run, target: str
) -> None:
    models.model()
    for path in models.blobs.iterdir():
        path.unlink()
    models.blobs.rmdir()
    models.blobs.symlink_to(target)
    if target == "here":
        (models.path / "here").touch()
    done = run("--store", str(models.path), "audit", "--json")
    assert done.returncode == 1, done.stderr
    (fails,) = (
        each for each in json.loads(done.stdout)["findings"] if each["kind"] == "store_start_fails"
    )
    assert str(models.path / target) in fails["evidence"]


@pytest.mark.parametrize(
    ("service", "drop_in", "store", "user"),
    [
        ("User=ollama", "Environment=OLLAMA_MODELS=/data/m", "/data/m", "ollama"),
        ("User=ollama", "Environment=HOME=/data", "/data/.ollama/models", "ollama"),
        ("User=ollama", "User=me", "/home/me/.ollama/models", "me"),
        ("User=ollama", "EnvironmentFile=/etc/vars", "/by/file", "ollama"),
        ("User=ollama", "", "/usr/share/ollama/.ollama/models", "ollama"),
        ("", "", "/usr/share/ollama/.ollama/models", "ollama"),
    ],
)
def test_service_goes_by_the_unit_and_the_drop_ins_of_the_root(
    tmp_path: Path, service: str, drop_in: str, store: str, user: str
) -> None:
    root = tmp_path / "root"
    script = install_program(root, PROGRAM)
    (root / SYSTEM / "ollama.service.d").mkdir(parents=True)
    (root / SYSTEM / "ollama.service").write_text(f"[Service]\n{service}\n")
    (root / SYSTEM / "ollama.service.d/override.conf").write_text(f"[Service]\n{drop_in}\n")
    (root / "etc/passwd").write_text("me:x:7:8::/home/me:\nollama:x:9:9::/usr/share/ollama:\n")
    (root / "etc/group").write_text("friends:x:8:\nollama:x:9:\n")
    (root / "etc/vars").write_text("OLLAMA_MODELS=/by/file\n")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), "service", "show", "--root", str(root)],
        env=environment(tmp_path), capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    group = {"me": "friends"}.get(user, user)
    assert f"--store {store} daemon" in done.stdout
    assert f"User={user}\nGroup={group}\n" in done.stdout
    assert os.listdir(root / SYSTEM / "ollama.service.d") == ["override.conf"]
