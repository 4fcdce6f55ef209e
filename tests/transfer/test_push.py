"""A push to a plain registry: what is missing goes there, nothing wrong, the manifest last."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Run, environment
from tests.support import commands
from watcher.commands import mirror
from watcher.demo.registry import Registry
from watcher.errors import Exit
from watcher.transfer import auth, push, values
from watcher.transfer.client import Answer, Client, Request
from watcher.transfer.values import Cause, TransferError

from .driven import QUICK, SECONDS, Here
from .plain import Handler, Plain

MANIFEST = "/v2/library/demo/manifests/1b"


@pytest.fixture
def full(tmp_path: Path, registry: Registry) -> Here:
    """A store that has the model."""
    here = Here(tmp_path / "models", registry, 1_500_000)
    here.fill()
    return here


@pytest.fixture
def plain() -> Iterator[Plain]:
    with Plain() as served:
        yield served


def pushed(full: Here, plain: Plain, **more: object) -> push.Pushed:
    order = push.Order(str(full.path), full.name, plain.url)._replace(**more)  # type: ignore[arg-type]
    return push.Push(order, QUICK, full.events.append).run()


def check(full: Here, plain: Plain) -> None:
    """All of the model is there."""
    assert plain.blobs.keys() == {each[7:] for each in (*full.model.digests, full.model.config)}
    assert plain.manifests == {MANIFEST: full.model.manifest}


def _seen(full: Here) -> dict[Path, tuple[int, ...]]:
    """Each file of the store, but for when it was read."""
    found = {path: path.stat() for path in full.path.rglob("*")}
    return {
        path: (each.st_ino, each.st_mode, each.st_size, each.st_mtime_ns, each.st_ctime_ns)
        for path, each in found.items()
    }


def test_it_sends_everything_once_and_the_manifest_last(full: Here, plain: Plain) -> None:
    before = _seen(full)
    done = pushed(full, plain)
    check(full, plain)
    assert done.digest == hashlib.sha256(full.model.manifest).hexdigest()
    assert (done.is_new, [is_sent for _, is_sent in done.layers]) == (True, [True, True])
    puts = [path for method, path, _ in plain.asked if method == "PUT"]
    assert puts[-1] == MANIFEST
    assert _seen(full) == before


def test_what_is_there_is_not_sent_again(full: Here, plain: Plain) -> None:
    pushed(full, plain)
    del plain.blobs[full.model.config[7:]]
    plain.asked.clear()
    done = pushed(full, plain)
    assert [is_sent for _, is_sent in done.layers] == [False, True]
    assert not done.is_new
    assert plain.count("PUT", "") == 1
    check(full, plain)


@pytest.mark.parametrize("harm", ["first byte", "last byte", "shorter", "longer", "missing"])
def test_a_damaged_blob_never_gets_there(full: Here, plain: Plain, harm: str) -> None:
    data = bytearray(full.blob.read_bytes())
    data[0 if harm == "first byte" else -1] ^= 1
    data = {"shorter": data[:-1], "longer": data + b"x"}.get(harm, data)
    full.blob.unlink()
    if harm != "missing":
        full.blob.write_bytes(data)
    with pytest.raises(TransferError, match=full.digest[:12]) as caught:
        pushed(full, plain)
    assert caught.value.cause is Cause.DAMAGED_BLOB
    assert full.digest not in plain.blobs
    assert not plain.manifests
    assert all(size < full.size for size in plain.received)


def test_a_blob_that_is_cut_while_it_is_sent_never_gets_there(full: Here, plain: Plain) -> None:
    def cut(handler: Handler) -> bool:
        if handler.command == "PUT" and full.digest in handler.path:
            os.truncate(full.blob, full.size // 2)
        return False

    plain.fault = cut
    with pytest.raises(TransferError, match="checksum mismatch"):
        pushed(full, plain)
    assert full.digest not in plain.blobs
    assert not plain.manifests


def first(method: str, part: str, answered: int, **headers: str) -> object:
    """A fault of the first such request: it is answered so; 0: the connection is reset."""
    times = [1]

    def fault(handler: Handler) -> bool:
        if not times or handler.command != method or part not in handler.path:
            return False
        times.clear()
        handler.close_connection = True
        if answered:
            if method == "PUT" and answered < 400:
                handler.body()
            handler.answer(answered, b"not now", **headers)
        else:
            handler.rfile.read(100_000 if method == "PUT" else 0)
            linger = struct.pack("ii", 1, 0)
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            handler.connection.shutdown(socket.SHUT_RDWR)
        return True

    return fault


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "GET"])
@pytest.mark.parametrize("answered", [0, 500, 503])
def test_what_passes_is_tried_again(full: Here, plain: Plain, method: str, answered: int) -> None:
    plain.fault = first(method, "", answered, Retry_After="0")  # type: ignore[assignment]
    pushed(full, plain)
    check(full, plain)
    # A connection that was kept and is dead is replaced at once.
    assert len(full.waits()) == 1 or answered == 0


@pytest.mark.parametrize(
    ("method", "part", "answered", "cause"),
    [
        ("HEAD", "blobs", 403, Cause.NOT_ALLOWED),
        ("HEAD", "blobs", 301, Cause.WRONG_ANSWER),
        ("POST", "uploads", 404, Cause.NO_SUCH_MODEL),
        ("POST", "uploads", 405, Cause.WRONG_ANSWER),
        ("POST", "uploads", 200, Cause.WRONG_ANSWER),
        ("PUT", "sha256", 413, Cause.WRONG_ANSWER),
        ("PUT", "sha256", 202, Cause.WRONG_ANSWER),
        ("PUT", "manifests", 400, Cause.WRONG_ANSWER),
    ],
)
def test_a_refusal_ends_it_at_once_with_the_registrys_words(
    full: Here, plain: Plain, method: str, part: str, answered: int, cause: Cause
) -> None:
    plain.fault = first(method, part, answered)  # type: ignore[assignment]
    with pytest.raises(TransferError, match=str(answered)) as caught:
        pushed(full, plain)
    assert caught.value.cause is cause
    assert method == "HEAD" or "not now" in caught.value.message
    assert caught.value.next_step
    assert not full.waits()
    assert not plain.manifests


def test_a_layer_of_another_size_there_ends_it(full: Here, plain: Plain) -> None:
    plain.blobs[full.digest] = b"x"
    with pytest.raises(TransferError, match="with 1 bytes") as caught:
        pushed(full, plain)
    assert caught.value.cause is Cause.WRONG_SIZE
    assert caught.value.next_step
    assert not plain.manifests


def test_a_registry_has_minutes_to_store_a_layer(
    full: Here, plain: Plain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may move the bytes before it answers; without them the whole layer is sent again."""
    ask, given = Client.ask, []

    async def asked(client: Client, request: Request) -> Answer:
        if request.body is not None:
            given.append(request.seconds)
        return await ask(client, request)

    monkeypatch.setattr(Client, "ask", asked)
    pushed(full, plain)
    assert given == [300, 300, 30], "two layers and the manifest"


