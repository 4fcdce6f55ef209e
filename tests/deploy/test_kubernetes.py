"""The manifests: valid for the API, and what runs in them works with the rights that they give."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import pytest
import yaml

from tests.conftest import needs_root
from tests.support import kubernetes
from tests.support.driving import HealthyStore, is_right
from tests.support.prometheus import free_port
from tests.support.servers import Server, blob, collapsed, wait_until, wait_written
from watcher.demo.registry import Layer, Registry
from watcher.model import DAY, HOUR, MIB

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/kubernetes"
OVERLAYS = sorted(each.name for each in (FOLDER / "overlays").iterdir())
Object = dict[str, Any]
#: Bytes of the layer that a server pulls, and how many of them arrive before it is killed.
SIZE, HELD = 8_000_000, 6_000_000


@functools.cache
def kustomize() -> list[str]:
    """The command that builds a folder; skips where there is none that knows components."""
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    if shutil.which("kubectl"):
        version = ["kubectl", "version", "--client", "--output=yaml"]
        told = subprocess.run(version, capture_output=True, text=True, check=False).stdout
        if "kustomizeVersion: v5" in told:
            return ["kubectl", "kustomize"]
    pytest.skip("needs kustomize, or kubectl 1.27 or later")


@functools.cache
def built(overlay: str) -> str:
    command = [*kustomize(), str(FOLDER / "overlays" / overlay)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def objects(overlay: str) -> dict[str, Object]:
    """What an overlay makes, by kind and name."""
    return {
        f"{each['kind']}/{each['metadata']['name']}": each
        for each in yaml.safe_load_all(built(overlay))
    }


# ---------------------------------------------------------------- what they say


@pytest.fixture(scope="module")
def schemas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for tool in ("kubeconform", "go"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    folder = tmp_path_factory.mktemp("schemas")
    try:
        kubernetes.write_schemas(folder)
    except LookupError as error:
        pytest.skip(str(error))
    return folder


def conform(schemas: Path, manifests: str) -> subprocess.CompletedProcess[str]:
    where = f"{schemas}/{{{{ .ResourceKind }}}}.json"
    command = ["kubeconform", "-strict", "-summary", "-schema-location", where, "-"]
    return subprocess.run(command, input=manifests, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_api_takes_what_an_overlay_makes(schemas: Path, overlay: str) -> None:
    done = conform(schemas, built(overlay))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Invalid: 0, Errors: 0, Skipped: 0" in done.stdout


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("restartPolicy: Always", "restartPolicies: Always"),
        ("containerPort: 9464", "containerPort: metrics"),
        ("concurrencyPolicy: Forbid", "concurrencyPolicy: [Forbid]"),
        ("podMetricsEndpoints:", "endpoints:"),
    ],
)
def test_the_schemas_find_what_is_wrong(schemas: Path, right: str, wrong: str) -> None:
    made = built("deployment")
    assert right in made
    assert conform(schemas, made.replace(right, wrong)).returncode != 0


def test_the_operator_gets_the_same_alerts() -> None:
    rules = (ROOT / "deploy/prometheus/ollama-watch.rules.yml").read_text()
    copied = (FOLDER / "base/rules.yaml").read_text()
    groups = yaml.safe_load(rules)["groups"]
    assert yaml.safe_load(copied)["spec"]["groups"] == groups, "see CONTRIBUTING.md"


def test_the_chart_gets_the_same_containers() -> None:
    """It can't share a process namespace, so that of the node takes its place."""
    values = yaml.safe_load((FOLDER / "overlays/helm/values.yaml").read_text())
    _, made = workload("deployment")
    assert values.pop("initContainers") == [made["prepare"], made["ollama-watch"]]
    assert values == {"persistentVolume": {"enabled": True}, "hostPID": True}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_of_ours_has_more_rights_than_it_needs(overlay: str) -> None:
    found = objects(overlay).values()
    every = [each for thing in found for each in containers(thing)]
    ours = [each for each in every if each["image"].startswith("ollama-watch:")]
    assert ours
    for each in ours:
        rights = each["securityContext"]
        assert rights["allowPrivilegeEscalation"] is False
        assert rights["readOnlyRootFilesystem"] is True
        assert rights["capabilities"]["drop"] == ["ALL"]
        assert set(rights["capabilities"].get("add", ())) <= {"SYS_PTRACE", "DAC_READ_SEARCH"}
        if overlay == "statefulset":
            assert rights["runAsNonRoot"] is True
            assert "add" not in rights["capabilities"]


