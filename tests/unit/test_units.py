"""The service's files as text: what they say, whose they are, and that systemd understands them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from watcher.pull import queue_process
from watcher.service import units
from watcher.service.units import Installation, Kind

REPOSITORY = Path(__file__).parents[2]
needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze"
)
USUAL = Installation()
ODD = USUAL._replace(
    program="/opt/a b%c/ollama-watch",
    store="/data/it's 50%/%n #;x/models",
    writable=("/data/it's 50%/%n #;x", "/m n"),
    config="/etc/my settings.toml",
    metrics="/var/lib/my metrics",
)
HOME = USUAL._replace(
    store="/home/me/.ollama/models", user="me", group="me", writable=("/home/me/.ollama",)
)
WAYS = {"usual": USUAL, "odd": ODD, "home": HOME, "personal": HOME._replace(personal=True)}


def lines(text: str, key: str) -> list[str]:
    return [line.partition("=")[2] for line in text.splitlines() if line.startswith(f"{key}=")]


# ---------------------------------------------------------------- whose a file is


def test_the_folder_for_packagers_has_the_units_of_an_usual_installation() -> None:
    folder = REPOSITORY / "systemd"
    found = {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert found == {
        name: units.stamped(text) for name, text in units.units(USUAL, "weekly").items()
    }


def test_every_file_is_one_that_an_uninstallation_knows() -> None:
    assert set(units.units(USUAL, "weekly")) == set(units.UNITS)
    assert set(units.cron(USUAL, "weekly")) == set(units.CRON)


@pytest.mark.parametrize("made", [0, 3, 40])
def test_a_stamp_reports_what_was_made_and_that_nothing_was_touched(made: int) -> None:
    assert units.stamp(units.stamped("[Unit]\n", made)) == (made, True)


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text + "#\n",
        lambda text: text.replace("Restart=on-failure", "Restart=always"),
        lambda text: text.replace("folders=0", "folders=9"),
        lambda text: text.rstrip("\n"),
    ],
)
def test_an_edited_file_is_ours_and_distinct_from_one_that_was_not(edit) -> None:  # type: ignore[no-untyped-def]
    stamp = units.stamp(edit(units.stamped(units.units(USUAL)[units.SERVICE])))
    assert stamp is not None
    assert not stamp[1]


def test_a_stop_leaves_the_queue_the_time_that_it_takes() -> None:
    (seconds,) = re.findall(
        r"^TimeoutStopSec=(\d+)s$", units.units(USUAL)[units.SERVICE], re.MULTILINE
    )
    assert int(seconds) > queue_process._END_SECONDS


@pytest.mark.parametrize(
    "text", ["", "[Unit]\n", "\n" + units.stamped("x"), "#" + units.stamped("")]
)
def test_a_unit_without_a_stamp_in_its_first_line_is_not_ours(text: str) -> None:
    assert units.stamp(text) is None


@pytest.mark.parametrize(
    ("found", "body", "kind", "text"),
    [
        (None, "new", Kind.WRITE, units.stamped("new", 2)),
        (units.stamped("old", 1), "new", Kind.REPLACE, units.stamped("new", 1)),
        (units.stamped("new", 1), "new", Kind.SAME, units.stamped("new", 1)),
        (units.stamped("old", 1), None, Kind.REMOVE, units.stamped("old", 1)),
        (units.stamped("old") + "x", "new", Kind.EDITED, units.stamped("old") + "x"),
        (units.stamped("old") + "x", None, Kind.EDITED, units.stamped("old") + "x"),
        ("theirs", "new", Kind.FOREIGN, "theirs"),
        ("", None, Kind.FOREIGN, ""),
    ],
)
def test_how_a_file_is_changed(found: str | None, body: str | None, kind: Kind, text: str) -> None:
    assert units.change(found, body, missing=2) == (kind, text)


# ---------------------------------------------------------------- what can't be installed


@pytest.mark.parametrize(
    ("program", "personal", "refused"),
    [
        ("/usr/bin/ollama-watch", False, False),
        ("/opt/pipx/venvs/ollama-watch/bin/ollama-watch", False, False),
        ("/tmp/venv/bin/ollama-watch", False, True),
        ("/tmp/venv/bin/ollama-watch", True, True),
        ("/run/x/ollama-watch", True, True),
        ("/tmpfiles/bin/ollama-watch", False, False),
        ("/home/me/venv/bin/ollama-watch", False, True),
        ("/home/me/venv/bin/ollama-watch", True, False),
        ("/home/me/.cache/uv/x/bin/ollama-watch", True, True),
        ("/root/venv/bin/ollama-watch", False, True),
        ("/homes/x/bin/ollama-watch", False, False),
    ],
)
def test_temporary_places_of_a_program_are_refused(
    program: str, personal: bool, refused: bool
) -> None:
    assert bool(units.passing(program, personal=personal)) is refused


@pytest.mark.parametrize("char", ["\n", "\0", '"', "\\", "$", "\udcff", "\x1b"])
def test_paths_that_a_unit_can_not_hold(char: str) -> None:
    assert units.unwritable(f"/a{char}b")
    assert not units.unwritable("/a b/it's 50%/ü")


# ---------------------------------------------------------------- systemd


@pytest.mark.parametrize("where", [USUAL, HOME, WAYS["personal"]])
def test_the_files_fit_a_terminal(where: Installation) -> None:
    for text in (*units.units(where, "weekly").values(), *units.cron(where, "weekly").values()):
        long = [line for line in units.stamped(text).splitlines() if len(line) > 80]
        assert all("ollama-watch --store" in line for line in long)


def test_percent_and_spaces_are_escaped_in_units() -> None:
    text = units.units(ODD)[units.SERVICE]
    settings, store = "/etc/my settings.toml", "/data/it's 50%%/%%n #;x/models"
    python = "/usr/bin/python3 -I"
    command = f'{python} "/opt/a b%%c/ollama-watch" --config "{settings}" --store "{store}" daemon'
    assert lines(text, "ExecStart") == [command]
    assert lines(text, "ReadWritePaths") == [
        '"/data/it\'s 50%%/%%n #;x" "/m n" "-/var/lib/my metrics"'
    ]


def test_homes_are_hidden_unless_the_store_is_in_one() -> None:
    for where, hidden in ((USUAL, ["yes"]), (HOME, ["read-only"])):
        for name in (units.SERVICE, units.CLEAN_SERVICE):
            assert lines(units.units(where, "daily")[name], "ProtectHome") == hidden


def test_only_who_asks_registries_gets_the_network() -> None:
    texts = units.units(USUAL, "weekly")
    assert not lines(texts[units.SERVICE], "IPAddressDeny")
    assert lines(texts[units.CLEAN_SERVICE], "IPAddressDeny") == ["any"]
    assert lines(texts[units.CLEAN_SERVICE], "IPAddressAllow") == ["localhost"]


def test_one_users_systemd_is_asked_for_nothing_that_it_can_not_give() -> None:
    text = "".join(units.units(WAYS["personal"], "daily").values())
    for key in ("User", "AmbientCapabilities", "ProtectSystem", "PrivateTmp", "IPAddressDeny"):
        assert not lines(text, key)
    assert lines(text, "WantedBy") == ["default.target", "timers.target"]


def write(folder: Path, where: Installation, clean: str = "weekly") -> None:
    """The units in a folder, and a server's unit as Ollama's installer writes it."""
    for name, text in units.units(where, clean).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(units.stamped(text))
    (folder / "ollama.service").write_text(
        "[Unit]\nDescription=Ollama\n[Service]\nExecStart=/usr/bin/ollama serve\nUser=ollama\n"
    )


def stub(root: Path, *programs: str) -> None:
    for program in programs:
        path = root / program.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The root folder of a system with systemd's own targets and the programs of the units."""
    root = tmp_path / "root"
    stub(root, "/bin/kill", "/usr/bin/ollama")
    targets = root / "usr/lib/systemd/system"
    targets.mkdir(parents=True)
    for target in ("sysinit", "basic", "shutdown", "multi-user", "default", "timers", "local-fs"):
        (targets / f"{target}.target").write_text(f"[Unit]\nDescription={target}\n")
    for target in ("time-set", "time-sync"):
        (targets / f"{target}.target").write_text(f"[Unit]\nDescription={target}\n")
    return root


