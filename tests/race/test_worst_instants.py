"""An act is stopped before each call that changes a name, and Ollama goes to work just then.

A server starts there, and pulls that very layer, or uploads it and creates a model of it, or
removes the model that names it. Then the act goes on. At worst one thing fails once; nothing that
was brought meanwhile is gone, and the next pull is right.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import SERVERS
from tests.repair.scenes import seed_of
from tests.support import transfers
from tests.support.breaking import break_files
from tests.support.driving import OLD, is_right, lay_out, private_proc
from tests.support.notation import age
from tests.support.runs import one_run, rules
from tests.support.servers import EngineServer, Server, blob, collapsed, sidecar, tree
from watcher.demo.registry import Layer, Model, Registry
from watcher.model import MIB, Rules
from watcher.observe.host import Host

SIZE = 6 * MIB
CHANGES_NAMES = ("link ", "rename ", "renameat2 ", "unlink ", "open decided")
POLICY = rules(clean=True, repair=True, give_back=True, writers_visible=True)
TAKING = rules(clean=False, repair=False, take_over=True, writers_visible=True)


@dataclass
class Scene:
    """A store that an act will change, a registry that has all of it, and a server, not started."""

    registry: Registry
    model: Model
    server: Server
    policy: Rules = POLICY

    @property
    def digest(self) -> str:
        """The model's large layer, which the act is about."""
        return self.model.digests[0]

    @property
    def store(self) -> Path:
        """The models folder."""
        return self.server.store

    @property
    def proc(self) -> Path:
        """What the act sees of the machine's processes."""
        return self.store.with_name("proc")

    def start(self) -> None:
        """Start the server, where the act can see it."""
        self.server.start().wait_ready()
        private_proc(self.proc, self.server.pid)

    def host(self) -> Host:
        """The world of an act that does not wait."""
        proc = private_proc(self.proc)
        return Host(str(self.store), proc=proc, sleep=lambda _: None)

    def name(self) -> Path:
        """Name the layer by a manifest, as after a blob got lost; its path."""
        name = self.model.name.removeprefix("http://").replace(":1b", "/1b")
        path = self.store / "manifests" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(self.model.manifest)
        return path


# ---------------------------------------------------------------- acts