def containers(thing: Object) -> Iterator[Object]:
    spec = thing.get("spec", {})
    spec = spec.get("jobTemplate", thing).get("spec", {})
    pod = spec.get("template", {}).get("spec", {})
    yield from (*pod.get("initContainers", ()), *pod.get("containers", ()))


# ---------------------------------------------------------------- what runs in them

#: What a container runtime leaves to root by default; the server runs with it.
USUAL = (
    *("chown", "dac_override", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap"),
    *("net_bind_service", "net_raw", "sys_chroot", "mknod", "audit_write", "setfcap"),
)
#: Of the machine what an image would have, read-only; then the volume, and the rest of a root.
_ROOT = """
set -e
root=$1 volume=$2; shift 2
mount -t tmpfs tmpfs "$root"
while [ "$1" != -- ]; do
    if [ -L "$1" ]; then
        cp -P "$1" "$root$1"
    elif [ -e "$1" ]; then
        mkdir -p "$root$1"; mount --bind "$1" "$root$1"; mount -o remount,bind,ro "$root$1"
    fi
    shift
done
shift
mkdir -p "$root/proc" "$root/dev" "$root/ollama" "$root/opt/ollama-watch/bin"
printf '#!/bin/sh\nexec %s -m watcher "$@"\n' "$PYTHON" >"$root/opt/ollama-watch/bin/ollama-watch"
chmod 755 "$root/opt/ollama-watch/bin/ollama-watch"
touch "$root/dev/null" "$root/dev/urandom"
mount --bind /dev/null "$root/dev/null"; mount --bind /dev/urandom "$root/dev/urandom"
mount --bind /proc "$root/proc"; mount --bind "$volume" "$root/ollama"
mount -o remount,ro "$root"
exec chroot "$root" "$@"
"""
_BINARY = os.path.dirname(os.environ.get("OLLAMA_BIN", "/bin/ollama"))
_IMAGE = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc")


class Pod(NamedTuple):
    """Processes that share a namespace, as with `shareProcessNamespace`, and a volume."""

    folder: Path
    volume: Path
    init: int

    def start(
        self, container: Object, pod: Object, log: IO[bytes] | int = subprocess.PIPE
    ) -> subprocess.Popen[bytes]:
        """Start a container as a runtime would, with nothing but what the manifest gives it."""
        root = self.folder / f"root-{container['name']}"
        root.mkdir(exist_ok=True)
        roots = (*_IMAGE, sys.base_prefix, sys.prefix, str(ROOT / "watcher"), _BINARY)
        binds = [each for each in dict.fromkeys(roots) if not each.startswith("/usr/")]
        env = {"PATH": "/opt/ollama-watch/bin:/usr/local/bin:/usr/bin:/bin", "HOME": "/"}
        env |= {each["name"]: each["value"] for each in container.get("env", ())}
        env |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)}
        enter = ["nsenter", f"--target={self.init}", "--pid", "--mount", "--", "unshare", "--mount"]
        words = [*enter, "sh", "-c", _ROOT, "sh", str(root), str(self.volume), *binds, "--"]
        words += [*rights(container, pod), "env", "-i", *(f"{k}={v}" for k, v in env.items())]
        words += [*container.get("command", ["ollama-watch"]), *container.get("args", ())]
        own = {"PYTHON": sys.executable, "PATH": os.environ["PATH"]}
        return subprocess.Popen(
            words, env=own, cwd="/", stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def run(self, container: Object, pod: Object) -> str:
        """Run a container to its end, which must be a good one; what it has printed."""
        process = self.start(container, pod)
        told = process.communicate(timeout=120)[0].decode()
        assert process.returncode == 0, told
        assert "Traceback" not in told, told
        return told


def rights(container: Object, pod: Object) -> list[str]:
    """`setpriv` with a container's security context, where that is silent the pod's."""
    context = {**pod.get("securityContext", {}), **container.get("securityContext", {})}
    user, group = context.get("runAsUser", 0), context.get("runAsGroup", 0)
    given = context.get("capabilities", {})
    powers = {} if given.get("drop") == ["ALL"] else dict.fromkeys(USUAL)
    powers |= dict.fromkeys(each.lower() for each in given.get("add", ()))
    bounding = ",".join(["-all", *(f"+{each}" for each in powers)])
    words = ["setpriv", f"--reuid={user}", f"--regid={group}", f"--bounding-set={bounding}"]
    words += ["--inh-caps=-all"]
    words += [f"--groups={context['fsGroup']}" if "fsGroup" in context else "--clear-groups"]
    return [*words, *(["--no-new-privs"] if "allowPrivilegeEscalation" in context else [])]


@contextlib.contextmanager
def pod_of(folder: Path, volume: Path) -> Iterator[Pod]:
    folder.mkdir()
    words = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*words, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to make namespaces")
    pause = subprocess.Popen([*words, "sh", "-c", "echo; exec sleep 600"], stdout=subprocess.PIPE)
    try:
        assert pause.stdout is not None
        pause.stdout.readline()
        children = Path(f"/proc/{pause.pid}/task/{pause.pid}/children").read_text().split()
        yield Pod(folder, volume, int(children[0]))
    finally:
        pause.kill()
        pause.communicate()


@contextlib.contextmanager
def running(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def given_to(user: int, volume: Path) -> None:
    for each in (volume, *volume.rglob("*")):
        os.chown(each, user, user, follow_symlinks=False)


def workload(overlay: str) -> tuple[Object, dict[str, Object]]:
    """The server's pod of an overlay, and its containers by name."""
    kinds = {"deployment": "Deployment/ollama", "statefulset": "StatefulSet/ollama"}
    pod = objects(overlay)[kinds[overlay]]["spec"]["template"]["spec"]
    return pod, {each["name"]: each for each in (*pod["initContainers"], *pod["containers"])}


@needs_root
@pytest.mark.parametrize("overlay", ["deployment", "statefulset"])
def test_the_containers_do_their_work_with_the_rights_that_they_have(
    tmp_path: Path, overlay: str
) -> None:
    pod, made = workload(overlay)
    assert pod["shareProcessNamespace"] is True
    store = HealthyStore(tmp_path / "volume/models")
    behind = store.broken("10:20", aged="2h")
    held = store.download("held", aged=2 * HOUR)
    given_to(pod.get("securityContext", {}).get("runAsUser", 0), store.path.parent)
    daemon, server = made["ollama-watch"], made["ollama"]
    port = daemon_port(daemon)
    path = f"/ollama/models/blobs/{store.partial(held).name}"
    server |= {"command": ["sh", "-c", f"exec sleep 600 3<>{path}"], "env": []}
    with pod_of(tmp_path / "pod", store.path.parent) as inside:
        inside.run(made["prepare"], pod)
        assert store.shown(behind) == "10:11 9:9 0:0", "19 MB recorded instead of 10"
        with (
            running(inside.start(server, pod)) as holder,
            running(inside.start(daemon, pod)) as process,
        ):
            wait_until(lambda: metric(port, process, 'downloads{condition="live"'), "a look")
            assert metric(port, process, 'downloads{condition="live"') == 1, "open in the server"
            assert metric(port, process, 'sight{sight="full"') == 1
            assert metric(port, process, 'downloads{condition="paused"') == 1
            os.killpg(holder.pid, signal.SIGKILL)
            wait_until(
                lambda: metric(port, process, 'downloads{condition="paused"') == 2, "its end"
            )
            os.killpg(process.pid, signal.SIGTERM)
            told, _ = process.communicate(timeout=120)
    assert b"Traceback" not in told


def daemon_port(daemon: Object) -> int:
    """Let a daemon listen at a port that is free here."""
    port = free_port()
    for each in daemon["env"]:
        each["value"] = each["value"].replace(":9464", f":{port}")
    return port


def metric(port: int, process: subprocess.Popen[bytes], name: str) -> float | None:
    """The value of a daemon's sample, from its name on; None before there is one."""
    assert process.poll() is None, process.communicate()[0]
    with contextlib.suppress(OSError):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=120) as answer:
            lines = answer.read().decode().splitlines()
        found = [each for each in lines if each.startswith(f"ollama_watch_{name}")]
        return float(found[0].rpartition(" ")[2]) if found else None
    return None


class PodServer(Server):
    """A server in a pod: the one that OLLAMA_BIN names, else the demo's."""

    def __init__(self, pod: Pod, container: Object, spec: Object) -> None:
        super().__init__(pod.volume / "models")
        self._pod, self._container, self._spec = pod, container, spec

    def command(self) -> list[str]:
        engine = [sys.executable, "-m", "watcher.demo.engine"]
        return [*([os.environ["OLLAMA_BIN"]] if "OLLAMA_BIN" in os.environ else engine), "serve"]

    def _begin(self, env: dict[str, str], _: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
        own = {"OLLAMA_MODELS": "/ollama/models", "HOME": "/ollama"}
        kept = {"OLLAMA_HOST": env["OLLAMA_HOST"], "OLLAMA_NO_CLOUD": "1", **own}
        variables = [{"name": name, "value": value} for name, value in kept.items()]
        made = {**self._container, "command": self.command(), "env": variables}
        return self._pod.start(made, self._spec, log)


@needs_root
@pytest.mark.slow("the rights are those of the test above; here a server runs with them")
@pytest.mark.parametrize("overlay", ["deployment", "statefulset"])
def test_a_server_that_is_killed_in_its_pod_continues_where_it_was(
    tmp_path: Path, registry: Registry, overlay: str
) -> None:
    spec, made = workload(overlay)
    volume = tmp_path / "volume"
    volume.mkdir()
    given_to(spec.get("securityContext", {}).get("runAsUser", 0), volume)
    model = registry.add_model("demo", "1b", [Layer(SIZE)], extras=False)
    digest = model.digests[0]
    registry.hold(digest, after=HELD)
    port = daemon_port(made["ollama-watch"])
    with (
        pod_of(tmp_path / "pod", volume) as inside,
        PodServer(inside, made["ollama"], spec) as server,
    ):
        inside.run(made["prepare"], spec)
        with running(inside.start(made["ollama-watch"], spec)) as process:
            server.start().wait_ready()
            pull = server.start_pull(model.name)
            registry.wait_held(digest, 1)
            wait_written(blob(server.store, digest, "-partial"), [HELD])
            live = 'downloads{condition="live"'
            wait_until(lambda: metric(port, process, live) == 1, "the download to be in use")
            os.killpg(server.pid, signal.SIGKILL)
            wait_until(lambda: metric(port, process, "repairs_total") == 1, "the repair")
            pull.close()
            registry.release()
            registry.reset_stats()
            server.stop()
            inside.run(made["prepare"], spec)
            server.start().wait_ready()
            assert collapsed(server.pull(model.name))[-1] == "success"
    assert registry.bytes_served(digest) <= SIZE - HELD + MIB
    assert is_right(volume / "models", digest)


@needs_root
def test_the_job_removes_what_is_stale_and_nothing_else(tmp_path: Path) -> None:
    job = objects("statefulset")["CronJob/ollama-watch-clean"]["spec"]["jobTemplate"]["spec"]
    pod = job["template"]["spec"]
    (clean,) = pod["containers"]
    store = HealthyStore(tmp_path / "volume/models")
    stale, young = store.download("stale"), store.download("young", aged=DAY)
    orphan = store.text_blob("an orphan")
    given_to(clean["securityContext"]["runAsUser"], store.path.parent)
    with pod_of(tmp_path / "pod", store.path.parent) as inside:
        told = inside.run(clean, pod)
    assert store.partials(stale) == []
    assert len(store.partials(young)) == 4
    assert (store.blobs / f"sha256-{orphan}").exists(), "somebody unseen may need it"
    assert "orphan" in told


@needs_root
@pytest.mark.parametrize(
    "overlay",
    [
        "statefulset",
        pytest.param("deployment", marks=pytest.mark.slow("the same commands, with more rights")),
    ],
)
def test_a_volume_that_is_empty_holds_up_nobody(tmp_path: Path, overlay: str) -> None:
    pod, made = workload(overlay)
    volume = tmp_path / "volume"
    volume.mkdir()
    given_to(pod.get("securityContext", {}).get("runAsUser", 0), volume)
    with pod_of(tmp_path / "pod", volume) as inside:
        inside.run(made["prepare"], pod)
        port = daemon_port(made["ollama-watch"])
        with running(inside.start(made["ollama-watch"], pod)) as process:
            wait_until(lambda: metric(port, process, "build_info"), "an answer")