@pytest.mark.parametrize("lie", ["digest", "manifest"])
def test_a_registry_that_makes_something_else_of_it_is_not_believed(
    full: Here, plain: Plain, lie: str
) -> None:
    def fault(handler: Handler) -> bool:
        if lie == "digest" and handler.command == "PUT" and "sha256" in handler.path:
            handler.body()
            handler.answer(201, Docker_Content_Digest=f"sha256:{'0' * 64}")
            return True
        if lie == "manifest" and handler.command == "GET":
            handler.answer(200, full.model.manifest + b"\n")
            return True
        return False

    plain.fault = fault
    with pytest.raises(TransferError) as caught:
        pushed(full, plain)
    assert caught.value.cause is Cause.WRONG_ANSWER


def test_a_media_type_adds_no_header(full: Here, plain: Plain) -> None:
    model = json.loads(full.model.manifest) | {"mediaType": "a/b\r\nX-Evil: 1"}
    full.manifest.write_text(json.dumps(model))
    pushed(full, plain)
    assert not any("X-Evil" in headers for _, _, headers in plain.asked)


# ---------------------------------------------------------------- who may


def wanting(kind: str, realm: str = "") -> object:
    """A fault: 401 to whoever has neither the token nor the login."""

    def fault(handler: Handler) -> bool:
        given = handler.headers.get("Authorization", "")
        if handler.path.startswith("/token"):
            known = given == "Basic bWU6c2VjcmV0"
            token = "pushing" if known or realm == "open" else "pulling"
            handler.answer(200, json.dumps({"token": token}).encode())
            return True
        if given in ("Bearer pushing", "Basic bWU6c2VjcmV0"):
            return False
        if kind == "Bearer":
            where = f"http://localhost:{handler.plain.port}/token"
            header = f'Bearer realm="{where}",scope="repository:library/demo:pull,push"'
        else:
            header = 'Basic realm="it"'
        handler.close_connection = True
        handler.answer(401, WWW_Authenticate=header)
        return True

    return fault


@pytest.fixture
def login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "netrc"
    file.write_text("machine localhost login me password secret\n")
    file.chmod(0o600)
    monkeypatch.setenv("NETRC", str(file))
    return file


@pytest.mark.parametrize("kind", ["Bearer", "Basic"])
def test_a_login_lets_it_in(full: Here, plain: Plain, login: Path, kind: str) -> None:
    plain.fault = wanting(kind)  # type: ignore[assignment]
    pushed(full, plain)
    check(full, plain)


def test_a_token_for_everybody_lets_it_in(full: Here, plain: Plain) -> None:
    plain.fault = wanting("Bearer", "open")  # type: ignore[assignment]
    pushed(full, plain)
    check(full, plain)


@pytest.mark.parametrize("kind", ["Bearer", "Basic"])
def test_without_a_login_it_says_what_helps(full: Here, plain: Plain, kind: str) -> None:
    plain.fault = wanting(kind)  # type: ignore[assignment]
    with pytest.raises(TransferError) as caught:
        pushed(full, plain)
    assert caught.value.cause is Cause.NOT_ALLOWED
    assert "~/.netrc" in caught.value.next_step