def _behind(scene: Scene) -> None:
    """To be repaired."""
    lay_out(scene.registry, scene.store, scene.digest, aged=600)
    for number in range(2):
        path = blob(scene.store, scene.digest, f"-partial-{number}")
        path.write_text(sidecar(number, number * SIZE // 2, SIZE // 2, 0))
        age(path, 600)


def _stale(scene: Scene) -> None:
    """To be removed."""
    lay_out(scene.registry, scene.store, scene.digest, aged=OLD)


def _orphan(scene: Scene) -> None:
    """To be removed: whole and right, and named by nothing; another model is healthy."""
    (scene.store / "blobs").mkdir(parents=True)
    path = blob(scene.store, scene.digest)
    path.write_bytes(scene.registry.content(scene.digest).read(0, SIZE))
    age(path, OLD)
    manifest = scene.store / "manifests/registry.ollama.ai/library/other/latest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"config": None, "layers": None}))


def _of_ours(scene: Scene) -> None:
    """To be given back."""
    (scene.store / "blobs").mkdir(parents=True)
    content = scene.registry.content(scene.digest).read(0, SIZE)
    digest = scene.digest.removeprefix("sha256:")
    transfers.lay_out(scene.store, digest, content, ((0, SIZE // 2),), aged=600)


def _left(scene: Scene) -> None:
    """To be taken over."""
    _behind(scene)
    scene.policy = TAKING


ACTS = {
    "repair": _behind,
    "removal": _stale,
    "orphan": _orphan,
    "giving back": _of_ours,
    "taking over": _left,
}


# ---------------------------------------------------------------- what Ollama does meanwhile


def _start(scene: Scene) -> None:
    """Nothing but the start."""


def _pull(scene: Scene) -> None:
    told = collapsed(scene.server.pull(scene.model.name))
    assert told[-1] == "success" or told[-1].startswith("error: "), told
    if told[-1] == "success":
        assert is_right(scene.store, scene.digest)


def _create(scene: Scene) -> None:
    """As the client does it: a blob that the server says it has is not uploaded."""
    path = f"/api/blobs/{scene.digest}"
    if scene.server.request("HEAD", path)[0] == 404:
        content = scene.registry.content(scene.digest).read(0, SIZE)
        assert scene.server.request("POST", path, content)[0] == 201
    body = {"model": "mine", "files": {"a.gguf": scene.digest}}
    _, told = scene.server.request("POST", "/api/create", body)
    if isinstance(scene.server, EngineServer):
        assert json.loads(told.splitlines()[-1]) == {"status": "success"}


def _remove(scene: Scene) -> None:
    name = scene.model.name.removeprefix("http://")
    status, _ = scene.server.request("DELETE", "/api/delete", {"model": name})
    assert status in (200, 404)


MEANWHILE: dict[str, Callable[[Scene], None]] = {
    "start": _start,
    "pull": _pull,
    "create": _create,
    "rm": _remove,
}


# ---------------------------------------------------------------- stopping


def act(scene: Scene, at: int, told: int) -> int:
    """A cycle in a child, which stops before its call number `at`; the child's pid."""
    host = scene.host()
    pid = os.fork()
    if pid == 0:
        code = 70
        with contextlib.suppress(BaseException):
            break_files({"at": at, "how": "stop"}, told)
            report = one_run(host, scene.policy)
            code = 0 if all(each.result in ("done", "refused") for each in report.outcomes) else 4
        os._exit(code)
    return pid


def instants(scene: Scene) -> Iterator[int]:
    """The numbers of the calls of an act that change names of the store, or decide that they do."""
    reader, writer = os.pipe()
    pid = act(scene, 0, writer)
    os.close(writer)
    with os.fdopen(reader) as calls:
        made = calls.read().splitlines()[1:]
    assert os.waitpid(pid, 0)[1] == 0
    for number, call in enumerate(made, 1):
        # Which names such a rename has is not told.
        names = "sha256-" in call or "guard" in call or "decided" in call or call == "renameat2 "
        if call.startswith(CHANGES_NAMES) and names:
            yield number


@contextlib.contextmanager
def stopped(scene: Scene, at: int) -> Iterator[None]:
    """The act, stopped before its call number `at`; at the end it goes on and comes to its end."""
    with open(os.devnull, "wb") as nowhere:
        pid = act(scene, at, nowhere.fileno())
    _, status = os.waitpid(pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), f"it came to its end before call {at}"
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, f"after call {at}"


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    return in_memory


@pytest.fixture(params=SERVERS)
def kind(request: pytest.FixtureRequest) -> type[Server]:
    """Which server."""
    chosen: type[Server] = request.param
    return chosen


STARTS = pytest.mark.slow("whatever else a server does, it starts then")
UPLOADS = pytest.mark.slow(
    "an upload beside a download that is changed: beside one that is removed"
)
CASES = [
    pytest.param(
        acts,
        meanwhile,
        marks={
            "start": (STARTS,),
            "create": (UPLOADS,) if acts in ("repair", "taking over") else (),
        }.get(meanwhile, ()),
    )
    for acts in ACTS
    for meanwhile in MEANWHILE
]


@pytest.mark.parametrize(("acts", "meanwhile"), CASES)
def test_whatever_a_server_does_between_two_calls_at_most_one_thing_fails(
    acts: str, meanwhile: str, kind: type[Server], tmp_path: Path
) -> None:
    with Registry() as registry:
        layer = Layer(SIZE, seed=seed_of(tmp_path))
        model = registry.add_model("demo", "1b", [layer], extras=False)

        def laid_out(number: int) -> Scene:
            made = Scene(registry, model, kind(tmp_path / str(number) / "models"))
            ACTS[acts](made)
            if meanwhile == "rm" and acts != "orphan":
                made.name()
            return made

        numbers = list(instants(laid_out(0)))
        assert numbers, "nothing was done"
        for number in numbers:
            scene = laid_out(number)
            with scene.server:
                with stopped(scene, number):
                    scene.start()
                    MEANWHILE[meanwhile](scene)
                    brought = finished(scene)
                _is_well(scene, brought, f"{acts}, {meanwhile} at call {number}")
                if meanwhile != "create":  # an upload leaves the download beside it
                    assert [name for name in tree(scene.store) if "-partial" in name] == [], number
            shutil.rmtree(scene.store.parent)


def finished(scene: Scene) -> set[str]:
    """The blobs that are whole, right, and named by a manifest."""
    named: set[str] = set()
    for path in scene.store.glob("manifests/*/*/*/*"):
        manifest = json.loads(path.read_bytes())
        layers = (manifest["config"], *(manifest["layers"] or ()))
        named.update(layer["digest"] for layer in layers if layer)
    return {digest for digest in named if is_right(scene.store, digest)}


def _is_well(scene: Scene, brought: set[str], where: str) -> None:
    """What was brought meanwhile is there; a pull is right; nothing of the act is left."""
    assert brought <= finished(scene), where
    told = collapsed(scene.server.pull(scene.model.name))
    assert told[-1] == "success", f"{where}: {told}"
    assert is_right(scene.store, scene.digest), where
    assert finished(scene) >= {scene.digest, scene.model.config}, where
    assert list(scene.store.glob(".ollama-watch/intents/*")) == [], where
    assert all(path.stat().st_size for path in scene.store.glob("blobs/*-partial-*")), where
