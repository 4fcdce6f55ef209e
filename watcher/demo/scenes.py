"""The demo's story: a pull, a kill, what the daemon reports, what an audit draws, what goes.

Everything is real: a registry and a server as processes on loopback, a store on the disk, and the
commands as a user runs them. Nothing outside a temporary folder is touched, and nothing is left.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_WAIT = 20.0
_MODEL_BYTES = 262_144_000
_OLD_BYTES = 120_000_000
_RATE = 70_000_000
#: A network that resets each connection after so many bytes; and a server that waits a fortieth of
#: what the real one does between its tries, since nobody wants to watch it for a minute.
_TRAIN_BYTES, _TRAIN_RATE, _RESET_AFTER = 45_000_000, 60_000_000, 20_000_000
_RETRY_SECONDS = "0.025"
_DAY = 86400.0
#: Done, or findings remain.
_GOOD_ENDS = (0, 1)
#: How a command on the demo's store begins. The audience reads what they would type for theirs.
_PRINTED = r"(-> |Run: ).*--store {}(?= )"
_COLORS = re.compile(r"\x1b\[[0-9;]*m")
#: The columns of a comparison, and of its bars.
_NAMES, _COLUMN, _BAR = 20, 32, 26


class DemoError(Exception):
    """A scene did not come to what it shows; the text says which."""


class Stage:
    """A folder, a registry and a server, and the words that go to the audience."""

    def __init__(self, folder: Path, say: Callable[[str], None], color: bool) -> None:
        self.folder, self.store = folder, folder / "models"
        self._say, self._color = say, color
        self.running = contextlib.ExitStack()
        self.registry_url = self.server_url = ""
        self.server: subprocess.Popen[str] | None = None
        self._started = 0

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.running.close()

    # ------------------------------------------------------------ words

    def title(self, text: str) -> None:
        """The heading of a scene."""
        line = f"\n== {text}"
        self._say(f"\033[1m{line}\033[0m" if self._color else line)

    def say(self, text: str) -> None:
        """A line to the audience."""
        self._say(text)

    def run(self, *words: str, shown: tuple[str, ...] = (), store: Path | None = None) -> str:
        """Run a command of ollama-watch on a store and show it with what it prints; gives that."""
        self._say(f"$ ollama-watch {' '.join(shown or words)}")
        done = subprocess.run(
            [*_us(), "--store", str(store or self.store), *words],
            capture_output=True,
            text=True,
            timeout=_WAIT,
            check=False,
            env=self._environment(),
        )
        if done.returncode not in _GOOD_ENDS:
            raise DemoError(f"ollama-watch {words[0]} ended with {done.returncode}: {done.stderr}")
        told = self.as_typed((done.stdout + done.stderr).rstrip())
        self._say(told if self._color else plain(told))
        return told

    def as_typed(self, told: str) -> str:
        """What was printed as it would be for a store and a registry in their usual places."""
        told = re.sub(_PRINTED.format(re.escape(str(self.store))), r"\1ollama-watch", told)
        told = told.replace(str(self.store), "~/.ollama/models")
        return told.replace(self.model("")[7:-3], "")

    def name_layers(self, name: str) -> None:
        """Have ollama-watch ask the registry which layers a model has."""
        subprocess.run(
            [*_us(), "--store", str(self.store), "repair", "--yes", self.model(name)],
            capture_output=True,
            timeout=_WAIT,
            check=False,
            env=self._environment(),
        )

    # ------------------------------------------------------------ the store

    def model(self, name: str) -> str:
        """A model of the demo's registry, as it is pulled."""
        return f"{self.registry_url.rstrip('/')}/library/{name}:7b"

    def partials_of(self, name: str) -> Iterator[Path]:
        """The files of a model's unfinished download, told by its data's length."""
        size = {"old": _OLD_BYTES, "big": _MODEL_BYTES}[name]
        for path in self.store.glob("blobs/*-partial"):
            if path.stat().st_size == size:
                yield path

    # ------------------------------------------------------------ processes

    def start_server(
        self, store: Path, running: contextlib.ExitStack, **more: str
    ) -> tuple[subprocess.Popen[str], str]:
        """Start a server on a store; it is ready when its URL is given back."""
        server, line = self.start(
            "watcher.demo.engine",
            "serve",
            until="Listening on",
            running=running,
            OLLAMA_MODELS=str(store),
            OLLAMA_HOST="127.0.0.1:0",
            **more,
        )
        address = line.split("Listening on ")[1].split()[0]
        return server, f"http://{address}"

    def served(self, digest: str = "") -> int:
        """Bytes sent of a blob (else: of the most fetched) since the counters were reset."""
        stats = _order(self.registry_url, {})
        served = stats["bytes"]
        assert isinstance(served, dict)
        return int(served.get(digest, 0) if digest else max(served.values(), default=0))

    def is_open(self, path: Path) -> bool:
        """Whether the server has a file open."""
        assert self.server is not None
        for link in Path(f"/proc/{self.server.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if link.readlink() == path:
                    return True
        return False

    def start(
        self,
        *command: str,
        until: str,
        running: contextlib.ExitStack | None = None,
        **more: str,
    ) -> tuple[subprocess.Popen[str], str]:
        """Start a process that ends with the demo; wait for its line with `until` in it."""
        self._started += 1
        log = self.folder / f"process{self._started}.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                env={**self._environment(), **more},
            )
        (running or self.running).callback(_end, process)
        wait_for(lambda: until in log.read_text() or process.poll() is not None, command[0])
        for line in log.read_text().splitlines():
            if until in line:
                return process, line
        raise DemoError(f"{command[0]} ended with {process.wait()}: {log.read_text()}")

    def start_daemon(self) -> tuple[subprocess.Popen[str], Path]:
        """Start our own daemon; what it prints goes to the file that is given back."""
        told = self.folder / "daemon.log"
        with told.open("w") as out:
            process = subprocess.Popen(
                [*_us(), "--store", str(self.store), "daemon"],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                # It only tells here: the repair has a scene of its own.
                env={**self._environment(), "OLLAMA_WATCH_REPAIR": "false"},
            )
        self.running.callback(_end, process)
        begun = "check_started"
        wait_for(lambda: begun in told.read_text() or process.poll() is not None, "the daemon")
        if begun not in told.read_text():
            raise DemoError(f"the daemon ended with {process.wait()}: {told.read_text()}")
        return process, told

    def _environment(self) -> dict[str, str]:
        kept = {key: os.environ[key] for key in ("PATH", "LANG", "LC_ALL") if key in os.environ}
        # What this Python was given to find its packages in, those need that it starts.
        package = str(Path(__file__).resolve().parents[2])
        packages = filter(None, (package, os.environ.get("PYTHONPATH")))
        return {
            **kept,
            "HOME": str(self.folder),
            "PYTHONPATH": os.pathsep.join(packages),
            "PYTHONUNBUFFERED": "1",
            "COLUMNS": "80",
            "FORCE_COLOR": "1",
            # All that write to this store were started here, even where we run in a container.
            "OLLAMA_WATCH_WRITERS_VISIBLE": "true",
        }