def test_another_host_that_takes_the_uploads_gets_no_login(
    full: Here, plain: Plain, login: Path
) -> None:
    wants = wanting("Basic")
    plain.uploads = "127.0.0.1"
    plain.fault = lambda handler: (
        "/upload?" not in handler.path and wants(handler)  # type: ignore[operator]
    )
    pushed(full, plain)
    uploads = [headers for _, path, headers in plain.asked if "/upload?" in path]
    assert uploads
    assert not any("Authorization" in headers for headers in uploads)


def test_a_login_is_sent_by_https_and_on_this_machine_only(login: Path) -> None:
    login.write_text("machine registry.lan login me password secret\n" + login.read_text())
    assert auth.login("http://registry.lan:5000", str(login)) == ""
    for url in ("https://registry.lan:5000", "http://localhost:5000"):
        assert auth.login(url, str(login)) == "Basic bWU6c2VjcmV0"
    assert auth.login("https://other.lan", str(login)) == ""
    assert auth.login("https://registry.lan", "") == ""


def test_a_broken_file_of_logins_is_named_and_not_quoted(login: Path) -> None:
    login.write_text("machine localhost login me pass word secret\n")
    with pytest.raises(values.TryError, match=f"{login} can't be read: line 1") as caught:
        auth.login("https://localhost", str(login))
    assert "secret" not in str(caught.value)


# ---------------------------------------------------------------- the command


def test_the_command_says_what_it_has_sent(full: Here, plain: Plain, run: Run) -> None:
    words = ("--store", str(full.path), "mirror", "push", full.model.name, plain.url)
    done = run(*words)
    assert (done.returncode, done.stderr) == (0, b""), done.stderr
    assert b": sent 2 layers (1.5 MB), 0 were there\n" in done.stdout
    made = json.loads(run(*words, "--json").stdout)
    assert made["schema"] == "ollama-watch/mirror-push/1"
    assert (made["sent_bytes"], made["manifest"]["sent"]) == (0, False)
    assert made["layers"][0] == {
        "digest": f"sha256:{full.digest}", "size_bytes": full.size, "sent": False,
    }  # fmt: skip
    assert run(*words, "-q").stdout == b""
    check(full, plain)


def test_an_unknown_model_is_exit_2_and_names_the_nearest(full: Here, run: Run) -> None:
    done = run("--store", str(full.path), "mirror", "push", "dem:1b", "localhost:1")
    assert done.returncode == 2
    assert b"dem:1b is not in" in done.stderr
    assert b"demo:1b" in done.stderr


@pytest.mark.parametrize(
    ("address", "code"),
    [
        ("http://registry.invalid:5000", 3),
        ("ftp://registry.invalid", 2),
        ("https://me:secret@registry.invalid", 2),
    ],
)
def test_an_address_that_may_not_be_used(full: Here, run: Run, address: str, code: int) -> None:
    done = run("--store", str(full.path), "mirror", "push", full.model.name, address)
    assert done.returncode == code
    if code == 3:
        assert b"is not encrypted" in done.stderr
        assert b" --insecure\n" in done.stderr


def test_plain_http_is_for_this_machine_and_for_named_mirrors() -> None:
    lan = "http://registry.lan:5000"
    assert not mirror._is_allowed(lan, ("http://other.lan:5000",))
    assert mirror._is_allowed(lan, (lan,))
    assert mirror._is_allowed("http://127.0.0.1:5000", ())
    assert mirror._is_allowed("https://registry.lan", ())
    assert mirror._address("registry.lan:5000/") == "https://registry.lan:5000"
    assert mirror._address("localhost:5000") == "http://localhost:5000"


def test_an_interrupt_leaves_whole_layers_only(full: Here, plain: Plain, tmp_path: Path) -> None:
    begun, ended = threading.Event(), threading.Event()

    def hold(handler: Handler) -> bool:
        if handler.command == "PUT" and full.digest in handler.path:
            begun.set()
            ended.wait(SECONDS)
        return False

    plain.fault = hold
    words = ("--store", str(full.path), "mirror", "push", full.model.name, plain.url)
    process = commands.start(words, environment(tmp_path))
    assert begun.wait(SECONDS)
    process.send_signal(signal.SIGINT)
    assert process.wait(SECONDS) == Exit.INTERRUPTED
    ended.set()
    plain.fault = lambda _: False
    assert not plain.manifests
    pushed(full, plain)
    check(full, plain)


def test_a_damaged_blob_leads_to_verify(full: Here, plain: Plain, run: Run) -> None:
    full.blob.write_bytes(bytes(full.size))
    words = ("--store", str(full.path), "mirror", "push", full.model.name, plain.url)
    done = run(*words)
    assert done.returncode == 4
    assert b" verify " in done.stderr.splitlines()[-1]
    assert full.digest not in plain.blobs