def verify(root: Path) -> str:
    """What systemd has to say against the units in a root folder."""
    named = (units.SERVICE, units.CLEAN_SERVICE, units.CLEAN_TIMER, "ollama.service")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", f"--root={root}", *named],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr


@needs_analyze
@pytest.mark.parametrize("where", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("clean", units.RHYTHMS)
def test_systemd_accepts_the_units(root: Path, where: Installation, clean: str) -> None:
    write(root / "etc/systemd/system", where, clean)
    stub(root, where.program, where.python)
    assert verify(root) == ""


@needs_analyze
def test_systemd_looks_for_the_program_where_it_is(root: Path) -> None:
    """So that nothing to say means something. (Of a command that may fail it says nothing.)"""
    write(root / "etc/systemd/system", ODD._replace(python="/opt/a b%c/python"))
    told = verify(root)
    assert set(re.findall(r"(\S+): Command /opt/a b%c/python is not", told)) == {
        units.SERVICE,
        units.CLEAN_SERVICE,
    }


@needs_analyze
@pytest.mark.parametrize("where", [USUAL, ODD, HOME], ids=["usual", "odd", "home"])
@pytest.mark.parametrize("unit", [units.SERVICE, units.CLEAN_SERVICE])
def test_its_exposure_is_no_more_than_it_takes(root: Path, where: Installation, unit: str) -> None:
    write(root / "etc/systemd/system", where)
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", f"--root={root}", "--no-pager", unit],
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"Overall exposure level for \S+: (\d+\.\d)", done.stdout)
    assert found is not None
    assert float(found[1]) <= 2.2


