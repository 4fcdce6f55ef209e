"""What is measured of the commands that change a store; each function gives lines of the table."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

from tests.support.servers import EngineServer, RealServer, Server, data_segments

from .benches import Setting
from .measure import US, Row, Run, interleaved, make, middle, milliseconds, ratio, run
from .servers import post, process

_MIB = 1 << 20
_ORPHANS = 10_000
_VERIFIED = 10_000
_LAYERS = 8
_CORES = len(os.sched_getaffinity(0))


# ---------------------------------------------------------------- after a kill


def _after(before: Callable[[], object], *words: str) -> Run:
    """Run a command once everything is ready for it."""
    before()
    return run(words)


class _Again(NamedTuple):
    """What the pull after a kill downloaded beyond what was missing, and into how many parts."""

    bytes: int
    parts: int


def resume(setting: Setting) -> Iterator[Row]:
    """Bytes downloaded again after SIGKILL in a pull of 16 parts: repaired, and by Ollama alone."""
    yield from _resumed(setting, "the demo's server", EngineServer, 160_000_000)
    if "OLLAMA_BIN" in os.environ:
        yield from _resumed(setting, "Ollama", RealServer, 1_600_000_000)


def _resumed(setting: Setting, who: str, kind: type[Server], size: int) -> Iterator[Row]:
    folder = setting.folder / "resume"
    ours, alone = [], []
    with process("watcher.demo.registry", "--port", "0", until="http://") as (_, line):
        registry = line.strip()
        for seed in range(3):
            layers = [{"size": size, "seed": seed}]
            order = {"name": f"m{seed}", "tag": "1b", "layers": layers}
            made = post(registry, "/_control", {"model": order})
            model, digest = made["model"]["name"], made["model"]["digests"][0]
            store = folder / "models"
            present = _broken(kind, store, registry, model, digest, size)
            copied = folder / "copied"
            subprocess.run(["cp", "-a", "--sparse=always", store, copied], check=True)
            run((*US, "--store", str(store), "repair", "-y"))
            parts = _unfinished(store)
            missing = size - present
            ours.append(_Again(_pulled(kind, store, registry, model, digest) - missing, parts))
            alone.append(_Again(_pulled(kind, copied, registry, model, digest) - missing, 16))
            shutil.rmtree(folder)
    most = max(each.bytes / each.parts / _MIB for each in ours)
    yield Row(
        f"after SIGKILL of {who} during a pull of 16 parts, then `repair`: bytes downloaded again "
        "per unfinished part",
        "1.1 MiB",
        f"at most {most:.2f} MiB of {len(ours)} kills (Ollama alone: "
        f"{median(each.bytes / each.parts / _MIB for each in alone):.1f} MiB)",
        most <= 1.1,
    )


def _broken(
    kind: type[Server], store: Path, registry: str, model: str, digest: str, size: int
) -> int:
    """Kill a server in the middle of a pull; the bytes of the layer that are on the disk."""
    post(registry, "/_control", {"throttle": size / 4})
    (store / "manifests").mkdir(parents=True)
    with kind(store, {"DEMO_PART_BYTES": str(size // 16)}) as server:
        pull = server.start().wait_ready().start_pull(model)
        while pull.completed < size * 0.4:
            if pull.ended:
                raise RuntimeError(f"the pull has ended before it was killed: {pull.lines[-1:]}")
            time.sleep(0.01)
        server.kill()
    data = store / "blobs" / f"{digest.replace(':', '-')}-partial"
    return sum(end - start for start, end in data_segments(data))


def _unfinished(store: Path) -> int:
    texts = [path.read_text() for path in (store / "blobs").glob("*-partial-*")]
    numbers = [[int(each.rstrip("}\n").split(":")[1]) for each in t.split(",")] for t in texts]
    return sum(completed < size for _, _, size, completed in numbers)


def _pulled(kind: type[Server], store: Path, registry: str, model: str, digest: str) -> int:
    """Pull to the end with a new server; the bytes of the layer that the registry has sent."""
    post(registry, "/_control", {"throttle": None, "reset_stats": True})
    with kind(store, {"DEMO_PART_BYTES": "10000000"}) as server:
        lines = server.start().wait_ready().pull(model, timeout=300)
        if lines[-1].get("status") != "success":
            raise RuntimeError(f"the pull has failed: {lines[-1]}")
    return int(post(registry, "/_control", {})["bytes"][digest])


# ---------------------------------------------------------------- repair


def repair(setting: Setting) -> Iterator[Row]:
    """A repair of one very large download, as a whole process."""
    store = setting.folder / "pieces"
    make("pieces", str(store), str(100_000_000_000), "100")
    sidecars = {path: path.read_bytes() for path in (store / "blobs").glob("*-partial-*")}

    def fresh() -> None:
        for path in (store / "blobs").glob("*-partial-*"):
            path.unlink()
        for path, text in sidecars.items():
            path.write_bytes(text)
        shutil.rmtree(store / ".ollama-watch", ignore_errors=True)
        os.sync()

    (runs,) = interleaved(
        (lambda: _after(fresh, *US, "--store", str(store), "repair", "-y"),), setting.rounds
    )
    if all(path.read_bytes() == text for path, text in sidecars.items()):
        raise RuntimeError("nothing was repaired")
    shutil.rmtree(store)
    yield Row(
        "`repair -y` of a sparse download of 100 GB in 100 parts, whole process",
        "300 ms",
        milliseconds(middle(runs)),
        middle(runs) <= 0.3,
    )


# ---------------------------------------------------------------- verify


def verify(setting: Setting) -> Iterator[Row]:
    """Hashing beside openssl, cold and warm; and a second run over blobs that were verified."""
    store = setting.folder / "contents"
    make("contents", str(store), str(_LAYERS), str(setting.pull_bytes // _LAYERS))
    blobs = sorted(map(str, (store / "blobs").iterdir()))

    script = 'printf "%s\\n" "$@" | xargs -n1 -P"$0" openssl dgst -sha256'

    for state, ready in (("cold", _cool), ("warm", _warm)):
        before = partial(_again, store, ready, blobs)
        first, second = interleaved(
            (
                partial(_after, before, *US, "--store", str(store), "verify"),
                partial(_after, before, "sh", "-c", script, str(_CORES), *blobs),
            ),
            max(3, setting.rounds // 2),
        )
        share = 1 / ratio(first, second)
        gigabytes = setting.pull_bytes / 1e9
        yield Row(
            f"`verify` of {gigabytes:g} GB in {_LAYERS} blobs, {state} page cache: rate compared "
            f"with `openssl dgst -sha256`, {_CORES} at a time",
            "at least 0.9 ×",
            f"{share:.2f} × ({gigabytes / middle(first):.2f} to {gigabytes / middle(second):.2f} "
            "GB/s)",
            share >= 0.9,
        )
    yield _sums(setting, store, blobs)
    shutil.rmtree(store)
    yield from _second(setting)


def _sums(setting: Setting, store: Path, blobs: list[str]) -> Row:
    """With sums of chunks made, and where they are there already."""
    words = (*US, "--store", str(store), "verify")
    made, there = interleaved(
        (
            partial(_after, partial(_again, store, _warm, blobs), *words),
            partial(_after, partial(_again, store, _warm, blobs, kept=("sums",)), *words),
        ),
        setting.rounds,
    )
    pairs = zip(made, there, strict=True)
    seconds, cpu = ratio(made, there), median(a.cpu / b.cpu for a, b in pairs)
    return Row(
        "the same, with sums of chunks made, compared with sums that are there: time, and CPU",
        "1.1 ×",
        f"{seconds:.2f} × ({middle(made):.2f} to {middle(there):.2f} s), {cpu:.2f} ×",
        max(seconds, cpu) <= 1.1,
    )


def _again(
    store: Path,
    ready: Callable[[list[str]], object],
    blobs: list[str],
    kept: tuple[str, ...] = (),
) -> None:
    """Forget what was hashed, and all else but what is `kept`."""
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(store / ".ollama-watch"):
            if entry.name not in kept:
                (shutil.rmtree if entry.is_dir() else os.unlink)(entry.path)
    ready(blobs)


def _cool(blobs: list[str]) -> None:
    for blob in blobs:
        fd = os.open(blob, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def _warm(blobs: list[str]) -> None:
    subprocess.run(["cat", *blobs], stdout=subprocess.DEVNULL, check=True)


def _second(setting: Setting) -> Iterator[Row]:
    store = setting.folder / "verified"
    make("contents", str(store), str(_VERIFIED), "100")
    words = (*US, "--store", str(store))
    run((*words, "verify"))
    ours, audit = interleaved(
        (lambda: run((*words, "verify")), lambda: run((*words, "audit"))), setting.rounds
    )
    shutil.rmtree(store)
    more = median(a.seconds - b.seconds for a, b in zip(ours, audit, strict=True))
    yield Row(
        f"a second `verify` of {_VERIFIED:,} verified blobs: time beyond that of an audit",
        "50 ms",
        f"{milliseconds(more)} ({milliseconds(middle(ours))} to {milliseconds(middle(audit))})",
        more <= 0.05,
    )


# ---------------------------------------------------------------- clean


def clean(setting: Setting) -> Iterator[Row]:
    """Removing orphans beside rm, and beside rm with its work brought to the disk."""
    store = setting.folder / "orphans"

    def fresh() -> None:
        shutil.rmtree(store, ignore_errors=True)
        make("orphans", str(store), str(_ORPHANS))

    blobs = str(store / "blobs")
    ours, removed, durable = interleaved(
        (
            lambda: _after(fresh, *US, "--store", str(store), "clean", "-y"),
            lambda: _after(fresh, "rm", "-r", blobs),
            lambda: _after(fresh, "sh", "-c", f"rm -r {blobs} && sync -f {store}"),
        ),
        max(3, setting.rounds // 2),
    )
    shutil.rmtree(store)
    times = ratio(ours, removed)
    yield Row(
        f"`clean -y` of {_ORPHANS:,} orphans, durable, compared with `rm` of the same",
        "5 ×",
        f"{times:.1f} × ({milliseconds(middle(ours))} to {milliseconds(middle(removed))})",
        times <= 5,
    )
    yield Row(
        "the same, compared with `rm` and `sync -f`",
        "",
        f"{ratio(ours, durable):.1f} × ({milliseconds(middle(durable))})",
    )


ALL: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "resume": resume,
    "repair": repair,
    "verify": verify,
    "clean": clean,
}
