"""``pull``, ``reset`` and ``queue run`` as a user has them: processes, a terminal, a registry."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.driving import HealthyStore, command, environment, is_right, run
from tests.support.runs import rules
from tests.support.servers import EngineServer, wait_until
from watcher.commands import pulling, queueing
from watcher.commands.context import Context
from watcher.demo.registry import Fault, Layer, Model, Registry

MB = 1_000_000
INTERRUPTED = 130


Pull = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def pull(store: Path, server: EngineServer) -> Pull:
    """Runs ``pull`` to its end."""

    def call(*words: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        done = run(store, *before, "pull", "--insecure", "--host", server.url, *words)
        assert "Traceback" not in done.stderr
        return done

    return call


def model(registry: Registry, name: str = "demo", size: int = 8 * MB) -> Model:
    return registry.add_model(name, "1b", [Layer(size)])


class Terminal:
    """A command on a terminal of 80 columns; `told` is what came of it so far."""

    def __init__(self, store: Path, *words: str, **env: str) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            command(store, *words),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment(store, {"TERM": "xterm", "COLUMNS": "80", "LINES": "30", **env}),
            start_new_session=True,
        )
        os.close(theirs)
        os.set_blocking(self._ours, False)
        self._raw = b""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._ours)

    @property
    def told(self) -> str:
        with contextlib.suppress(OSError):
            while piece := os.read(self._ours, 1 << 16):
                self._raw += piece
        return self._raw.decode()

    def wait_for(self, words: str) -> None:
        wait_until(lambda: words in self.told, words)

    def end(self, seconds: float = 60) -> int:
        """Wait for its end; the exit code."""
        wait_until(
            lambda: self.told is not None and self.process.poll() is not None, "end", seconds
        )
        return self.process.wait()

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())


def percents(told: str) -> list[int]:
    return [int(each) for each in re.findall(r"(\d+) % of", told)]


# ---------------------------------------------------------------- what it looks like


def test_in_a_pipe_a_line_for_each_stage_and_ten_percent(pull: Pull, registry: Registry) -> None:
    registry.throttle(8 * MB)
    done = pull(model(registry).name)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    stages = [line.split("demo:1b: ")[1] for line in lines]
    assert stages[0] == "Waiting for manifest..."
    assert stages[1].startswith("Pulling manifest from Ollama registry... 0 % of 8.0 MB")
    verifying = [each for each in stages if each.startswith("Verifying download integrity...")]
    assert all("100 % of 8.0 MB" in each for each in verifying), "how much is hashed is beside it"
    assert "Writing model manifest... 100 % of 8.0 MB" in stages
    assert stages[-1] == "Download complete 100 % of 8.0 MB"
    assert percents(done.stdout) == sorted(percents(done.stdout))
    assert len(lines) <= 18
    assert "\x1b" not in done.stdout


def test_json_lines(pull: Pull, registry: Registry) -> None:
    done = pull(model(registry).name, "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[-1]["status"] == "completed"
    told = [line["progress_percent"] for line in lines]
    assert (told == sorted(told), told[-1]) == (True, 100.0)
    assert {"status", "progress_percent", "downloaded_bytes", "total_bytes", "stage"} <= set(
        lines[0]
    )


def test_quiet_prints_nothing_that_goes_well(pull: Pull, registry: Registry) -> None:
    done = pull(model(registry).name, before=("-q",))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("color", [True, False])
def test_a_pull_on_a_terminal_shows_stages_and_rising_percentages_in_80_columns(
    store: Path, server: EngineServer, registry: Registry, color: bool
) -> None:
    registry.throttle(8 * MB)
    words = ("pull", "--insecure", "--host", server.url, model(registry).name)
    with Terminal(store, *words, **({} if color else {"NO_COLOR": "1"})) as terminal:
        assert terminal.end() == 0
        told = terminal.told
    assert ("\x1b[36m" in told) is color
    for stage in ("Downloading model layers...", "Download complete"):
        assert stage in told
    assert percents(told) == sorted(percents(told))
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", told)
    assert max(len(line) for line in re.split(r"[\r\n]+", plain)) <= 80
    assert told.count("\x1b[?25h") == told.count("\x1b[?25l") == 1, "the cursor is back"


def test_a_plain_pull_loads_no_module_that_it_does_not_need(tmp_path: Path) -> None:
    heavy = ["concurrent.futures", "rich.console", "rich.live", "urllib.request"]
    heavy += ["watcher.act.transaction", "watcher.pull.queue"]
    script = (
        "import sys, watcher.cli, watcher.commands.pulling\n"
        f"print(*({{*{heavy}}} & {{*sys.modules}}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(tmp_path / "models"), capture_output=True
    )
    assert (done.stdout, done.stderr) == (b"\n", b"")


# ---------------------------------------------------------------- how it ends


def test_an_unchanged_model_is_up_to_date(pull: Pull, registry: Registry) -> None:
    name = model(registry).name
    pull(name)
    before = registry.stats()["requests"]["data"]
    done = pull(name)
    assert done.returncode == 0
    assert "up to date" in done.stdout
    assert registry.stats()["requests"]["data"] == before


def test_an_unknown_model(pull: Pull, registry: Registry) -> None:
    done = pull(f"{registry.url}/library/nothing:1b")
    assert done.returncode == 2
    assert "nothing:1b failed" in done.stderr
    assert "check its spelling" in done.stderr


@pytest.mark.parametrize("name", ["a b", "../x", ""])
def test_pull_of_an_invalid_model_name_is_wrong_usage(pull: Pull, name: str) -> None:
    done = pull(name)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no name of a model" in done.stderr


def test_a_layer_of_two_models_comes_once(pull: Pull, registry: Registry, store: Path) -> None:
    registry.throttle(20 * MB)
    shared = Layer(8 * MB, seed=5)
    one = registry.add_model("one", "1b", [shared, Layer(MB)])
    two = registry.add_model("two", "1b", [shared, Layer(2 * MB)])
    done = pull(one.name, two.name, "--parallel", "2")
    assert done.returncode == 0, done.stderr
    assert registry.bytes_served(one.digests[0]) <= 8 * MB + 2, "a byte finds out the address"
    assert all(is_right(store, digest) for digest in (*one.digests, *two.digests))


def test_a_failed_pull_prints_the_command_that_helps_on_this_store(
    pull: Pull, store: Path, registry: Registry
) -> None:
    wanted = model(registry)
    assert pull(wanted.name).returncode == 0
    damaged = store / f"blobs/sha256-{wanted.digests[0].removeprefix('sha256:')}"
    with damaged.open("r+b") as file:
        file.write(b"wrong bytes")
    registry.add_fault(Fault("page", on="head", status=404))
    done = pull("--verify", wanted.name)
    assert done.returncode == 4, done.stderr
    (helps,) = re.findall("-> (.*)", done.stderr)
    assert f" --store {store} " in helps
    pasted = subprocess.run(
        ["sh", "-c", f"{helps} -n"], cwd="/", capture_output=True, text=True, env=environment(store)
    )
    assert damaged.name[:19] in pasted.stdout


def test_ctrl_c_leaves_it_resumable_and_says_how(
    store: Path, server: EngineServer, registry: Registry, pull: Pull
) -> None:
    wanted = model(registry, size=24 * MB)
    registry.throttle(8 * MB)
    words = ("pull", "--insecure", "--host", server.url, wanted.name)
    with Terminal(store, *words) as terminal:
        wait_until(lambda: max(percents(terminal.told), default=0) >= 30, "30 %")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.end() == INTERRUPTED
        again = f" --store {store} pull --insecure --host {server.url} "
        assert f"{again}{wanted.name.removeprefix('http://')}" in terminal.told.replace("\r\n", "")
        assert "Traceback" not in terminal.told
        assert terminal.told.rstrip().count("\x1b[?25h") == 1
    details = ended(store)
    assert details["cause"] == "interrupted"
    assert 7 * MB <= details["arrived_bytes"] <= 24 * MB
    before = registry.bytes_served(wanted.digests[0])
    registry.throttle(None)
    done = pull(wanted.name)
    assert done.returncode == 0
    first, *others = done.stdout.splitlines()
    assert re.fullmatch(r".*demo:1b: resuming: \d+\.\d of 24\.0 MB on disk", first)
    assert not [line for line in others if "resuming" in line], "once"
    assert registry.bytes_served(wanted.digests[0]) - before <= 20 * MB
    assert is_right(store, wanted.digests[0])


def test_a_second_ctrl_c_ends_at_once(
    store: Path, server: EngineServer, registry: Registry
) -> None:
    wanted = model(registry)
    registry.hold(wanted.digests[0], after=0)
    words = ("pull", "--insecure", "--host", server.url, wanted.name)
    with Terminal(store, *words) as terminal:
        terminal.wait_for("Downloading model layers")
        terminal.process.send_signal(signal.SIGINT)
        time.sleep(0.01)  # two signals that come together are one to the kernel
        terminal.process.send_signal(signal.SIGINT)
        # Once Python ends, the second one ends it as the kernel does: 130 to a shell, too.
        assert terminal.end() in (INTERRUPTED, -signal.SIGINT)


def test_a_server_that_is_down_is_reported_and_waited_for(
    store: Path, server: EngineServer, registry: Registry
) -> None:
    """One that has another store than the one here: that is not ours to fill."""
    wanted = model(registry)
    words = ("pull", "--insecure", "--host", "http://127.0.0.1:9", wanted.name)
    with Terminal(store, *words) as terminal:
        terminal.wait_for("refused")
        assert terminal.process.poll() is None, "it waits"
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.end() == INTERRUPTED


def test_a_store_that_is_named_gets_the_model_whatever_store_the_server_has(
    store: Path, server: EngineServer, registry: Registry, tmp_path: Path
) -> None:
    """The server is not asked: it would download into its own store."""
    wanted, named = model(registry), tmp_path / "named"
    (named / "blobs").mkdir(parents=True)
    done = subprocess.run(
        command(named, "pull", "--insecure", wanted.name),
        env=environment(named, {"OLLAMA_HOST": server.url}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "the server" not in done.stdout
    assert is_right(named, wanted.digests[0])
    assert [each for each in (named / "manifests").rglob("*") if each.is_file()]
    assert not list((store / "blobs").glob("*"))


def test_another_machine_s_server_has_no_store_here(store: Path) -> None:
    with Terminal(store, "pull", "--host", "http://192.0.2.1:11434", "x") as terminal:
        terminal.wait_for("the server is on another machine (192.0.2.1)")


def test_a_store_that_this_user_can_t_change(
    registry: Registry,
    store: Path,
    server: EngineServer,
    as_nobody: Callable[[Sequence[str]], list[str]],
) -> None:
    (store / "blobs").mkdir(exist_ok=True)
    wanted = model(registry)
    words = ["-m", "watcher", "--store", str(store), "pull", "--insecure", "--host", server.url]
    done = subprocess.run(
        as_nobody([*words, wanted.name]), capture_output=True, text=True, timeout=120, check=False
    )
    # The interpreter of this fixture may lack what a download takes; what counts comes before.
    assert re.search("the server downloads it: .* can't be changed by this user", done.stdout)


def test_a_model_of_the_cloud_is_reported_and_passed_on(pull: Pull, registry: Registry) -> None:
    made = registry.add_model("far", "cloud", [], extras=False)
    done = pull(made.name)
    assert "far:cloud runs in the cloud" in done.stderr
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("command", ["pull", "reset"])
def test_a_pull_into_several_stores_is_wrong_usage(store: Path, command: str) -> None:
    done = run(store, "--store", str(store), command, "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        "2 stores were given, but a download is of one\n  name one of them: --store" in done.stderr
    )


def test_a_closed_pipe_ends_the_pull_and_keeps_its_bytes(
    store: Path, server: EngineServer, registry: Registry, pull: Pull
) -> None:
    """It ends as after a ctrl-C: what came is kept."""
    wanted = model(registry, size=24 * MB)
    registry.throttle(8 * MB)
    words = command(store, "pull", "--insecure", "--host", server.url, wanted.name)
    process = subprocess.Popen(
        words, env=environment(store), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while "Downloading" not in process.stdout.readline():
        pass
    process.stdout.close()
    assert process.stderr is not None
    assert (process.stderr.read(), process.wait(120)) == ("", 4)
    process.stderr.close()
    (record,) = json.loads((store / ".ollama-watch/models.json").read_bytes())["models"].values()
    assert record["state"] == "error", "it is not said to go on"
    registry.throttle(None)
    assert pull(wanted.name).returncode == 0
    assert registry.bytes_served(wanted.digests[0]) <= 24 * MB + 2 * MB


# ---------------------------------------------------------------- bad networks


def test_resets_are_survived_and_no_bar_runs_backwards(
    pull: Pull, registry: Registry, store: Path
) -> None:
    wanted = model(registry, size=12 * MB)
    registry.add_fault(Fault("reset", after=7 * MB))
    registry.throttle(10 * MB)
    done = pull(wanted.name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert percents(done.stdout) == sorted(percents(done.stdout))
    assert is_right(store, wanted.digests[0])
    assert registry.bytes_served(wanted.digests[0]) <= 12.3 * MB, "but for what sockets held"
    details = ended(store)
    assert details["lost_bytes"] == 0
    assert 11 * MB <= details["arrived_bytes"] <= 12.1 * MB
    assert 0 < details["median_bytes_per_second"] <= details["max_bytes_per_second"]
    told = " ".join(run(store, "log", "--type", "pull_completed").stdout.split())
    assert "is complete; 1" in told
    assert " MB downloaded in " in told


def ended(store: Path) -> dict[str, Any]:
    """The details of how the last pull ended."""
    lines = run(store, "log", "--json").stdout.splitlines()
    found = [json.loads(each) for each in lines]
    return dict([e for e in found if e["event_type"].startswith("pull_")][-1]["details"])


def test_a_stall_is_counted_and_what_else_takes_time_is_none(
    registry: Registry, store: Path, server: EngineServer
) -> None:
    wanted = model(registry)
    registry.hold(wanted.digests[0], at=[4 * MB])
    words = ("pull", "--stall", "1s", "--insecure", "--host", server.url, wanted.name)
    with Terminal(store, *words) as terminal:
        terminal.wait_for("attempt 2")
        registry.release()
        assert terminal.end() == 0
    assert ended(store)["stalls"] == 1
    assert is_right(store, wanted.digests[0])
    again = run(store, "pull", "--insecure", "--host", server.url, wanted.name)
    assert again.returncode == 0
    assert {key: ended(store)[key] for key in ("arrived_bytes", "stalls", "seconds")} == {
        "arrived_bytes": 0, "stalls": 0, "seconds": 0,
    }  # fmt: skip


# ---------------------------------------------------------------- reset


def broken_off(registry: Registry, store: Path, server: EngineServer) -> Model:
    """A download that its user has interrupted."""
    wanted = model(registry, size=24 * MB)
    registry.throttle(8 * MB)
    words = ("pull", "--insecure", "--host", server.url, wanted.name)
    with Terminal(store, *words) as terminal:
        wait_until(lambda: max(percents(terminal.told), default=0) >= 20, "20 %")
        terminal.process.send_signal(signal.SIGINT)
        terminal.end()
    server.kill()
    return wanted


def test_reset_asks_and_removes(registry: Registry, store: Path, server: EngineServer) -> None:
    wanted = broken_off(registry, store, server)
    assert run(store, "reset", wanted.name).returncode == 2, "nobody to ask"
    with Terminal(store, "reset", wanted.name) as terminal:
        terminal.wait_for("unfinished layers of")
        terminal.type("n\n")
        assert terminal.end() == 1
    assert list(store.glob(".ollama-watch/transfers/*/data"))
    with Terminal(store, "reset", wanted.name) as terminal:
        terminal.wait_for("unfinished layers of")
        terminal.type("y\n")
        assert terminal.end() == 0
        assert "download forgotten; " in terminal.told
    assert not list(store.glob(".ollama-watch/transfers/*"))
    again = run(store, "reset", "-y", wanted.name)
    assert (again.returncode, "there is no download to forget" in again.stdout) == (0, True)


def test_reset_reports_programs_what_it_did(
    registry: Registry, store: Path, server: EngineServer
) -> None:
    wanted = broken_off(registry, store, server)
    asked = run(store, "--json", "reset", wanted.name)
    assert (asked.returncode, json.loads(asked.stdout)["models"]) == (2, [])
    # What nothing knows is wrong usage; what was done before is told.
    done = run(store, "reset", "--offline", "-y", wanted.name, "another", "--json")
    assert done.returncode == 2, done.stderr
    assert "another" in done.stderr
    told = json.loads(done.stdout)
    (first,) = told.pop("models")
    assert told == {"schema": "ollama-watch/reset/1", "store": str(store)}
    assert first.pop("removed_bytes") >= 4 * MB
    assert wanted.digests[0] in first.pop("removed"), "and small ones, which wait for their names"
    assert first == {"model": wanted.name, "status": "reset"}


def test_reset_refuses_what_is_pulled(
    registry: Registry, store: Path, server: EngineServer, pull: Pull
) -> None:
    wanted = model(registry)
    registry.hold(wanted.digests[0], after=MB)
    theirs = server.start_pull(wanted.name)
    registry.wait_held(wanted.digests[0], 1)
    with Terminal(store, "pull", "--insecure", "--host", server.url, wanted.name) as terminal:
        terminal.wait_for("sha256-")
        done = run(store, "reset", "-y", wanted.name)
        assert done.returncode == 3, done.stdout
        assert "is being downloaded" in done.stderr
        registry.release()
        assert terminal.end() == 0
    assert theirs.result()[-1]["status"] == "success"


# ---------------------------------------------------------------- the queue


def test_the_queue_survives_a_kill(registry: Registry, store: Path, server: EngineServer) -> None:
    wanted = [model(registry, name) for name in ("one", "two")]
    (store / "blobs").mkdir(exist_ok=True)
    registry.hold(wanted[0].digests[0], after=MB)
    assert run(store, "queue", "add", *(each.name for each in wanted)).returncode == 0
    words = command(store, "queue", "run", "--insecure", "--host", server.url)
    first = subprocess.Popen(words, env=environment(store), stdout=subprocess.DEVNULL)
    registry.wait_held(wanted[0].digests[0], 1)
    first.kill()
    first.wait()
    registry.release()
    done = run(store, "queue", "run", "--insecure", "--host", server.url)
    assert done.returncode == 0, done.stderr
    found = json.loads(run(store, "queue", "ls", "--json").stdout)
    assert (found["items"], len(found["done"])) == ([], 2)
    assert all(is_right(store, each.digests[0]) for each in wanted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_queue_ends_in_order(
    registry: Registry, store: Path, server: EngineServer, number: signal.Signals
) -> None:
    (store / "blobs").mkdir(exist_ok=True)
    wanted = model(registry)
    registry.hold(wanted.digests[0], after=4 * MB)
    run(store, "queue", "add", wanted.name)
    with Terminal(store, "queue", "run", "--insecure", "--host", server.url) as terminal:
        wait_until(lambda: max(percents(terminal.told), default=0) >= 40, "half of it")
        terminal.process.send_signal(number)
        assert terminal.end() == INTERRUPTED
    (item,) = json.loads(run(store, "queue", "ls", "--json").stdout)["items"]
    assert item["state"] == "waiting"
    (record,) = json.loads((store / ".ollama-watch/models.json").read_bytes())["models"].values()
    assert record["state"] == "error", "it is not said to go on"
    assert list(store.glob(".ollama-watch/transfers/*/data"))


def test_a_ctrl_c_at_the_very_end_of_a_drive_is_noticed(
    monkeypatch: pytest.MonkeyPatch, models: HealthyStore
) -> None:
    """It comes when the last word of the drive has been said, before signals are put back."""
    usual = signal.signal

    def put_back(number: int, handler: Any) -> Any:
        if handler is signal.default_int_handler:
            os.kill(os.getpid(), signal.SIGINT)
        return usual(number, handler)

    monkeypatch.setattr(signal, "signal", put_back)
    monkeypatch.setattr(pulling, "drive", lambda *_: None)
    context = Context(rules().settings, stores=(str(models.path),))
    drive = queueing.queued(context, "http://127.0.0.1:1", insecure=False)
    with pytest.raises(KeyboardInterrupt):
        drive("x", lambda: "")


def test_the_queue_reports_what_can_not_be_downloaded(
    registry: Registry, store: Path, server: EngineServer
) -> None:
    (store / "blobs").mkdir(exist_ok=True)
    run(store, "queue", "add", f"{registry.url}/library/nothing:1b")
    done = run(store, "queue", "run", "--insecure", "--host", server.url)
    assert done.returncode == 4
    assert "check its spelling" in done.stdout + done.stderr + run(store, "queue", "ls").stdout
