"""What the unit of the server says, as systemd reads it, and whether systemd has it off."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import ordinary_user
from watcher.observe import unit

SYSTEM = "etc/systemd/system"
USERS = "root:x:0:0::/root:/bin/sh\nollama:x:12:34::/srv/ollama:/bin/false\n"


def put(root: Path, path: str, text: str) -> Path:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


@pytest.fixture
def root(tmp_path: Path) -> Path:
    put(tmp_path / "root", "etc/passwd", USERS)
    put(tmp_path / "root", "etc/group", "root:x:0:\nrender:x:99:\n")
    return tmp_path / "root"


def read(root: Path, *service: str) -> unit.Unit:
    put(root, f"{SYSTEM}/ollama.service", "[Service]\n" + "\n".join(service) + "\n")
    found = unit.from_files(str(root))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("lines", "store", "named"),
    [
        (["Environment=OLLAMA_MODELS=/data/m"], "/data/m", True),
        (["Environment=HOME=/data"], "/data/.ollama/models", True),
        (["Environment=HOME=/data", "User=ollama"], "/data/.ollama/models", True),
        (["User=ollama"], "/srv/ollama/.ollama/models", False),
        (["User=12"], "/srv/ollama/.ollama/models", False),
        (["User=nobody-knows"], None, False),
        ([], None, False),
        (['Environment="OLLAMA_MODELS=/a b" HOME=/data'], "/a b", True),
        (["Environment='OLLAMA_MODELS=\"/quoted\"'"], "/quoted", True),
        (["Environment=OLLAMA_MODELS=/one", "Environment=OLLAMA_MODELS=/two"], "/two", True),
        (["Environment=OLLAMA_MODELS=/one", "Environment=", "User=ollama"],
         "/srv/ollama/.ollama/models", False),
        (["Environment=OLLAMA_MODELS=%h/m%%"], "/root/m%", True),
        (["Environment=HOME=/data \\", "  OLLAMA_MODELS=/m"], "/m", True),
        (["# Environment=OLLAMA_MODELS=/no", "; User=no", "Environment=HOME=/h"],
         "/h/.ollama/models", True),
        (["Environment=OLLAMA_MODELS=m", "WorkingDirectory=/srv"], "/srv/m", True),
        (["Environment=OLLAMA_MODELS=m", "WorkingDirectory=~", "User=ollama"],
         "/srv/ollama/m", True),
        (["Environment=OLLAMA_MODELS=m"], "/m", True),
        (["[Install]", "Environment=OLLAMA_MODELS=/no"], None, False),
    ],
)  # fmt: skip
def test_where_its_server_has_the_store(
    root: Path, lines: list[str], store: str | None, named: bool
) -> None:
    found = read(root, *lines)
    is_named = found.store is not None and not {"OLLAMA_MODELS", "HOME"}.isdisjoint(found.variables)
    assert (found.store, is_named) == (store, named)


@pytest.mark.parametrize(
    ("text", "store"),
    [
        ("OLLAMA_MODELS=/file\n", "/file"),
        ('# OLLAMA_MODELS=/no\n\nOLLAMA_MODELS="/with blank" \n', "/with blank"),
        ("HOME=/data\n", "/unit"),
        ("OLLAMA_MODELS=/first\nOLLAMA_MODELS='/last'\n", "/last"),
        ("OLLAMA_MODELS=/be\\\ngun\n", "/begun"),
        ("no variable at all\n", "/unit"),
    ],
)
def test_a_file_of_variables_comes_after_the_units_own(root: Path, text: str, store: str) -> None:
    put(root, "etc/default/ollama", text)
    first = ["EnvironmentFile=-/etc/default/ollama", "Environment=OLLAMA_MODELS=/unit"]
    assert read(root, *first, "EnvironmentFile=-/etc/missing").store == store


def test_drop_ins_count_by_their_names_and_the_nearest_of_one_name(root: Path) -> None:
    put(root, "usr/lib/systemd/system/ollama.service", "[Service]\nUser=ollama\n")
    of_vendor = "usr/lib/systemd/system/ollama.service.d"
    put(root, f"{of_vendor}/50-a.conf", "[Service]\nEnvironment=OLLAMA_MODELS=/vendor\n")
    put(root, f"{of_vendor}/90-z.conf", "[Service]\nEnvironment=OLLAMA_NOPRUNE=1\n")
    found = unit.from_files(str(root))
    assert found is not None
    assert (found.store, found.variables["OLLAMA_NOPRUNE"]) == ("/vendor", "1")
    put(root, f"{SYSTEM}/ollama.service.d/50-a.conf", "[Service]\nEnvironment=HOME=/admin\n")
    put(root, f"{SYSTEM}/ollama.service.d/60-b.conf", "[Service]\nUser=root\n")
    put(root, f"{SYSTEM}/ollama.service.d/70-c", "[Service]\nUser=ollama\n")
    found = unit.from_files(str(root))
    assert found is not None
    assert (found.store, found.user) == ("/admin/.ollama/models", "")
    # One for all services, by a name that comes last.
    put(root, f"{SYSTEM}/service.d/99-all.conf", "[Service]\nEnvironment=HOME=/last\n")
    put(root, f"{SYSTEM}/service.d/00-all.conf", "[Service]\nUser=12\n")
    found = unit.from_files(str(root))
    assert found is not None
    assert (found.store, found.user) == ("/last/.ollama/models", "")


@pytest.mark.parametrize("masked", ["link", "empty", "missing"])
def test_no_unit(root: Path, masked: str) -> None:
    folder = root / SYSTEM
    folder.mkdir(parents=True)
    if masked == "link":
        (folder / unit.NAME).symlink_to(os.devnull)
    elif masked == "empty":
        (folder / unit.NAME).touch()
    assert unit.from_files(str(root)) is None


def test_links_lead_below_the_root(root: Path) -> None:
    put(root, "opt/unit", "[Service]\nEnvironment=HOME=/inside\n")
    (root / SYSTEM).mkdir(parents=True)
    (root / SYSTEM / unit.NAME).symlink_to("/opt/unit")
    found = unit.from_files(str(root))
    assert found is not None
    assert found.store == "/inside/.ollama/models"


def test_a_unit_prepares_a_store_only_if_prepare_of_that_store_runs_before_its_start(
    root: Path,
) -> None:
    ours = "ExecStartPre=-/usr/bin/ollama-watch --store /m -q prepare"
    assert read(root, ours).prepares("/m")
    assert not read(root, ours).prepares("/other")
    assert not read(root, ours, "ExecStartPre=").prepares("/m")
    assert not read(root, "ExecStartPre=/usr/bin/ollama-watch audit").prepares("/m")


def test_groups_of_a_units_user_are_those_of_user_and_unit(root: Path) -> None:
    assert read(root, "User=ollama").ids() == (12, frozenset({34}))
    assert read(root, "User=ollama", "Group=render").ids() == (12, frozenset({99}))
    assert read(root, "User=ollama", "SupplementaryGroups=render 7").ids() == (
        12,
        frozenset({34, 99, 7}),
    )
    assert read(root).ids() == (0, frozenset({0}))
    assert read(root, "User=gone").ids() is None


def test_a_file_of_variables_that_this_user_can_not_read(root: Path) -> None:
    put(root, "etc/secret", "OLLAMA_MODELS=/elsewhere\n").chmod(0)
    with ordinary_user(root.parent):
        found = read(root, "EnvironmentFile=/etc/secret", "Environment=HOME=/h")
    assert found.unread == "/etc/secret"


@pytest.mark.parametrize(
    ("file_state", "active", "idle"),
    [
        ("enabled", "inactive", False),
        ("disabled", "inactive", True),
        ("masked", "inactive", True),
        ("disabled", "active", False),
        ("static", "inactive", False),
        ("", "inactive", False),
    ],
)
def test_systemd_says_whether_it_is_off(
    root: Path, monkeypatch: pytest.MonkeyPatch, file_state: str, active: str, idle: bool
) -> None:
    shown = put(root, "shown", f"UnitFileState={file_state}\nActiveState={active}\n")
    put(root, "bin/systemctl", f"#!/bin/sh\ncat {shown}\n").chmod(0o755)
    monkeypatch.setenv("PATH", str(root / "bin"), prepend=os.pathsep)
    found = read(root, "Environment=HOME=/data")
    monkeypatch.setattr(unit, "from_files", lambda: found)
    assert unit.find() == found._replace(idle=idle)


def test_where_no_systemd_answers_it_is_not_off(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = read(root, "Environment=HOME=/data")
    monkeypatch.setattr(unit, "from_files", lambda: found)
    for path in (str(root / "nothing"), str(root / "bin")):
        put(root, "bin/systemctl", "#!/bin/sh\nexit 1\n").chmod(0o755)
        monkeypatch.setenv("PATH", path)
        assert unit.find() == found
