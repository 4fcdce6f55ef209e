"""The Debian package: built, installed, used, removed and purged on a copy of this system."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import IS_ROOT
from tests.doc_tables import ROOT
from tests.support.notation import Store
from watcher.demo.registry import Layer, Registry
from watcher.service import units

from . import built

FOLDER = ROOT / "packaging/deb"
HOME = "/usr/lib/ollama-watch"
INSTALL = "apt-get install -qq --no-install-recommends /tmp/it.deb"
STORE = "/usr/share/ollama/.ollama/models"
#: Over this system, in a mount namespace that ends with the process. The store has a file system of
#: its own: an overlay of two may give a file another inode once the kernel has forgotten it.
OVERLAY = """\
mount -t tmpfs tmpfs "$0" && mkdir "$0/upper" "$0/work" "$0/root" &&
mount -t overlay -o "lowerdir=/,upperdir=$0/upper,workdir=$0/work" overlay "$0/root" &&
mount --rbind /dev "$0/root/dev" && mount -t proc proc "$0/root/proc" &&
mkdir -p "$0/root/usr/share/ollama" && mount -t tmpfs tmpfs "$0/root/usr/share/ollama" &&
mount -t tmpfs tmpfs "$0/root/tmp" && mount -t tmpfs tmpfs "$0/root/run" && echo ready && exec cat
"""


class System:
    """A copy of this system that can be changed."""

    def __init__(self, holder: int, root: Path) -> None:
        self._enter = ["nsenter", "--mount", f"--target={holder}", "chroot", str(root)]

    def run(self, *words: str, code: int = 0, given: bytes = b"") -> str:
        path = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
        done = subprocess.run(
            [*self._enter, *words], input=given, env=path, capture_output=True, check=False
        )
        assert done.returncode == code, (words, done.stdout, done.stderr)
        return done.stdout.decode()

    def has(self, path: str) -> bool:
        return not subprocess.run([*self._enter, "test", "-e", path], check=False).returncode


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    holder = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", OVERLAY, tmp_path],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert holder.stderr is not None
    try:
        if holder.stdout.readline() != b"ready\n":
            pytest.skip(f"can't copy this system: {holder.stderr.read().decode()}")
        yield System(holder.pid, tmp_path / "root")
    finally:
        holder.communicate()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not IS_ROOT:
        pytest.skip("needs root")
    for name in ("dpkg-deb", "apt-get", "/usr/bin/python3"):
        if shutil.which(name) is None:
            pytest.skip(f"needs {name}")
    folder = tmp_path_factory.mktemp("deb")
    wheel = built.wheel(built.tree(folder / "tree"), folder / "wheel").filename
    done = subprocess.run(
        [folder / "tree/packaging/deb/build.sh", str(wheel), folder],
        env={**os.environ, "PYTHON": sys.executable, "DPKG_DEB_OPTIONS": "-Zgzip -z1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def field(package: Path, name: str) -> str:
    words = ["dpkg-deb", "--field", str(package), name]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow("it downloads all that the program needs")
def test_it_is_installed_used_removed_and_purged(
    package: Path, system: System, registry: Registry, tmp_path: Path
) -> None:
    system.run("sh", "-c", "cat >/tmp/it.deb", given=package.read_bytes())
    system.run(
        "sh", "-c", "grep -q ^ollama: /etc/passwd || useradd --system -d /usr/share/ollama ollama"
    )
    Store(tmp_path / "models").model()
    packed = subprocess.run(
        ["tar", "-c", "-C", tmp_path, "models"], capture_output=True, check=True
    )
    system.run("mkdir", "-p", os.path.dirname(STORE))
    system.run("tar", "-x", "-C", os.path.dirname(STORE), given=packed.stdout)
    system.run("chown", "-R", "ollama:", "/usr/share/ollama")

    system.run("sh", "-c", f"{INSTALL} || {{ apt-get update -qq && {INSTALL}; }}")
    assert system.run("dpkg", "--verify", "ollama-watch") == ""
    assert system.run("ollama-watch", "--version").startswith("ollama-watch")
    assert system.run("systemctl", "--root=/", "is-enabled", "ollama-watch.service", code=1) == (
        "disabled\n"
    )
    assert "all match" in system.run("ollama-watch", "verify")
    assert system.run("stat", "-c", "%U", f"{STORE}/.ollama-watch") == "ollama\n"
    model = registry.add_model("demo", "1b", [Layer(1_000_000)])
    system.run("ollama-watch", "pull", "--insecure", model.name)  # by Debian's libcurl
    before = system.run("sh", "-c", f"cd {STORE} && find . -printf '%p %i %s %T@\\n' | sort")

    shown = units.Installation(f"{HOME}/bin/ollama-watch", python=f"{HOME}/bin/python3")
    wanted = units.units(shown, "weekly")
    for name in (units.SERVICE, units.CLEAN_SERVICE, units.CLEAN_TIMER):
        assert system.run("cat", f"/usr/lib/systemd/system/{name}") == wanted[name]
    example = "/usr/share/doc/ollama-watch/examples/ollama-watch.conf"
    assert system.run("cat", example) == wanted[units.DROP_IN]

    for name in (units.SERVICE, units.CLEAN_TIMER):
        system.run("systemctl", "--root=/", "enable", name)
    system.run("sh", "-c", "echo 'clean = true' >>/etc/ollama-watch.toml")
    system.run("dpkg", "--remove", "ollama-watch")
    assert not system.has(HOME)
    assert not system.has("/usr/bin/ollama-watch")
    assert "clean = true" in system.run("cat", "/etc/ollama-watch.toml")
    system.run("dpkg", "--purge", "ollama-watch")
    left = system.run(
        "sh", "-c", "find /etc /usr /var -name '*ollama-watch*' -not -path '*/.ollama-watch*'"
    )
    assert [each for each in left.splitlines() if not each.startswith("/usr/local/")] == []
    after = system.run("sh", "-c", f"cd {STORE} && find . -printf '%p %i %s %T@\\n' | sort")
    assert after == before


@pytest.mark.slow("it downloads all that the program needs")
def test_the_linter_finds_nothing(package: Path) -> None:
    if shutil.which("lintian") is None:
        pytest.skip("needs lintian")
    words = [
        "lintian",
        "--allow-root",
        "--fail-on",
        "error,warning",
        "--tag-display-limit=0",
        str(package),
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.slow("it downloads all that the program needs")
def test_the_package_names_its_dependencies_version_and_maintainer(package: Path) -> None:
    depends = [each.partition(" ")[0] for each in field(package, "Depends").split(", ")]
    assert depends == ["python3", "python3", "python3-pycurl", "ca-certificates", "libc6"]
    assert field(package, "Version").endswith("-1")
    assert "example.org" in field(package, "Maintainer"), "the placeholder of setup.cfg"


def test_its_scripts_are_of_any_posix_shell() -> None:
    for name in ("build.sh", "postinst", "prerm", "postrm"):
        assert os.access(FOLDER / name, os.X_OK)
        subprocess.run(["sh", "-n", FOLDER / name], check=True)