def plain(told: str) -> str:
    """A text without its colors."""
    return _COLORS.sub("", told)


def _us() -> list[str]:
    # Neither the settings of this machine nor servers that somebody else runs on it are the demo's.
    return [sys.executable, "-m", "watcher", "--config", os.devnull, "--staged"]


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Wait until `condition()` is true. Raises DemoError naming `what`."""
    until = time.monotonic() + _WAIT
    while not condition():
        if time.monotonic() > until:
            raise DemoError(f"waited {_WAIT:.0f} s for {what}")
        time.sleep(0.01)


def _pull(url: str, model: str, stop_at: int | None) -> tuple[contextlib.ExitStack, int]:
    """Pull until so many bytes are told, or to success; the open request, and the bytes told."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=_WAIT)
    with contextlib.ExitStack() as opened:
        opened.callback(connection.close)
        connection.request("POST", "/api/pull", json.dumps({"model": model, "insecure": True}))
        answer = opened.enter_context(connection.getresponse())
        told = 0
        for raw in answer:
            line = json.loads(raw)
            if "error" in line:
                raise DemoError(f"the pull of {model} failed: {line['error']}")
            told = max(told, line.get("completed", 0))
            if told >= stop_at if stop_at is not None else line["status"] == "success":
                return opened.pop_all(), told
    raise DemoError(f"the pull of {model} ended too early, after {told} bytes")


