"""``service`` from outside: into a root folder, and on a machine where systemd seems to run."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from watcher.service import units

from .conftest import IS_ROOT, NOBODY, environment, needs_root
from .support import commands

Service = Callable[..., subprocess.CompletedProcess[str]]
PROGRAM = "/opt/ollama-watch/bin/ollama-watch"
SYSTEM = "etc/systemd/system"


def install_program(root: Path, path: str = PROGRAM) -> Path:
    """The script that pip makes, as it lies in a root folder."""
    script = root / path.lstrip("/")
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(
        f"#!{sys.executable}\nimport sys\nfrom watcher.cli import main\nsys.exit(main())\n"
    )
    script.chmod(0o755)
    return script


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A system that does not run, with ollama-watch in it."""
    install_program(tmp_path / "root")
    return tmp_path / "root"


@pytest.fixture
def service(tmp_path: Path, root: Path) -> Service:
    """Runs ``ollama-watch service …`` of the root's installation, without a terminal."""

    def call(
        *words: str, script: Path | None = None, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        program = script or root / PROGRAM.lstrip("/")
        given = {**environment(tmp_path), **(env or {})}
        done = commands.run(words, given, script=str(program))
        out, errors = done.stdout.decode(), done.stderr.decode()
        return subprocess.CompletedProcess(list(words), done.returncode, out, errors)

    return call


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file and folder below one, with mode and content."""
    return {
        path.relative_to(folder).as_posix(): (
            path.lstat().st_mode,
            os.fsencode(os.readlink(path))
            if path.is_symlink()
            else path.read_bytes()
            if path.is_file()
            else b"",
        )
        for path in folder.rglob("*")
    }


def here(root: Path) -> list[str]:
    return ["--root", str(root)]


# ---------------------------------------------------------------- into a root folder


@pytest.mark.parametrize("start", ["empty", "folders", "drop-in folder"])
@pytest.mark.parametrize("ways", [[], ["--clean", "weekly"], ["--cron", "--clean", "daily"]])
def test_uninstalling_leaves_the_root_as_it_was(
    root: Path, service: Service, ways: list[str], start: str
) -> None:
    if start != "empty":
        (root / SYSTEM).mkdir(parents=True)
        (root / SYSTEM / "other.service").write_text("[Unit]\n")
        (root / "etc/cron.d").mkdir()
    if start == "drop-in folder":
        (root / SYSTEM / "ollama.service.d").mkdir()
    before = tree(root)
    done = service("service", "install", *here(root), *ways, "--yes")
    assert (done.returncode, done.stderr) == (0, "")
    assert tree(root) != before
    done = service("service", "uninstall", *here(root), "--yes")
    assert (done.returncode, done.stderr) == (0, "")
    assert tree(root) == before


def test_one_way_after_another_leaves_nothing_of_the_first(root: Path, service: Service) -> None:
    before = tree(root)
    for ways in (["--clean", "weekly"], ["--cron"], [], ["--clean", "daily"], ["--cron"]):
        assert service("service", "install", *here(root), *ways, "-y").returncode == 0
    assert {path for path in tree(root) if path.startswith("etc")} == {
        "etc",
        "etc/cron.d",
        "etc/cron.d/ollama-watch",
    }
    assert service("service", "uninstall", *here(root), "-y").returncode == 0
    assert tree(root) == before


def test_a_second_installation_changes_nothing_and_asks_nobody(
    root: Path, service: Service
) -> None:
    service("service", "install", *here(root), "--clean", "weekly", "-y")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    done = service("service", "install", *here(root), "--clean", "weekly")
    assert (done.returncode, done.stdout) == (0, "nothing to do: the service is installed\n")
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    service("service", "uninstall", *here(root), "-y")
    done = service("service", "uninstall", *here(root))
    assert (done.returncode, done.stdout) == (0, "nothing to do: the service is installed\n")


def test_files_are_readable_for_all_and_have_the_folders_owner(
    root: Path, service: Service
) -> None:
    (root / SYSTEM).mkdir(parents=True)
    if IS_ROOT:
        os.chown(root / SYSTEM, NOBODY, NOBODY)
    service("service", "install", *here(root), "-y")
    owner = (root / SYSTEM).stat().st_uid
    for name, mode in ((units.SERVICE, 0o644), (units.DROP_IN, 0o644), ("ollama.service.d", 0o755)):
        status = (root / SYSTEM / name).stat()
        assert (status.st_mode & 0o7777, status.st_uid) == (mode, owner)


def test_units_name_this_installation_and_the_stores_owner(root: Path, service: Service) -> None:
    store = root / "srv/x/models"
    (store / "blobs").mkdir(parents=True)
    (root / "etc").mkdir()
    (root / "etc/passwd").write_text(f"me:x:{store.stat().st_uid}:7::/:/bin/sh\n")
    (root / "etc/group").write_text(f"mine:x:{store.stat().st_gid}:\n")
    service("service", "install", *here(root), "--store", "/srv/x/models", "-y")
    text = (root / SYSTEM / units.SERVICE).read_text().splitlines()
    assert f"ExecStart={sys.executable} -I {PROGRAM} --store /srv/x/models daemon" in text
    assert {"User=me", "Group=mine"} <= set(text)
    writable = "/srv/x/models" if IS_ROOT else "/srv/x"
    assert f"ReadWritePaths={writable}" in text


@needs_root
def test_service_may_write_around_the_store_and_behind_its_symlink(
    root: Path, service: Service
) -> None:
    def writable() -> str:
        shown = service("service", "show", *here(root), "--store", "/data/x/models").stdout
        return next(line for line in shown.splitlines() if line.startswith("ReadWritePaths="))

    store = root / "data/x/models"
    store.mkdir(parents=True)
    (root / "big/blobs").mkdir(parents=True)
    os.chown(store, NOBODY, NOBODY)
    (store / "blobs").symlink_to("../../../big/blobs")
    assert writable() == "ReadWritePaths=/data/x/models /big/blobs"
    os.chown(store.parent, NOBODY, NOBODY)
    assert writable() == "ReadWritePaths=/data/x /big/blobs"
    (store / "blobs").unlink()
    assert writable() == "ReadWritePaths=/data/x"
    os.chown(store, 0, 0)
    os.chown(store.parent, 0, 0)
    assert writable() == "ReadWritePaths=/data/x/models"


def test_a_root_without_a_store_gets_the_usual_one(root: Path, service: Service) -> None:
    done = service("service", "show", *here(root), "--clean", "weekly")
    wanted = units.units(units.Installation(program=PROGRAM, python=sys.executable), "weekly")
    folder = root / SYSTEM
    texts = (f"# {folder / name}\n{units.stamped(text)}" for name, text in wanted.items())
    assert (done.returncode, done.stdout) == (0, "\n".join(texts))
    assert not folder.exists()


def test_the_settings_file_that_was_named_is_the_services(
    root: Path, service: Service, tmp_path: Path
) -> None:
    (tmp_path / "my settings.toml").write_text("clean = true\n")
    shown = service("--config", str(tmp_path / "my settings.toml"), "service", "show", *here(root))
    assert f'--config "{tmp_path}/my settings.toml" --store' in shown.stdout


def test_the_metrics_may_be_written_where_the_settings_allow_it(
    root: Path, service: Service, tmp_path: Path
) -> None:
    (tmp_path / "x.toml").write_text('metrics_file = "/var/lib/node exporter/x.prom"\n')
    shown = service("--config", str(tmp_path / "x.toml"), "service", "show", *here(root)).stdout
    wanted = 'ReadWritePaths=/usr/share/ollama/.ollama "-/var/lib/node exporter"'
    assert wanted in shown.splitlines()


# ---------------------------------------------------------------- what is not ours


@pytest.mark.parametrize("kind", ["foreign", "link", "masked", "folder", "fifo"])
def test_service_keeps_files_that_it_did_not_write(root: Path, service: Service, kind: str) -> None:
    path = root / SYSTEM / units.SERVICE
    path.parent.mkdir(parents=True)
    match kind:
        case "foreign":
            path.write_text("[Service]\nExecStart=/bin/true\n")
        case "link":
            (root / "mine").write_text(units.stamped("mine\n"))
            path.symlink_to(root / "mine")
        case "masked":
            path.symlink_to("/dev/null")
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
    before = tree(root) if kind != "fifo" else {}
    done = service("service", "install", *here(root), "-y")
    assert done.returncode == 3
    assert f"kept {path}: ollama-watch service install did not write it" in done.stderr
    assert (root / SYSTEM / units.DROP_IN).exists()
    done = service("service", "uninstall", *here(root), "-y")
    assert done.returncode == 3
    if kind != "fifo":
        assert tree(root) == before


def test_an_edited_file_is_reported_and_kept(root: Path, service: Service) -> None:
    service("service", "install", *here(root), "-y")
    path = root / SYSTEM / units.SERVICE
    edited = path.read_text().replace("MemoryMax=512M", "MemoryMax=1G")
    path.write_text(edited)
    for words in (["install", "--store", "/data/models"], ["uninstall"]):
        done = service("service", *words, *here(root), "-y")
        assert done.returncode == 3
        assert f"kept {path}: it was edited after installation" in done.stderr
        assert path.read_text() == edited
    assert not (root / SYSTEM / "ollama.service.d").exists()
    path.unlink()
    assert service("service", "install", *here(root), "-y").returncode == 0
    assert "MemoryMax=512M" in path.read_text()


def test_an_update_replaces_what_was_not_edited(root: Path, service: Service) -> None:
    before = tree(root)
    service("service", "install", *here(root), "-y")
    service("service", "install", *here(root), "--store", "/data/models", "-y")
    assert "--store /data/models daemon" in (root / SYSTEM / units.SERVICE).read_text()
    service("service", "uninstall", *here(root), "-y")
    assert tree(root) == before


def test_somebody_elses_file_that_is_not_wanted_is_ignored(root: Path, service: Service) -> None:
    path = root / SYSTEM / units.CLEAN_TIMER
    path.parent.mkdir(parents=True)
    path.write_text("[Timer]\n")
    done = service("service", "install", *here(root), "-y")
    assert (done.returncode, done.stderr) == (0, "")


def test_no_link_leads_out_of_the_root(root: Path, service: Service, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (root / "etc").mkdir()
    (root / "etc/systemd").symlink_to(tmp_path / "outside")
    done = service("service", "install", *here(root), "-y")
    assert done.returncode == 3
    assert "leads outside of" in done.stderr
    assert not list((tmp_path / "outside").iterdir())


def test_a_leftover_of_a_kill_is_in_nobodys_way(root: Path, service: Service) -> None:
    (root / SYSTEM).mkdir(parents=True)
    before = tree(root)
    (root / SYSTEM / f".{units.SERVICE}.new").write_text("half")
    assert service("service", "install", *here(root), "-y").returncode == 0
    assert service("service", "uninstall", *here(root), "-y").returncode == 0
    assert tree(root) == before


# ---------------------------------------------------------------- asking


def test_without_a_terminal_nothing_is_done_unasked(root: Path, service: Service) -> None:
    before = tree(root)
    for more in ([], ["--json"]):
        done = service("service", "install", *here(root), *more)
        assert done.returncode == 2
        assert "--yes" in done.stderr
        assert tree(root) == before
    service("service", "install", *here(root), "-y")
    installed = tree(root)
    assert service("service", "uninstall", *here(root)).returncode == 2
    assert tree(root) == installed


def on_a_terminal(command: list[str], answer: bytes, env: dict[str, str]) -> tuple[int, str]:
    """Run a command on a terminal of its own, and answer its question."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    said = b""
    try:
        while b"[y/N]" not in said:
            said += os.read(ours, 65536)
        os.write(ours, answer)
        while piece := os.read(ours, 65536):
            said += piece
    except OSError:
        pass  # how a terminal says that the other end is closed
    finally:
        os.close(ours)
    return process.wait(timeout=120), said.decode().replace("\r\n", "\n")


def test_a_terminal_shows_the_files_before_it_asks(root: Path, tmp_path: Path) -> None:
    before = tree(root)
    command = [sys.executable, str(root / PROGRAM.lstrip("/")), "service", "install", *here(root)]
    code, said = on_a_terminal(command, b"n\n", environment(tmp_path))
    assert code == 1
    assert tree(root) == before
    for text in units.units(units.Installation(program=PROGRAM, python=sys.executable)).values():
        for line in filter(None, text.splitlines()):
            assert f"    {line}\n" in said
    code, said = on_a_terminal(command, b"y\n", environment(tmp_path))
    assert code == 0
    assert (root / SYSTEM / units.SERVICE).exists()
    code, said = on_a_terminal([*command, "--store", "/data/m"], b"n\n", environment(tmp_path))
    assert code == 1
    assert f"    +ExecStart={sys.executable} -I {PROGRAM} --store /data/m daemon\n" in said
    assert "MemoryMax" not in said


def test_as_documents(root: Path, service: Service) -> None:
    shown = json.loads(service("service", "show", *here(root), "--json").stdout)
    assert shown["schema"] == "ollama-watch/service/1"
    done = json.loads(service("service", "install", *here(root), "-y", "--json").stdout)
    assert [each["change"] for each in done["files"]] == ["write", "write"]
    for each in done["files"]:
        assert Path(each["path"]).read_text() == each["text"]
    again = json.loads(service("service", "install", *here(root), "--json").stdout)
    assert [each["change"] for each in again["files"]] == ["same", "same"]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("path", ["/tmp/x/ollama-watch", "/home/me/venv/bin/ollama-watch"])
def test_a_program_that_does_not_last_is_refused(root: Path, service: Service, path: str) -> None:
    before = tree(root)
    script = install_program(root, path)
    done = service("service", "install", *here(root), "-y", script=script)
    assert done.returncode == 3
    assert path in done.stderr
    assert "/opt" in done.stderr
    script.unlink()
    assert {name for name in tree(root) if name.startswith("etc")} <= before.keys()


def test_a_link_to_the_program_is_resolved(root: Path, service: Service) -> None:
    link = root / "usr/bin/ollama-watch"
    link.parent.mkdir(parents=True)
    link.symlink_to("../../opt/ollama-watch/bin/ollama-watch")
    done = service("service", "show", *here(root), script=link)
    assert f"ExecStart={sys.executable} -I {PROGRAM} " in done.stdout


def test_a_path_that_no_unit_can_hold_is_refused(root: Path, service: Service) -> None:
    done = service("service", "install", *here(root), "--store", "/a$b", "-y")
    assert done.returncode == 3
    assert "/a$b" in done.stderr


def test_wrong_usage(root: Path, service: Service, tmp_path: Path) -> None:
    for words, named in (
        (["--user", "--root", str(root)], "--user"),
        (["--user", "--cron"], "--user"),
        (["--root", "/"], "--root"),
        (["--root", str(tmp_path / "none")], "--root"),
        (["--clean", "hourly"], "hourly"),
    ):
        done = service("service", "install", *words, "-y")
        assert done.returncode == 2
        assert named in done.stderr
    two = service("--store", "/a", "--store", "/b", "service", "install", *here(root), "-y")
    assert two.returncode == 2


def test_no_store_is_no_service(root: Path, service: Service, tmp_path: Path) -> None:
    done = service("service", "install", "--user", "--store", str(tmp_path / "none"), "-y")
    assert done.returncode == 10


# ---------------------------------------------------------------- where systemd runs

#: Writes down what it is told. The first argument that it finds in ``refuse`` it refuses; enabled
#: is what ``enabled`` says.
SYSTEMCTL = """#!/bin/sh
echo "systemctl $*" >>"$SPOKEN"
case "$*" in
    *is-enabled*) test -e "$SPOKEN.enabled" ;;
    "clean "*) test ! -e "$SPOKEN.no-bus" || { echo "Failed to connect to bus" >&2; exit 1; } ;;
    *enable*) test ! -e "$SPOKEN.refuse" || { printf "no such\\nluck\\n" >&2; exit 1; } ;;
esac
"""


class Machine:
    """This machine with another /opt, /run and folders of units: a mount namespace.

    What it can't stand in for is systemd itself: that is a script that writes down what it is told.
    """

    def __init__(self, folder: Path, root: Path, *, systemd: bool) -> None:
        self.folder, self.units, self.cron = folder, folder / "units", folder / "cron"
        self.spoken = folder / "spoken"
        self.models = folder / "srv/models"
        (self.models / "blobs").mkdir(parents=True)
        (self.units / "ollama.service.d").mkdir(parents=True)
        self.cron.mkdir()
        install_program(folder, "/bin/systemctl").write_text(SYSTEMCTL)
        runs = folder / "run"
        (runs / "systemd/system" if systemd else runs).mkdir(parents=True)
        mounts = {
            root / "opt": "/opt",
            runs: "/run",
            self.units: "/etc/systemd/system",
            self.cron: "/etc/cron.d",
        }
        made = [f'mount --bind "{source}" {target}' for source, target in mounts.items()]
        become = [] if IS_ROOT else ["--map-root-user"]
        script = " && ".join([*made, 'exec "$@"'])
        self.command = ["unshare", "--mount", *become, "sh", "-c", script, "sh"]

    def __call__(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        given = environment(self.folder) | {"SPOKEN": str(self.spoken)} | env
        given["PATH"] = f"{self.folder}/bin:{given['PATH']}"
        self.spoken.unlink(missing_ok=True)
        done = subprocess.run(
            [*self.command, sys.executable, "-W", "error", PROGRAM, "service", *words],
            env=given,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert "Traceback" not in done.stderr
        return done

    def told(self) -> list[str]:
        """What systemd was told, questions left out."""
        said = self.spoken.read_text().splitlines() if self.spoken.exists() else []
        return [line for line in said if "is-enabled" not in line and " show " not in line]


@pytest.fixture
def machine(tmp_path: Path, root: Path) -> Callable[..., Machine]:
    """Makes such a machine, or skips the test where nothing may be mounted."""

    def make(*, systemd: bool = True) -> Machine:
        made = Machine(tmp_path / "machine", root, systemd=systemd)
        for folder in ("/opt", "/etc/systemd/system", "/etc/cron.d"):
            if not os.path.isdir(folder):
                pytest.skip(f"there is no {folder} here")
        probe = subprocess.run([*made.command, "true"], capture_output=True, check=False)
        if probe.returncode:
            pytest.skip(f"nothing can be mounted: {probe.stderr.decode()}")
        return made

    return make


def test_systemd_is_notified_again_and_again(machine: Callable[..., Machine]) -> None:
    here = machine()
    before = tree(here.units)
    models = ["--store", str(here.models)]
    assert here("install", *models, "--clean", "daily", "-y").returncode == 0
    both = f"{units.SERVICE} {units.CLEAN_TIMER}"
    assert here.told() == ["systemctl daemon-reload", f"systemctl enable --quiet --now {both}"]
    Path(f"{here.spoken}.enabled").touch()

    assert here("install", *models, "--clean", "daily", "-y").returncode == 0
    assert here.told() == []

    assert here("install", "--store", str(here.models / "."), "-y").returncode == 0
    assert here.told() == [
        f"systemctl disable --quiet --now {units.CLEAN_TIMER}",
        f"systemctl clean --what=state {units.CLEAN_TIMER}",
        "systemctl daemon-reload",
        f"systemctl enable --quiet --now {units.SERVICE}",
    ]
    (here.models.parent / "other/blobs").mkdir(parents=True)
    assert here("install", "--store", str(here.models.parent / "other"), "-y").returncode == 0
    assert here.told()[-1] == f"systemctl try-restart {units.SERVICE}"

    assert here("uninstall", "-y").returncode == 0
    assert here.told() == [
        f"systemctl disable --quiet --now {units.SERVICE}",
        "systemctl daemon-reload",
    ]
    assert tree(here.units) == before


def test_service_install_enables_units_that_a_failed_install_wrote(
    machine: Callable[..., Machine],
) -> None:
    here = machine()
    refuse = Path(f"{here.spoken}.refuse")
    refuse.touch()
    done = here("install", "--store", str(here.models), "-y")
    assert done.returncode == 4
    assert "no such luck" in done.stderr
    assert f"systemctl enable --quiet --now {units.SERVICE}" in done.stderr
    refuse.unlink()
    assert here("install", "--store", str(here.models), "-y").returncode == 0
    assert f"systemctl enable --quiet --now {units.SERVICE}" in here.told()


def test_without_dbus_everything_goes_but_when_the_timer_last_ran(
    machine: Callable[..., Machine],
) -> None:
    here = machine()
    before = tree(here.units)
    Path(f"{here.spoken}.no-bus").touch()
    assert here("install", "--store", str(here.models), "--clean", "daily", "-y").returncode == 0
    done = here("uninstall", "-y")
    assert done.returncode == 0, done.stderr
    assert tree(here.units) == before


def test_a_foreign_service_is_neither_started_nor_stopped(machine: Callable[..., Machine]) -> None:
    here = machine()
    (here.units / units.SERVICE).write_text("[Service]\nExecStart=/bin/true\n")
    for words in (["install", "--store", str(here.models), "-y"], ["uninstall", "-y"]):
        assert here(*words).returncode == 3
        assert here.told() == ["systemctl daemon-reload"]


def test_with_a_root_systemd_is_never_notified(
    machine: Callable[..., Machine], tmp_path: Path
) -> None:
    here = machine()
    (tmp_path / "image").mkdir()
    for word in ("install", "uninstall"):
        assert here(word, "--root", str(tmp_path / "image"), "-y").returncode == 0
        assert here.told() == []


def test_without_systemd_the_files_wait_for_it(machine: Callable[..., Machine]) -> None:
    here = machine(systemd=False)
    done = here("install", "--store", str(here.models), "-y")
    assert done.returncode == 0
    assert f"systemctl enable --now {units.SERVICE}" in done.stdout
    assert here.told() == []
    done = here("install", "--store", str(here.models), "--cron", "-y")
    assert done.returncode == 0
    assert [path.name for path in here.cron.iterdir()] == ["ollama-watch"]
    assert not (here.units / units.SERVICE).exists()


@pytest.mark.parametrize("runs", [True, False])
def test_a_service_of_ones_own(machine: Callable[..., Machine], runs: bool) -> None:
    here = machine()
    home = here.folder / "home"
    home.mkdir()
    manager = here.folder / "mine/systemd"
    manager.mkdir(parents=True)
    if runs:
        (manager / "private").touch()
    before = tree(home)
    models, mine = ["--store", str(here.models)], {"XDG_RUNTIME_DIR": str(manager.parent)}
    assert here("install", "--user", *models, "-y", **mine).returncode == 0
    told = [
        "systemctl --user daemon-reload",
        f"systemctl --user enable --quiet --now {units.SERVICE}",
    ]
    assert here.told() == (told if runs else [])
    written = home / ".config/systemd/user" / units.SERVICE
    assert f"--store {here.models} daemon" in written.read_text()
    assert "WantedBy=default.target" in written.read_text()
    assert "User=" not in written.read_text()
    assert not (here.units / units.SERVICE).exists()
    assert here("uninstall", "--user", "-y", **mine).returncode == 0
    assert tree(home) == before


@needs_root
def test_service_install_without_permission_fails_before_the_prompt(
    tmp_path: Path, as_nobody: Callable[[list[str]], list[str]]
) -> None:
    program = install_program(tmp_path, "/opt/x/ollama-watch")
    (tmp_path / "models/blobs").mkdir(parents=True)
    words = ["install", "--root", str(tmp_path), "-y"], ["install", "--user", "--store"]
    for given, named in (
        (words[0], "no permission to write it"),
        ([*words[1], str(tmp_path / "models"), "-y"], "can't write there"),
    ):
        command = as_nobody(["-W", "error", str(program), "service", *given])
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 4
        assert named in done.stderr