@pytest.mark.parametrize("personal", [False, True])
def test_python_is_isolated_but_in_a_users_own_service(personal: bool) -> None:
    where = USUAL._replace(personal=personal)
    started = [
        line.partition("=")[2].removeprefix("-")
        for text in units.units(where, "daily").values()
        for line in text.splitlines()
        if line.startswith(("ExecStart=", "ExecStartPre="))
    ]
    started += [
        line.split(" root ")[1]
        for line in units.cron(where, "daily")["ollama-watch"].splitlines()
        if " root " in line and not line.startswith("#")
    ]
    assert len(started) == 5
    start = where.program if personal else f"{where.python} -I {where.program} "
    assert all(line.startswith(start) for line in started), started


# ---------------------------------------------------------------- cron


def test_a_line_of_cron_means_the_command_to_its_shell() -> None:
    text = units.cron(ODD._replace(program="/usr/bin/printf"), "weekly")["ollama-watch"]
    entries = [line for line in text.splitlines() if not line.startswith("#")]
    assert [" ".join(entry.split(" ")[:6]) for entry in entries] == [
        "*/10 * * * * root",
        "17 4 * * 0 root",
    ]
    for entry, words in zip(entries, (["-q", "prepare"], ["-q", "clean", "--yes"]), strict=True):
        command = entry.split(" ", 6)[6]
        assert not re.search(r"(?<!\\)%", command), "cron ends the command there"
        shell = command.replace("\\%", "%").replace(
            "/usr/bin/python3 -I /usr/bin/printf", "printf '<%s>'"
        )
        heard = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True)
        said = ["--config", ODD.config, "--store", ODD.store, *words]
        assert heard.stdout == "".join(f"<{word}>" for word in said)


def test_cron_reads_the_file() -> None:
    assert all("." not in name for name in units.CRON)
    assert units.cron(USUAL)["ollama-watch"].endswith("\n")
