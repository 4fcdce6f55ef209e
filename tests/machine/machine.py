"""A server, a user and us at work on one store, in an order that a seed draws.

What must hold is checked around each act of ours, and at the end (`Machine.finish`):

- a finished blob stays, unless it is rotten or a stale orphan; manifests and the user's own files
  stay to the byte;
- no act makes a false claim, and after a whole repair there is none;
- a repair gives up no more of what was trusted than 1.1 MiB for each part;
- pulls of ours receive what they lack and 2 %, and 1 MiB for each connection that is killed;
- a power cut costs no more than what is synced at once;
- after `prepare` a start of the server deletes nothing that is wanted;
- at the end one `repair` leaves nothing of ours behind, a pull of each model, the server's or ours,
  succeeds and downloads what was missing, and every model verifies.

What the server alone spoils is not ours to answer for: a blob that it has finished on claims that
a user's damage made false (`_excused`) is made good by `verify`, `repair` and another pull; where
it has cut data to a wrong length, since a sidecar was lost, and nothing tells the true one any
more, one pull may end in a mismatch (`_cut`). Two things nobody could tell afterwards, so they
don't come together: an error page over a download's data, and a loss of what only its sidecars or
its inode knew before we looked (`_paged`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.support import commands
from tests.support.driving import Daemon, environment, is_right, private_proc
from tests.support.notation import age
from tests.support.servers import Pull, Server, blob, collapsed, wait_until
from tests.support.transfers import folder
from watcher.demo.registry import Content, Fault, Layer, Manners, Model, Registry
from watcher.model import DAY, HOUR, MIB, Part, Ranges
from watcher.ollama import ranges, sidecars

from . import pulls, seen
from .pulls import CONNECTIONS, REFUSALS, SYNC, Pulls
from .seen import Seen

MB = 1_000_000
#: Two parts by the server's own rule, one part, and less than what is doubted.
LARGE, SMALL, TINY = 104 * MB, 5 * MB, 400_000
BUDGET = 1.1 * MIB
REPAIRS = {"OLLAMA_WATCH_REPAIR": "true"}
MadeServer = Callable[..., Server]


def gguf(name: str) -> bytes:
    """The smallest file of that format: no tensors, an architecture and a name."""
    pairs = b"".join(
        struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(value)) + value
        for key, value in ((b"general.architecture", b"llama"), (b"general.name", name.encode()))
    )
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + pairs


class Machine:
    """One history; see the module."""

    def __init__(self, folder: Path, made: MadeServer, registry: Registry, seed: int) -> None:
        self.chance = random.Random(seed)
        self.told = [f"seed {seed}"]
        self.store = folder / "models"
        for name in ("blobs", "manifests"):
            (self.store / name).mkdir(parents=True)
        self._proc = folder / "proc"
        self._made, self._registry = made, registry
        self._ours = Pulls(self.store)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._at = f"127.0.0.1:{free.getsockname()[1]}"
        self._server = made(self.store)
        self._running = False
        self._pull: Pull | None = None
        self._models = self._add_models(int.from_bytes(hashlib.sha256(bytes(folder)).digest()[:4]))
        self._contents: dict[str, Content] = {}
        for model in self._models:
            for digest in (*model.digests, model.config):
                self._contents[digest] = registry.content(digest)
        self._broken: dict[Path, bytes] = {}
        self._rotten: set[str] = set()
        self._excused: set[str] = set()
        self._cut: set[str] = set()
        self._paged: set[str] = set()
        #: What was trusted before an act of ours that was killed.
        self._owed: dict[str, Ranges] = {}

    def _add_models(self, seed: int) -> list[Model]:
        """Two models that share a layer, which no other history has: see `Store.digest`."""
        shared = Layer(SMALL, seed=seed + 1)
        return [
            self._registry.add_model("a", "1b", [Layer(LARGE, seed=seed), shared], extras=False),
            self._registry.add_model("b", "1b", [shared, Layer(TINY, seed=seed + 2)], extras=False),
        ]

    def __str__(self) -> str:
        return "\n".join(self.told)

    def run(self, steps: int) -> None:
        """So many operations, then the end."""
        try:
            for _ in range(steps):
                self._step()
            self.finish()
        except BaseException as error:
            error.add_note(str(self))
            raise
        finally:
            self._end_pull()
            self._server.stop()

    def _step(self) -> None:
        if self._ended():
            self._end_pull()
        possible = [each for each in OPERATIONS if each.possible(self)]
        (drawn,) = self.chance.choices(possible, [each.often for each in possible])
        self.told.append(drawn.do.__name__)
        drawn.do(self)

    def _tell(self, *more: object) -> None:
        self.told[-1] += "".join(f" {each}" for each in more)

    # ------------------------------------------------------------ the server

    def start(self) -> None:
        """Start it, if it does not run; a signal will leave what this start has drawn."""
        if self._running:
            return
        self._owed.clear()
        env = {
            "DEMO_EXIT": self.chance.choice(["well", "lost", "torn"]),
            "DEMO_RETRY_SECONDS": "0.01",
            "OLLAMA_HOST": self._at,
        }
        self._server.stop()
        self._server = self._made(self.store, env).start().wait_ready()
        self._running = True

    def stop(self) -> None:
        """SIGKILL or SIGTERM, in the middle of a pull or not."""
        number = self.chance.choice([signal.SIGKILL, signal.SIGTERM])
        self._tell(number.name)
        self._server.kill(number)
        self._running = False
        self._end_pull()

    def prepare_and_start(self) -> None:
        """As the server's own unit has it."""
        self.us("prepare")
        before = self.see()
        self.start()
        left = {path.name for path in (self.store / "blobs").iterdir()}
        assert before.wanted <= left, f"the start deleted {sorted(before.wanted - left)}"

    def begin_pull(self) -> None:
        """Begin a pull, which is held back when it has got somewhere, or meets a bad network."""
        self.start()
        (model,) = self.chance.choices(self._models, [3, 1])
        self._note_false_claims(model)
        after = self.chance.choice([0, 4096, 70_001, 1_500_000, 3_000_000, 40 * MB])
        for digest in (*model.digests, model.config):
            self._registry.hold(digest, after=after)
        fault = self._draw_fault()
        self._tell(model.name[-4:], after, fault and fault.kind)
        before = self._registry.stats()["requests"].get("data", 0)
        self._pull = self._server.start_pull(model.name)
        if fault is not None and fault.kind == "page":
            self._meet_pages(model, before)
            return
        wait_until(lambda: self._held(model, after) or self._ended(), "the pull to be held")
        self._registry.clear_faults()

    def _draw_fault(self) -> Fault | None:
        after = self.chance.choice([0, 5000, 2_000_000])
        broken = Fault("reset", after=after, times=1), Fault("truncate", after=after, times=1)
        fault = self.chance.choice([None, None, *broken, Fault("page")])
        return fault and self._registry.add_fault(fault)

    def _meet_pages(self, model: Model, before: int) -> None:
        """Error pages are all that comes, until the server is killed over it."""
        self._paged.update(model.digests)
        asked = self._registry.stats
        wait_until(
            lambda: asked()["requests"].get("data", 0) > before or self._ended(), "an error page"
        )
        self._server.kill()
        self._running = False
        self._end_pull()
        self._registry.clear_faults()

    def _held(self, model: Model, after: int) -> bool:
        """Whether every connection of the layer under way is where it is held."""
        for digest in (*model.digests, model.config):
            count = len(self._registry.held(digest))
            if count:
                parts = self._parts(digest)
                return count >= min(16, sum(each.size - each.completed > after for each in parts))
        return False

    def _parts(self, digest: str) -> list[Part]:
        found = []
        for path in self.store.glob(f"blobs/{blob(self.store, digest).name}-partial-*"):
            with contextlib.suppress(OSError, ValueError):
                found.append(sidecars.parse(path.read_bytes()))
        return found

    def _ended(self) -> bool:
        return self._pull is not None and self._pull.ended

    def finish_pull(self) -> None:
        """Let it flow to its end, good or bad."""
        assert self._pull is not None
        self._registry.release()
        self._tell(collapsed(self._pull.result())[-1:])
        self._end_pull()

    def cancel_pull(self) -> None:
        """Close its request."""
        self._end_pull()
        wait_until(lambda: "w" not in self._server.open_files().values(), "the download's end")

    def _end_pull(self) -> None:
        if self._pull is not None:
            self._owed.clear()
            self._pull.close()
            self._pull = None
        self._registry.clear_faults()
        self._registry.release()

    def _note_false_claims(self, model: Model) -> None:
        self._ours.forget_given()
        self._owed.clear()
        for digest in model.digests:
            if seen.false_claims(self.store, self._contents[digest]):
                self._excused.add(digest)
            parts = self._parts(digest)
            if parts and sum(part.size for part in parts) != self._contents[digest].size:
                self._cut.add(digest)

    def remove_model(self) -> None:
        """`ollama rm`."""
        self.start()
        name = self.chance.choice(
            [*(each.name.removeprefix("http://") for each in self._models), "mine"]
        )
        status, _ = self._server.request("DELETE", "/api/delete", {"model": name})
        self._tell(name[-4:], status)

    def create(self) -> None:
        """`ollama create`, or only its upload: a blob that nothing names."""
        self.start()
        data = gguf(f"{self.store} {self.chance.randrange(3)}")
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self._contents[digest] = Content(Layer(data=data), 0)
        status, _ = self._server.request("POST", f"/api/blobs/{digest}", data)
        assert status in (200, 201)
        if self.chance.random() < 0.6:
            body = {"model": "mine", "files": {"a.gguf": digest}}
            self._tell(self._server.request("POST", "/api/create", body)[1].splitlines()[-1:])

    # ------------------------------------------------------------ the user

    def damage(self) -> None:
        """Lose or spoil files of a download that nobody is at work on."""
        digest = self.chance.choice(self._unfinished())
        data = blob(self.store, digest, "-partial")
        numbered = sorted(self.store.glob(f"blobs/{data.name}-*"))
        self._owed.clear()
        kinds: list[Callable[[Path, list[Path]], None]]
        kinds = [self._truncate, self._copy_without_holes, self._add_strange_tail]
        if numbered:
            kinds += [self._lose_one, self._lose_one, self._lose_all, self._empty_one]
        kind = self.chance.choice(kinds)
        self._tell(kind.__name__.strip("_"))
        kind(data, numbered)

    def _unfinished(self) -> list[str]:
        """Downloads with data that an error page is not known to lie in."""
        return [
            digest
            for digest in sorted(self._contents.keys() - self._paged)
            if blob(self.store, digest, "-partial").exists()
        ]

    def _truncate(self, data: Path, _: list[Path]) -> None:
        os.truncate(data, self.chance.randrange(data.stat().st_size + 1))

    def _copy_without_holes(self, data: Path, _: list[Path]) -> None:
        copy = data.with_name("copy.tmp")
        with data.open("rb") as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        shutil.copystat(data, copy)
        os.replace(copy, data)

    def _add_strange_tail(self, data: Path, _: list[Path]) -> None:
        data.with_name(f"{data.name}-0.bak").write_text("{}")

    def _lose_one(self, _: Path, numbered: list[Path]) -> None:
        self.chance.choice(numbered).unlink()

    def _lose_all(self, _: Path, numbered: list[Path]) -> None:
        for path in numbered:
            path.unlink()

    def _empty_one(self, _: Path, numbered: list[Path]) -> None:
        self.chance.choice(numbered).write_bytes(b"")

    def rot(self) -> None:
        """A finished blob that no pull is at work on gets another byte in the middle."""
        digest = self.chance.choice(self._finished())
        with blob(self.store, digest).open("r+b") as file:
            file.seek(self._contents[digest].size // 2)
            file.write(b"\0")
        self._rotten.add(digest)

    def _finished(self) -> list[str]:
        return [each for each in sorted(self._contents) if blob(self.store, each).exists()]

    def grow_old(self) -> None:
        """All files, or half of them, are set back in time."""
        seconds = self.chance.choice([100.0, 100.0, 2 * HOUR, 8 * DAY])
        share = self.chance.choice([1.0, 1.0, 1.0, 0.5])
        self._tell(f"{seconds:.0f} s", share)
        self._owed.clear()
        transfers = self.store.glob(".ollama-watch/transfers/*/*")
        for path in sorted([*(self.store / "blobs").iterdir(), *transfers]):
            if self.chance.random() < share:
                age(path, seconds + max(0.0, time.time() - path.lstat().st_mtime))

    def break_manifest(self) -> None:
        """It is emptied, or cut."""
        path = self.chance.choice(self._manifests())
        self._broken[path] = path.read_bytes()
        path.write_bytes(self.chance.choice([b"", self._broken[path][:50]]))

    def _manifests(self) -> list[Path]:
        found = self.store.glob("manifests/*/*/*/*")
        return sorted(path for path in found if path not in self._broken)

    def mend_manifest(self) -> None:
        """What was broken is put right, unless it is gone."""
        path, content = self._broken.popitem()
        if path.exists():
            path.write_bytes(content)

    def leave_foreign_files(self) -> None:
        """What is no business of the server's."""
        (self.store / "blobs" / "README.txt").write_text("mine")
        (self.store / "blobs" / "split-copy123").write_text("of a create that died")

    # ------------------------------------------------------------ us

    def act(self) -> None:
        """A command of ours; now and then it is killed in the middle."""
        words = self.chance.choices(
            [("audit",), ("repair", "-y"), ("clean", "-y"), ("prepare",), ("verify",),
             ("quarantine", "purge", "-y"), ("quarantine", "restore", "-y"),
             ("repair", "-y", "--give-back")],
            [1, 8, 4, 2, 2, 1, 1, 3],
        )[0]  # fmt: skip
        if words[:2] == ("quarantine", "restore"):
            kept = json.loads(self._run(0, "--json", "quarantine", "ls").stdout)["kept"]
            if not kept:
                return
            words += (kept[0]["label"],)
        self.us(*words, at=self.chance.choice([0, 0, self.chance.randrange(1, 60)]))

    def us(self, *words: str, at: int = 0) -> subprocess.CompletedProcess[str]:
        """A command of ours to its end, or to the call at which it is killed."""
        with self._watched(words) as ended:
            done = self._run(at, *words)
            self._tell(*words, f"at {at}:", done.returncode)
            blind = {4} if self._broken else set[int]()
            assert done.returncode in {0, 1, 3, -9} | blind, done.stdout + done.stderr
            assert "Traceback" not in done.stderr, done.stderr
            ended.append(done.returncode)
        return done

    def _run(self, at: int, *words: str) -> subprocess.CompletedProcess[str]:
        given = [self._ours.order(at=at), "--store", str(self.store), *words]
        done = commands.run(given, self._env, self.store.parent, module="tests.machine.us")
        out, errors = done.stdout.decode(), done.stderr.decode()
        return subprocess.CompletedProcess(given, done.returncode, out, errors)

    @property
    def _env(self) -> dict[str, str]:
        return environment(self.store, {**REPAIRS, "OLLAMA_HOST": self._at})

    # ------------------------------------------------------------ pulls of ours

    def fetch(self) -> None:
        """Pulls of ours over a bad line, to their ends or killed, beside whatever happens."""
        models = self.chance.choice([self._models[:1], self._models[1:], self._models])
        if self._pull is None:
            pulls.draw_line(self._registry, self.chance)
        self._registry.release()
        with self._watched(("pull",)) as ended:
            ended.append(self._fetch(models, self.chance.choice([0, 1, 2, 3])))
            if self._pull is not None:
                self.finish_pull()

    def _fetch(self, models: list[Model], acts: int = 0) -> int:
        """Pull models, while so many other things happen; -9 where that was killed."""
        doubted = self._doubted(models)
        lacked, received = self._lacking(models, doubted), self._ours.received
        there = {*self._finished()}
        is_alone = self._pull is None
        words = [*(["--parallel", "2"] if len(models) > 1 else []), *(each.name for each in models)]
        words += ["--no-wait"] * (self.chance.random() < 0.3)
        words += ["--verify"] * (self.chance.random() < 0.3)
        at = self.chance.choice([0, 0, self.chance.randrange(1, 300)]) if acts else 0
        room = self.chance.choice([None, None, self.chance.randrange(1, 60 * MB)])
        options = [each for each in words if each.startswith("--")]
        self._tell(*(each.name[-4:] for each in models), *options, f"at {at}, room {room}")
        running = [self._ours.start(words, self._env, at=at, room=room)]
        happened = set[str]()
        for _ in range(acts):
            until = received + self.chance.randint(0, lacked)
            wait_until(
                lambda until=until: (  # type: ignore[misc]
                    self._ours.received >= until or all(each.has_ended for each in running)
                ),
                "bytes of ours",
            )
            happened.add(self._meanwhile(running, words))
        codes = [each.end() for each in running]
        self._ours.mend()
        self._registry.clear_faults()
        self._registry.manners = Manners()
        self._tell(*codes)
        told = "\n".join(each.printed for each in running)
        # What a server touches while it is hashed is not verified.
        known = {0, 130, -9, -15} | ({4} if "was not verified" in told else set())
        assert {*codes} <= known, told
        assert "Traceback" not in told, told
        gained = lacked - self._lacking(models, doubted)
        got, killed = self._ours.received - received, sum(each < 0 for each in codes)
        most = 1.02 * gained + 64 * 1024 + killed * CONNECTIONS * MIB
        most += 3 * SYNC * ("power" in happened) + (0 if room is None else REFUSALS * MIB // 2)
        # An act may take away what had arrived of a layer whose turn had not come.
        is_known = happened.isdisjoint({"act", "rot"})
        assert got <= most or not is_known, f"{got} bytes were received for {gained}\n{told}"
        if 0 in codes:
            for model in models:
                self._has(model, verified="--verify" in words)
                if is_alone and not killed and "pull" not in happened:
                    self._leaves_no_transfer({*model.digests, model.config} - there)
        return min(codes)

    def _meanwhile(self, running: list[pulls.Pull], words: list[str]) -> str:
        """Something happens while pulls of ours run."""
        kinds = ["kill", "power", "power", "end", "two", "two", "server", "pull", "act", "rot"]
        kind = self.chance.choice(kinds)
        self._tell(kind)
        match kind:
            case "kill":
                running[0].kill(signal.SIGKILL)
            case "power":
                if self.chance.random() < 0.7:
                    wait_until(
                        lambda: self._ours.is_syncing or all(each.has_ended for each in running),
                        "a sync",
                    )
                for each in running:
                    each.kill(signal.SIGKILL)
                    each.end()
                self.cut_power()
            case "rot":
                for each in running:
                    each.kill(signal.SIGKILL)
                    each.end()
                self._ours.rot()
                running.append(self._ours.start(words, self._env))
            case "end":
                running[0].kill(signal.SIGTERM)
            case "two":
                running.append(self._ours.start(words, self._env))
            case "server":
                (self.stop if self._running else self.start)()
            case "pull" if self._pull is None:
                self._registry.clear_faults()
                self._registry.manners = Manners()
                self.start()
                model = self.chance.choice(self._models)
                self._note_false_claims(model)
                self._pull = self._server.start_pull(model.name)
            case "act":
                acts = [("repair", "-y"), ("repair", "-y", "--give-back"), ("clean", "-y")]
                done = self._run(0, *self.chance.choice(acts))
                assert "Traceback" not in done.stderr, done.stderr
        return kind

    def _doubted(self, models: list[Model]) -> set[str]:
        """The digests of which wrong bytes may be here."""
        digests = {digest for model in models for digest in model.digests}
        false = {each for each in digests if seen.false_claims(self.store, self._contents[each])}
        return false | self._rotten | self._excused | self._cut | self._paged

    def _lacking(self, models: list[Model], doubted: set[str]) -> int:
        trusted = self.see().trusted
        return sum(
            pulls.lacking(
                self.store,
                self._contents[digest],
                trusted.get(digest, ()),
                sure=digest not in doubted,
            )
            for digest in {each for model in models for each in (*model.digests, model.config)}
        )

    def _has(self, model: Model, *, verified: bool) -> None:
        """A pull has succeeded. What was finished before is hashed where that was asked for."""
        for digest in (*model.digests, model.config):
            if verified or digest not in self._rotten | self._excused:
                assert is_right(self.store, digest), digest
        name = model.name.removeprefix("http://").replace(":1b", "/1b")
        assert (self.store / "manifests" / name).read_bytes() == model.manifest

    def _leaves_no_transfer(self, digests: set[str]) -> None:
        for digest in digests:
            left = folder(self.store, digest.removeprefix("sha256:"))
            is_kept = blob(self.store, digest, "-partial").exists()
            assert is_kept or not left.exists(), f"{digest}: {[*left.iterdir()]}"

    def cut_power(self) -> None:
        """What was not synced is lost of transfers, and the machine starts again."""
        if self._running:
            self._server.kill()
            self._running = False
        self._end_pull()
        false, fetched = self.see().false, self._fetched()
        self._ours.cut_power()
        for digest, now in self.see().false.items():
            assert not ranges.difference(now, false[digest]), f"{digest}: a false claim"
        for digest, size in self._fetched().items():
            assert fetched[digest] - size <= 3 * SYNC + CONNECTIONS * MIB, digest

    def _fetched(self) -> dict[str, int]:
        """The bytes of each transfer that were fetched, and not copied from a server's download."""
        return {
            digest: ranges.size(pulls.believed(self.store, digest, sure=False))
            for digest in self._contents
        }

    # ------------------------------------------------------------ what must hold

    def watch_for_a_while(self) -> None:
        """The service, which may see the server die, and may be killed at once."""
        with self._watched(("daemon",)) as ended:
            daemon = Daemon(self.store, REPAIRS).start()
            try:
                daemon.wait_event("service_started")
                if self.chance.random() < 0.3:
                    self._tell("killed at once")
                    ended.append(-9)
                    return
                daemon.wait_idle()
                if self._running and self.chance.random() < 0.6:
                    self.stop()
                    daemon.wait_idle()
                assert "Traceback" not in daemon.errors, daemon.errors
                assert daemon.kill(signal.SIGTERM) == 0
                ended.append(0)
            finally:
                daemon.close()

    def see(self) -> Seen:
        """The store as it stands."""
        pids = [self._server.pid] if self._running else []
        return seen.see(self.store, self._contents, private_proc(self._proc, *pids))

    @contextlib.contextmanager
    def _watched(self, words: tuple[str, ...]) -> Iterator[list[int]]:
        """Check what must hold of an act of ours, whose exit code the block appends."""
        before = self.see()
        owed = self._owed if before.unfinished else before.trusted
        live = self._pull is not None
        command = next(word for word in words if not word.startswith("-"))
        if "--give-back" in words:
            command = "give back"  # it repairs nothing
        ended: list[int] = []
        yield ended
        after, killed = self.see(), ended[-1] == -9
        changed = {each for each, _ in after.kept.items() ^ before.kept.items()}
        if command == "pull":
            changed = {each for each in changed if not each.endswith("/1b")}
        assert not changed, "manifests, or files of the user's, have changed"
        self._check_blobs(command, before, after)
        for digest, false in after.false.items():
            assert not ranges.difference(false, before.false[digest]), f"{digest}: a false claim"
        if command == "pull":
            return
        self._owed = owed if killed else {}
        if killed or live:
            return
        if command in ("repair", "prepare", "daemon"):
            self._paged.clear()
        if command == "repair" and ended[-1] == 0:
            assert not any(after.false.values()), after.false
            for digest, trusted in owed.items():
                self._keeps_trusted(digest, trusted)

    def _check_blobs(self, command: str, before: Seen, after: Seen) -> None:
        for digest, (inode, size, at) in before.blobs.items():
            if digest in after.blobs and after.blobs[digest][:2] == (inode, size):
                continue
            if digest in self._rotten | self._excused:
                moves = command in ("repair", "quarantine", "daemon", "pull")
                assert moves or before.unfinished, f"{digest} went"
            elif command != "pull" or digest in before.named:  # a server may start meanwhile
                stale = time.time() - at >= 7 * DAY and digest not in before.named
                assert command == "clean", f"{digest} went"
                assert stale, f"{digest} went"
                assert not self._running

    def _keeps_trusted(self, digest: str, trusted: Ranges) -> None:
        if blob(self.store, digest).exists():
            return
        parts = self._parts(digest)
        unfinished = sum(part.completed < part.size for part in parts)
        lost = ranges.size(ranges.difference(trusted, seen.claims(self.store, digest)))
        assert lost <= BUDGET * unfinished, f"{digest}: {lost} trusted bytes were given up"

    # ------------------------------------------------------------ the end

    def finish(self) -> None:
        """All is well after one repair and a pull of each model."""
        self.told.append("the end")
        while self._broken:
            self.mend_manifest()
        if self._running and self.chance.random() < 0.5:
            self.stop()
        elif self._running:
            self.cancel_pull()
        for path in (self.store / "blobs").iterdir():
            age(path, 600 + max(0.0, time.time() - path.lstat().st_mtime))
        done = self.us("--json", "repair", "-y")
        self._follow_advice(json.loads(done.stdout))
        self._leaves_nothing()
        if self.chance.random() < 0.5:
            self._tell("ours")
            for model in self._models:
                self._fetch([model])
        self.start()
        for model in self._models:
            self._pull_to_the_end(model)
        if not all(is_right(self.store, digest) for digest in self._wanted()):
            self._mend_rotten()
        assert self.us("verify").returncode in ({0, 1} if self._is_mine_rotten() else {0})
        wrong = [digest for digest in self._wanted() if not is_right(self.store, digest)]
        assert wrong == []

    def _follow_advice(self, document: dict[str, object]) -> None:
        """Where only a new beginning helps, make one; else nothing is refused."""
        for refusal in document["plan"]["refusals"]:  # type: ignore[index]
            self._tell(refusal["kind"], refusal["subject"][:12])
            if refusal["kind"] == "live" and refusal["verb"] == "remove_transfer":
                continue  # it goes once what a server has left beside it has gone
            if refusal["kind"] == "unproven" and f"sha256:{refusal['subject']}" in self._rotten:
                continue  # it goes once the damaged blob is replaced
            assert refusal["kind"] == "length", refusal
            for path in self.store.glob(f"blobs/sha256-{refusal['subject']}-partial*"):
                path.unlink()

    def _leaves_nothing(self) -> None:
        ours = self.store / ".ollama-watch"
        assert list(ours.glob("intents/*")) == []
        # Half of such a file goes when it is written next, which may be never.
        halves = {path.name.partition("-")[0] for path in ours.glob(".*.json.new")}
        assert halves <= {".models.json.new", ".registry", ".seen"}, halves
        for path in (self.store / "blobs").glob("*-partial-*"):
            assert path.stat().st_size, f"a guard is left: {path.name}"

    def _wanted(self) -> list[str]:
        return [digest for model in self._models for digest in (*model.digests, model.config)]

    def _pull_to_the_end(self, model: Model) -> None:
        """It succeeds, and downloads what was missing."""
        missing = {}
        for digest in (*model.digests, model.config):
            size, claimed = self._contents[digest].size, seen.claims(self.store, digest)
            there = blob(self.store, digest).exists()
            missing[digest] = 0 if there else size - ranges.size(claimed)
        self._registry.reset_stats()
        told = collapsed(self._server.pull(model.name))
        if "digest mismatch" in told[-1] and self._cut & set(model.digests):
            self._cut.clear()
            self._tell("a length was lost")
            self._pull_to_the_end(model)
            return
        assert told[-1] == "success", told
        for digest, most in missing.items():
            assert self._registry.bytes_served(digest) <= most, digest

    def _is_mine_rotten(self) -> bool:
        """Whether a blob is damaged that nobody can pull again: it stays as it is."""
        mine = {*self._finished()} - {*self._wanted()}
        return any(not is_right(self.store, each) for each in mine)

    def _mend_rotten(self) -> None:
        wrong = {digest for digest in self._wanted() if not is_right(self.store, digest)}
        assert wrong <= self._rotten | self._excused, f"wrong: {wrong}"
        self._tell(len(wrong), "rotten")
        assert self.us("verify").returncode == 1
        assert self.us("repair", "-y").returncode in ({0, 3} if self._is_mine_rotten() else {0})
        for model in self._models:
            self._pull_to_the_end(model)


class Operation(NamedTuple):
    """What may happen next, when, and how often it does."""

    do: Callable[[Machine], None]
    often: int
    possible: Callable[[Machine], object] = lambda _: True


OPERATIONS = (
    Operation(Machine.begin_pull, 14, lambda it: it._pull is None),
    Operation(Machine.finish_pull, 2, lambda it: it._pull is not None),
    Operation(Machine.cancel_pull, 3, lambda it: it._pull is not None),
    Operation(Machine.stop, 6, lambda it: it._running),
    Operation(Machine.start, 1, lambda it: not it._running),
    Operation(Machine.prepare_and_start, 3, lambda it: not it._running),
    Operation(Machine.remove_model, 3),
    Operation(Machine.create, 1),
    Operation(Machine.damage, 6, lambda it: it._pull is None and it._unfinished()),
    Operation(Machine.rot, 2, lambda it: it._pull is None and it._finished()),
    Operation(Machine.grow_old, 4),
    Operation(Machine.break_manifest, 1, lambda it: it._pull is None and it._manifests()),
    Operation(Machine.mend_manifest, 3, lambda it: it._broken),
    Operation(Machine.leave_foreign_files, 1),
    Operation(Machine.act, 10),
    Operation(Machine.fetch, 14, lambda it: len(it._finished()) < len(it._wanted())),
    Operation(Machine.cut_power, 4, lambda it: it._ours.received),
    Operation(Machine.watch_for_a_while, 3),
)