def _order(url: str, order: dict[str, object]) -> dict[str, object]:
    """Give the registry an order."""
    address = url.removeprefix("http://").rstrip("/")
    connection = http.client.HTTPConnection(address, timeout=_WAIT)
    with contextlib.closing(connection):
        connection.request("POST", "/_control", json.dumps(order))
        answer = json.loads(connection.getresponse().read())
    return dict(answer)


@contextlib.contextmanager
def staged(say: Callable[[str], None], *, color: bool, keep: bool) -> Iterator[Stage]:
    """A stage in a temporary folder, which is removed at the end unless `keep`."""
    folder = Path(tempfile.mkdtemp(prefix="ollama-watch-demo-"))
    try:
        with Stage(folder, say, color) as stage:
            yield stage
    finally:
        if keep:
            say(f"\nkept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def play(say: Callable[[str], None], *, color: bool, keep: bool) -> dict[str, str]:
    """The whole story, in under half a minute. Raises DemoError where a scene goes wrong.

    Gives back the texts of its pictures by their names.
    """
    with staged(say, color=color, keep=keep) as stage:
        _an_old_download(stage)
        daemon, told = stage.start_daemon()
        _a_pull_that_dies(stage, told)
        stage.title("What an audit shows")
        audit = stage.run("audit")
        _what_cleaning_frees(stage)
        repaired = _alone_and_repaired(stage)
        daemon.terminate()
        daemon.wait(_WAIT)
        return {"audit": audit, "repair": repaired, "pull": _a_bad_network_twice(stage)}


def _an_old_download(stage: Stage) -> None:
    stage.title("A store with an old, forgotten download in it")
    _, line = stage.start("watcher.demo.registry", until="http://")
    stage.registry_url = line.strip()
    for name, size in (("old", _OLD_BYTES), ("big", _MODEL_BYTES)):
        layers = [{"size": size}]
        _order(stage.registry_url, {"model": {"name": name, "tag": "7b", "layers": layers}})
    _order(stage.registry_url, {"throttle": _RATE})
    stage.server, stage.server_url = stage.start_server(stage.store, stage.running)
    connection, _ = _pull(stage.server_url, stage.model("old"), _OLD_BYTES // 2)
    connection.close()
    partial = next(stage.store.glob("blobs/*-partial"))
    wait_for(lambda: not stage.is_open(partial), "the server to end the canceled pull")
    stage.name_layers("old")
    past = time.time() - 12 * _DAY
    for path in stage.store.glob("blobs/*-partial*"):
        os.utime(path, (past, past))
    stage.say("A pull was canceled half way, twelve days ago (its files' times are set back).")


def _a_pull_that_dies(stage: Stage, told: Path) -> None:
    stage.title("A daemon watches; a model is pulled, and its server is killed in the middle")
    stage.name_layers("big")
    connection, done = _pull(stage.server_url, stage.model("big"), _MODEL_BYTES * 6 // 10)
    stage.say(f"ollama pull big:7b: {_mb(done)} of {_mb(_MODEL_BYTES)} ... kill -9")
    killed = time.monotonic()
    assert stage.server is not None
    _end(stage.server)
    wait_for(lambda: "download_interrupted" in told.read_text(), "the daemon to report it")
    stage.say(f"the daemon reported it {time.monotonic() - killed:.2f} s after the kill:")
    connection.close()
    stage.say(stage.as_typed(told.read_text().rstrip()))


def _alone_and_repaired(stage: Stage) -> str:
    here = sum(path.stat().st_blocks * 512 for path in stage.partials_of("big"))
    stage.title("Ollama alone on a copy of the store, and the same pull after a repair")
    alone = _pull_alone(stage)
    stage.run("repair", "--yes")
    _order(stage.registry_url, {"reset_stats": True})
    with contextlib.ExitStack() as ended:
        _, url = stage.start_server(stage.store, ended)
        connection, _ = _pull(url, stage.model("big"), None)
        connection.close()
    repaired = stage.served()
    missing = _mb(_MODEL_BYTES - here)
    table = _side_by_side(
        (f"big:7b, {_mb(_MODEL_BYTES)}", "Ollama alone", "after ollama-watch repair"),
        ("on disk", _mb(here), _mb(here)),
        ("missing", missing, missing),
        ("downloaded", _mb(alone), _mb(repaired)),
        *_bars(alone, repaired),
    )
    stage.say(table)
    stage.run("audit")
    return table


def _a_bad_network_twice(stage: Stage) -> str:
    stage.title("A network that resets each connection after 20 MB: Ollama alone, and our pull")
    _order(stage.registry_url, {"fault": {"kind": "reset", "after": _RESET_AFTER}})
    digests = [_twin(stage, name) for name in ("alone", "train")]
    _order(stage.registry_url, {"throttle": _TRAIN_RATE, "reset_stats": True})
    store = stage.folder / "with"
    store.mkdir()
    with contextlib.ExitStack() as ended, ThreadPoolExecutor() as beside:
        retry = {"DEMO_RETRY_SECONDS": _RETRY_SECONDS}
        _, theirs = stage.start_server(stage.folder / "without", ended, **retry)
        _, url = stage.start_server(store, ended, **retry)
        end = beside.submit(_end_of_pull, theirs, stage.model("alone"))
        words = ("pull", stage.model("train"), "--insecure", "--host", url)
        told = stage.run(*words, shown=("pull", "train:7b"), store=store)
        alone, ours = map(stage.served, digests)
        table = _side_by_side(
            (f"train:7b, {_mb(_TRAIN_BYTES)}", "Ollama alone", "ollama-watch pull"),
            ("downloaded", _mb(alone), _mb(ours)),
            *_bars(alone, ours),
            ("end", end.result(), "success" if "Download complete" in plain(told) else "failed"),
        )
    stage.say(table)
    return f"$ ollama-watch pull train:7b\n{told}\n\n{table}"


def _twin(stage: Stage, name: str) -> str:
    """Another model of the same size; the digest of its layer."""
    model = {"name": name, "tag": "7b", "layers": [{"size": _TRAIN_BYTES}], "extras": False}
    made = _order(stage.registry_url, {"model": model})["model"]
    assert isinstance(made, dict)
    return str(made["digests"][0])


def _end_of_pull(url: str, model: str) -> str:
    """How a server alone ends a pull, in its own words."""
    try:
        _pull(url, model, None)[0].close()
    except DemoError as error:
        return "max retries exceeded" if "max retries exceeded" in str(error) else "failed"
    return "success"


def _side_by_side(*rows: tuple[str, str, str]) -> str:
    return "\n".join(
        f"{name:<{_NAMES}}{left:<{_COLUMN}}{right}".rstrip() for name, left, right in rows
    )


def _bars(left: int, right: int) -> Iterator[tuple[str, str, str]]:
    """Both amounts drawn, and below them the scale that they share."""
    whole = max(left, right)
    scale = f"0{_mb(whole):>{_BAR - 1}}"
    yield "", "#" * round(_BAR * left / whole), "#" * round(_BAR * right / whole)
    yield "", scale, scale


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _pull_alone(stage: Stage) -> int:
    """The bytes that a server downloads on a copy of the store."""
    copy = stage.folder / "alone"
    subprocess.run(["cp", "-a", "--sparse=auto", str(stage.store), str(copy)], check=True)
    _order(stage.registry_url, {"reset_stats": True, "throttle": None})
    with contextlib.ExitStack() as ended:
        _, url = stage.start_server(copy, ended)
        connection, _ = _pull(url, stage.model("big"), None)
        connection.close()
    return stage.served()


def _what_cleaning_frees(stage: Stage) -> None:
    stage.title("The stale one goes, safely")
    stage.run("clean", "--dry-run")
    stage.run("clean", "--yes")
    wait_for(lambda: not any(stage.partials_of("old")), "the stale download to be gone")
